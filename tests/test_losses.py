"""Loss terms as values, and the exchange rate of their weights."""

from __future__ import annotations

import copy

import pytest
import torch

from monoloss_plugin import L1L2Ratio, MonoLoss, OffSupportL1, functional
from monoloss_plugin.losses import StepTensors, lam_factor


def test_calling_a_term_gives_lam_times_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 6, generator=generator).relu()
    e = torch.randn(12, 4, generator=generator)
    selected = a > 0.5
    torch.testing.assert_close(MonoLoss(lam=0.25)(a, e), 0.25 * functional.monoloss(a, e))
    torch.testing.assert_close(
        OffSupportL1(lam=3, units="all")(a, selected),
        3 * functional.off_support_l1(a, selected, units="all"),
    )
    torch.testing.assert_close(
        L1L2Ratio(lam=3, normalize=True)(a, selected),
        3 * functional.l1_l2_ratio(a, selected, normalize=True),
    )


def test_monoloss_reports_the_mean_score_and_the_number_of_defined_latents() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    e = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    value, metrics = MonoLoss(lam=1).compute_loss(StepTensors(a, e))
    assert metrics["monoscore"].item() == pytest.approx(0.5**0.5)
    assert metrics["monoscore_defined"].item() == 1
    assert value.item() == pytest.approx(1 - 0.5**0.5)
    _, renamed = MonoLoss(lam=1, name="second_encoder").compute_loss(StepTensors(a, e))
    assert set(renamed) == {"second_encoder_monoscore", "second_encoder_monoscore_defined"}


def test_terms_are_plain_values() -> None:
    assert MonoLoss(lam=3e-4) == MonoLoss(lam=3e-4)
    assert MonoLoss(lam=3e-4) != MonoLoss(lam=3e-4, lam_units="raw")
    assert copy.deepcopy(OffSupportL1(lam=0.1)) == OffSupportL1(lam=0.1)
    with pytest.raises(AttributeError):
        MonoLoss(lam=1).lam = 2  # type: ignore[misc]


@pytest.mark.parametrize("term", [MonoLoss, OffSupportL1, L1L2Ratio])
def test_bad_weights_are_named(term) -> None:
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lam: expected a finite weight"):
            term(lam=bad)
    for bad in ("3e-4", None, True):
        with pytest.raises(TypeError, match="lam: expected a number"):
            term(lam=bad)


def test_unknown_options_list_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"lam_units: expected one of \['mse', 'nmse', 'raw'\]"):
        MonoLoss(lam=1, lam_units="paper")
    with pytest.raises(ValueError, match=r"units: expected one of \['batch_active', 'all'\]"):
        L1L2Ratio(lam=1, units="mse")
    with pytest.raises(ValueError, match=r"lam_units: expected one of"):
        OffSupportL1(lam=1, lam_units="batch")
    with pytest.raises(ValueError, match=r"over_units: expected one of"):
        OffSupportL1(lam=1, over_units="max")
    with pytest.raises(ValueError, match="name: expected a name"):
        MonoLoss(lam=1, name="")


def test_regularizers_say_what_they_need() -> None:
    with pytest.raises(ValueError, match="l1_l2_ratio: needs the activations before a Top-k"):
        L1L2Ratio(lam=1).compute_loss(StepTensors(torch.rand(3, 2), torch.rand(3, 4)))


@pytest.mark.parametrize("reduction", ["sum", "mean", "fvu"])
@pytest.mark.parametrize("units", ["mse", "nmse"])
@pytest.mark.parametrize("degree", [0, 1])
def test_lam_factor_keeps_the_trade_off_of_the_paper_s_loss(reduction, units, degree) -> None:
    """Scaling the inputs by s and reducing as the host does must scale both terms alike."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(64, 24, generator=generator) + 1, dim=1)
    unit_hat = unit + 0.1 * torch.randn(64, 24, generator=generator)
    paper_error = (unit - unit_hat).square()
    paper = paper_error.mean() if units == "mse" else paper_error.sum(1).mean()
    s = 7.0
    host_error = (s * unit - s * unit_hat).square()
    deviations = (s * (unit - unit.mean(0))).square()
    host = {
        "sum": host_error.sum(1).mean(),
        "mean": host_error.mean(),
        "fvu": host_error.sum() / deviations.sum(),
    }[reduction]
    factor = lam_factor(
        units,
        width=24,
        mean_square_norm=s * s,
        reduction=reduction,
        variance=deviations.sum(1).mean().item(),
        degree=degree,
    )
    # A term of value 1 on unit inputs has value s**degree on inputs scaled by s.
    assert factor * s**degree == pytest.approx((host / paper).item(), rel=1e-4)


def test_lam_factor_of_raw_is_one_and_bad_input_is_named() -> None:
    assert lam_factor("raw", width=8, mean_square_norm=0.0, reduction="sum") == 1.0
    with pytest.raises(ValueError, match="mean_square_norm: expected a positive"):
        lam_factor("mse", width=8, mean_square_norm=0.0, reduction="sum")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        lam_factor("mse", width=8, mean_square_norm=1.0, reduction="max")
    with pytest.raises(ValueError, match="variance: expected a positive finite number for 'fvu'"):
        lam_factor("mse", width=8, mean_square_norm=1.0, reduction="fvu")

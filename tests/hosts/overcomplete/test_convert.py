"""The real library's modules, trained by its own loop."""

from __future__ import annotations

import pytest
import torch
from overcomplete.sae import (
    QSAE,
    SAE,
    BatchTopKSAE,
    JumpSAE,
    MLPEncoder,
    MpSAE,
    RATopKSAE,
    TopKSAE,
    train_sae,
)
from torch.utils.data import DataLoader, TensorDataset

from monoloss_plugin.convert import from_overcomplete
from tests.convert.conftest import LATENTS, WIDTH

MAKERS = {
    "SAE": lambda **o: SAE(WIDTH, LATENTS, **o),
    "TopKSAE": lambda **o: TopKSAE(WIDTH, LATENTS, top_k=5, **o),
    "BatchTopKSAE": lambda **o: BatchTopKSAE(WIDTH, LATENTS, top_k=5 * 256, **o),
    "JumpSAE": lambda **o: JumpSAE(WIDTH, LATENTS, **o),
}


def criterion(x, x_hat, pre_codes, codes, dictionary):
    return (x - x_hat).square().mean() + 1e-3 * codes.abs().mean()


def trained(sae, digits):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(digits), batch_size=256, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    train_sae(sae, loader, criterion, optimizer, nb_epochs=2, device="cpu")
    return sae


def compare(sae, digits, assert_same, converted=None):
    """In the library's eval mode; the conversion comes first, and must not change the module."""
    converted = from_overcomplete(sae) if converted is None else converted
    sae.eval()
    with torch.no_grad():
        _, latents, out = sae(digits)
    assert_same(converted, digits, latents, out)


@pytest.mark.parametrize("name", MAKERS)
def test_codes_and_reconstruction_are_the_librarys(name, digits, assert_same) -> None:
    torch.manual_seed(0)
    sae = trained(MAKERS[name](), digits)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    converted = from_overcomplete(sae)
    assert all(torch.equal(before[key], tensor) for key, tensor in sae.state_dict().items())
    assert sae.training
    compare(sae, digits, assert_same, converted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["tied", "untied"])
def test_tied_and_untied_encoders(form, bias, digits, assert_same) -> None:
    torch.manual_seed(0)
    sae = getattr(MAKERS["TopKSAE"](), form)(bias=bias)
    compare(trained(sae, digits), digits, assert_same)


def test_batch_normalisation_is_folded_in(digits, assert_same) -> None:
    torch.manual_seed(0)
    sae = trained(MAKERS["TopKSAE"](encoder_module="mlp_bn_1"), digits)
    compare(sae, digits, assert_same)


def test_archetypal_dictionaries_and_a_multiplier(digits, assert_same) -> None:
    torch.manual_seed(0)
    compare(
        trained(RATopKSAE(WIDTH, LATENTS, points=digits[:100], top_k=5), digits),
        digits,
        assert_same,
    )
    scaled = MAKERS["SAE"](dictionary_params={"use_multiplier": True, "normalization": "max_l2"})
    compare(trained(scaled, digits), digits, assert_same)


@pytest.mark.parametrize("name", MAKERS)
def test_state_dicts(name, tmp_path, digits, assert_same) -> None:
    torch.manual_seed(0)
    sae = trained(MAKERS[name](), digits)
    torch.save(sae.state_dict(), tmp_path / "sae.pt")
    options = {"TopKSAE": {"top_k": 5}}.get(name, {})
    if name == "BatchTopKSAE":
        options = {"threshold": float(sae.running_threshold)}
    converted = from_overcomplete(tmp_path / "sae.pt", sae_class=name, **options)
    compare(sae, digits, assert_same, converted)


def test_what_sae_lens_has_no_like_of_is_named() -> None:
    for sae, said in (
        (QSAE(WIDTH, LATENTS), "like overcomplete's QSAE"),
        (MpSAE(WIDTH, LATENTS), "like overcomplete's MpSAE"),
        (MAKERS["SAE"](encoder_module="mlp_ln_3"), "several layers"),
        (MAKERS["SAE"](encoder_module="mlp_ln_1"), "LayerNorm"),
        (MAKERS["BatchTopKSAE"](), "only after it ran"),
        (torch.nn.Linear(2, 2), "not overcomplete's"),
        (
            MAKERS["SAE"](
                encoder_module=MLPEncoder(
                    WIDTH, LATENTS, nb_blocks=1, output_activation=torch.nn.Softplus
                )
            ),
            "in Softplus",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            from_overcomplete(sae)
    with pytest.raises(TypeError, match="got int"):
        from_overcomplete(3)


def test_a_state_dict_needs_what_it_does_not_keep(tmp_path) -> None:
    torch.save(MAKERS["TopKSAE"]().state_dict(), tmp_path / "sae.pt")
    for options, said in (
        ({}, "none given"),
        ({"sae_class": "TopKSAE"}, "expected a top_k of 1 to 48"),
        ({"sae_class": "BatchTopKSAE"}, "threshold: a BatchTopKSAE"),
        ({"sae_class": "JumpSAE"}, "no thresholds"),
    ):
        with pytest.raises(ValueError, match=said):
            from_overcomplete(tmp_path / "sae.pt", **options)

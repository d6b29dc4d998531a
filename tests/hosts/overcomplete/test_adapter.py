"""Losses in overcomplete's own training loop, for each of its SAEs."""

from __future__ import annotations

import copy
import doctest
import functools
import runpy
from pathlib import Path

import pytest
import torch
from overcomplete.sae import (
    OMPSAE,
    SAE,
    BatchTopKSAE,
    JumpSAE,
    MpSAE,
    RAJumpSAE,
    RATopKSAE,
    TopKSAE,
    losses,
    train_sae,
)
from overcomplete.sae.train import train_sae_amp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from monoloss_plugin import Batch, L1L2Ratio, MonoLoss, MonoScore, OffSupportL1, functional
from monoloss_plugin.adapters import overcomplete as adapter
from monoloss_plugin.adapters.overcomplete import add_loss
from monoloss_plugin.evaluation import evaluate
from tests.pages import py_blocks

ROOT = Path(__file__).parents[3]
WIDTH, LATENTS, BATCH = 64, 96, 128


def points() -> Tensor:
    return torch.nn.functional.normalize(torch.randn(200, WIDTH), dim=1)


MAKERS = {
    "SAE": lambda: SAE(WIDTH, LATENTS),
    "TopKSAE": lambda: TopKSAE(WIDTH, LATENTS, top_k=6),
    "BatchTopKSAE": lambda: BatchTopKSAE(WIDTH, LATENTS, top_k=6 * BATCH),
    "JumpSAE": lambda: JumpSAE(WIDTH, LATENTS, bandwidth=0.1),
    "RATopKSAE": lambda: RATopKSAE(WIDTH, LATENTS, points(), top_k=6),
    "RAJumpSAE": lambda: RAJumpSAE(WIDTH, LATENTS, points(), bandwidth=0.1),
}
TOP_K = ("TopKSAE", "BatchTopKSAE", "RATopKSAE")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]()


mse_l1 = functools.partial(losses.mse_l1, penalty=1e-4)


def mse(x, x_hat, pre_codes, codes, dictionary):
    return (x - x_hat).square().mean()


def train(sae, images, criterion, epochs=6, **options):
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(images), batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    return train_sae(sae, loader, criterion, optimizer, nb_epochs=epochs, device="cpu", **options)


def call(criterion, sae, x) -> tuple[Tensor, Tensor, Tensor]:
    pre_codes, codes, x_hat = sae(x)
    return criterion(x, x_hat, pre_codes, codes, sae.get_dictionary()), pre_codes, codes


def gradients(loss: Tensor, sae: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    return [torch.zeros(1) if one is None else one for one in found]


@pytest.mark.parametrize("name", MAKERS)
def test_training_with_it_raises_the_score_of_held_out_images(name, images) -> None:
    scores = {}
    for lam in (0.0, 0.02):
        sae = make(name)
        train(sae, images[:1500], add_loss(mse_l1, MonoLoss(lam=lam)), monitoring=0)
        metric = MonoScore()
        with torch.no_grad():
            metric.update(sae.train()(images[1500:])[1], images[1500:])
        scores[lam] = metric.compute().mean_defined
    assert scores[0.02] > scores[0.0] + 0.02


@pytest.mark.parametrize("name", MAKERS)
def test_loss_and_gradient_are_the_hosts_plus_the_weighted_term(name, images) -> None:
    x, plain, sae = images[:BATCH], make(name), make(name)
    expected, _, codes = call(mse_l1, plain, x)
    term = functional.monoloss(codes, x)
    criterion = add_loss(mse_l1, MonoLoss(lam=0.5))
    loss, _, _ = call(criterion, sae, x)
    torch.testing.assert_close(loss, expected + 0.5 * term)  # X is 1: lam is the weight
    by_hand = gradients(expected + 0.5 * term, plain)
    torch.testing.assert_close(gradients(loss, sae), by_hand, atol=1e-6, rtol=1e-4)
    assert criterion.metrics["monoscore"].item() == pytest.approx(1 - term.item(), abs=1e-6)


@pytest.mark.parametrize("units", ["mse", "nmse"])
def test_lam_keeps_the_trade_off_of_the_papers_loss(units, images) -> None:
    """The host's own loss on inputs 5 times as large, against the paper's on unit inputs."""
    x, s = images[:BATCH], 5.0
    x_hat = x + 0.1 * torch.randn_like(x)
    unit = (x - x_hat).square()
    paper = unit.mean() if units == "mse" else unit.sum(1).mean()
    host = losses.mse_l1(s * x, s * x_hat, None, torch.zeros(1), None)
    criterion = add_loss(mse, MonoLoss(lam=0.5, lam_units=units))
    sae = make("TopKSAE")
    call(criterion, sae, s * x)
    factor = criterion.terms.record["terms"]["monoloss"]["factor"]
    assert factor == pytest.approx((host / paper).item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(32, 4, WIDTH), (16, WIDTH, 4, 2)])
def test_tokens_and_pixels_are_rows_in_the_order_of_their_codes(shape, images) -> None:
    x = images[:BATCH].reshape(shape[0], -1, WIDTH)
    x = x.transpose(1, 2).reshape(shape) if len(shape) == 4 else x
    encoder = {3: "attention_1b", 4: "resnet_1b"}[len(shape)]
    torch.manual_seed(0)
    sae = TopKSAE(tuple(shape[1:]), LATENTS, top_k=6, encoder_module=encoder).eval()
    _, codes, _ = sae(x)
    criterion = add_loss(lambda *_: torch.zeros(()), MonoLoss(lam=1.0))
    found = criterion(x, 0 * x, codes, codes, None)
    torch.testing.assert_close(found, functional.monoloss(codes, images[:BATCH]))


@pytest.mark.parametrize("name", ["TopKSAE", "BatchTopKSAE", "JumpSAE"])
def test_at_lam_0_the_run_is_the_hosts_own(name, images) -> None:
    plain, zero = make(name), make(name)
    logs = train(plain, images, mse, epochs=2)
    theirs = train(zero, images, add_loss(mse, MonoLoss(lam=0.0)), epochs=2)
    assert logs["step_loss"] == theirs["step_loss"]
    for one, other in zip(plain.parameters(), zero.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("term", [OffSupportL1(lam=0.3), L1L2Ratio(lam=0.3)])
@pytest.mark.parametrize("name", TOP_K)
def test_the_regularizers_take_the_codes_before_the_selection(term, name, images) -> None:
    x, sae = images[:BATCH], make(name)
    criterion = add_loss(mse, term)
    loss, pre_codes, codes = call(criterion, sae, x)
    factor = criterion.terms.record["terms"][term.name]["factor"]
    assert factor == pytest.approx(1 / WIDTH, rel=1e-4)  # "nmse", and a mean over the width
    added = factor * term(pre_codes, codes != 0)
    expected = mse(x, sae(x)[2], None, None, None) + added
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("term", [MonoLoss(lam=0.3), OffSupportL1(lam=0.3)])
@pytest.mark.parametrize("latents", [LATENTS, WIDTH])
def test_matching_pursuit_is_refused(term, latents, images) -> None:
    torch.manual_seed(0)
    sae = MpSAE(WIDTH, latents, k=6)
    with pytest.raises(
        ValueError, match=f"{term.name}: this SAE gives a residual instead of codes"
    ):
        train(sae, images, add_loss(mse, term))
    with pytest.raises(ValueError, match=r"the codes carry no gradient.*OMPSAE"):
        call(add_loss(mse, term), OMPSAE(WIDTH, latents, k=2), images[:BATCH])


def test_negative_codes_are_refused(images) -> None:
    x, criterion = images[:BATCH], add_loss(mse, MonoLoss(lam=0.3))
    pre_codes, codes, x_hat = make("SAE")(x)
    with pytest.raises(ValueError, match="monoloss: reads 0 as 'not active', but these latents"):
        criterion(x, x_hat, pre_codes, codes - 1, None)


def test_terms_stack_start_late_and_compare_by_other_embeddings(images) -> None:
    x, sae, h = images[:BATCH], make("TopKSAE"), images[-BATCH:]
    of = torch.arange(BATCH) // 4
    criterion = add_loss(mse, MonoLoss(lam=0.5), embeddings=lambda x: h, start=1, warm_up_steps=2)
    grouped = MonoLoss(lam=1.0, name="grouped")
    criterion = add_loss(criterion, grouped, embeddings=lambda x: Batch(x, h, images=of))
    base, _, codes = call(mse, sae, x)
    one = functional.monoloss(codes, h)
    other = functional.monoloss(codes, h, groups=of)
    found = [call(criterion, sae, x)[0].item() for _ in range(4)]
    shares = (0.0, 0.0, 0.25, 0.5)
    assert found == pytest.approx([(base + w * one + other).item() for w in shares], rel=1e-5)
    assert set(criterion.metrics) >= {"monoloss", "grouped", "monoscore", "grouped_monoscore"}
    with pytest.raises(ValueError, match="grouped: the criterion has a term of this name already"):
        add_loss(criterion, grouped)


def test_the_state_holds_every_term_and_a_stack_leaves_the_inner_criterion_alone(images) -> None:
    def stack():
        inner = add_loss(mse, MonoLoss(lam=0.1), warm_up_steps=10)
        return inner, add_loss(inner, L1L2Ratio(lam=0.1), warm_up_steps=10)

    x, sae = images[:BATCH], make("TopKSAE")
    inner, both = stack()
    for _ in range(5):
        call(both, sae, x)
    assert inner.terms.steps == 0
    again = stack()[1]
    again.load_state_dict(both.state_dict())
    torch.testing.assert_close(call(again, sae, 3 * x)[0], call(both, sae, 3 * x)[0])
    late = add_loss(both, MonoLoss(lam=0.1, name="late"), warm_up_steps=2)
    call(late, sae, x)
    assert late.metrics["late"] == 0  # its warm-up begins when it is added
    assert late.metrics["monoloss"] > 0


def test_codes_that_are_scaled_get_a_gradient_wherever_the_sae_gives_one(images) -> None:
    class Scaled(JumpSAE):
        def encode(self, x):
            pre_codes, codes = super().encode(x)
            return pre_codes, 2.0 * codes

    found = []
    for made in (JumpSAE, Scaled):
        torch.manual_seed(0)
        sae = made(WIDTH, LATENTS, bandwidth=0.1)
        criterion = add_loss(lambda *_: torch.zeros(()), MonoLoss(lam=1.0))  # of codes alone
        loss, _, _ = call(criterion, sae, images[:BATCH])
        found.append(torch.autograd.grad(loss, sae.thresholds)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-3)


def test_without_gradients_the_loss_is_the_criterions_own(images) -> None:
    sae, criterion = make("TopKSAE"), add_loss(mse, MonoLoss(lam=0.5))
    with torch.no_grad():
        assert call(criterion, sae, images[:9])[0] == call(mse, sae, images[:9])[0]
    assert criterion.terms.steps == 0


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_goes_on(name, images) -> None:
    def run(sae, criterion, epochs):
        optimizer = torch.optim.SGD(sae.parameters(), lr=0.5)
        for epoch in epochs:
            torch.manual_seed(epoch)
            loader = DataLoader(TensorDataset(x), batch_size=BATCH, shuffle=True, drop_last=True)
            train_sae(sae, loader, criterion, optimizer, nb_epochs=1, monitoring=0)
        return sae

    x = images * torch.linspace(0.5, 2, len(images)).unsqueeze(1)
    term = MonoLoss(lam=0.02)
    whole = run(make(name), add_loss(mse, term, warm_up_steps=20), range(3))
    first = add_loss(mse, term, warm_up_steps=20)
    half = run(make(name), first, range(1))
    again, second = copy.deepcopy(half), add_loss(mse, term, warm_up_steps=20)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(again, second, range(1, 3))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_mixed_precision_trains(images) -> None:
    sae, criterion = make("TopKSAE"), add_loss(mse, MonoLoss(lam=0.02))
    loader = DataLoader(TensorDataset(images), batch_size=BATCH, drop_last=True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    logs = train_sae_amp(sae, loader, criterion, optimizer, nb_epochs=1, device="cpu")
    assert all(torch.isfinite(torch.tensor(logs["step_loss"])))
    assert criterion.metrics["monoloss"].dtype == torch.float32


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match="criterion: expected a function, got"):
        add_loss(TopKSAE, MonoLoss(lam=1.0))
    with pytest.raises(TypeError, match="loss: expected a loss term such as MonoLoss"):
        add_loss(mse, mse)
    with pytest.raises(ValueError, match=r"start: 0\.5 is a share of the run, and this trainer"):
        add_loss(mse, MonoLoss(lam=1.0), start=0.5)
    with pytest.raises(TypeError, match="embeddings: expected a frozen encoder to call"):
        add_loss(mse, MonoLoss(lam=1.0), embeddings="column")


def test_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(adapter).attempted > 3


def test_the_pages_code_runs(capsys, monkeypatch, tmp_path, images) -> None:
    monkeypatch.chdir(tmp_path)
    sae = make("TopKSAE")
    names = {
        "sae": sae,
        "criterion": mse,
        "train_sae": functools.partial(train_sae, nb_epochs=1, monitoring=0),
        "loader": DataLoader(TensorDataset(images), batch_size=BATCH),
        "optimizer": torch.optim.Adam(sae.parameters()),
    }
    (block,) = py_blocks("docs/hosts/overcomplete.md")
    exec(block, names)
    assert names["criterion"].terms.steps == 15
    runpy.run_path(str(ROOT / "examples/hosts/with_overcomplete.py"), run_name="__main__")
    assert "MonoScore" in capsys.readouterr().out


@pytest.mark.parametrize("name", MAKERS)
def test_evaluate_scores_its_saes_as_they_are_in_eval_mode(name, images) -> None:
    sae = make(name)
    train(sae, images[:1500], mse, epochs=1, monitoring=0)
    before = copy.deepcopy(getattr(sae, "running_threshold", None))
    found = evaluate(sae, images[1500:])
    assert sae.training
    assert getattr(sae, "running_threshold", None) == before
    with torch.no_grad():
        _, codes, x_hat = copy.deepcopy(sae).eval()(images[1500:])
    expected = functional.monoscore(codes, images[1500:])
    scores = found.monoscore.scores.nan_to_num().float()
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    error = (images[1500:] - x_hat).square().sum(0)
    kept = images[1500:].var(0) > 0
    variance = images[1500:].var(0, correction=0) * len(x_hat)
    assert found.r2 == pytest.approx(1 - (error / variance)[kept].mean().item(), rel=1e-4)


def test_an_untrained_batch_topk_sae_has_no_threshold(images) -> None:
    with pytest.raises(ValueError, match="sae: this BatchTopKSAE has no threshold"):
        evaluate(make("BatchTopKSAE"), images)

"""Losses on any module, in a loop of one's own or of a library."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monoloss_plugin import Batch, L1L2Ratio, MonoLoss, MonoScore, OffSupportL1, attach, functional
from monoloss_plugin.adapters.sae_lens import add_loss

D, M = 64, 32


class Output(NamedTuple):
    x_hat: Tensor
    latents: Tensor


class SAE(nn.Module):
    """A TopK SAE, as many write it: layers, tuples and attributes hold its tensors."""

    def __init__(self, k: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k = k
        self.encoder = nn.Sequential(nn.Linear(D, M), nn.ReLU())
        self.decoder = nn.Linear(M, D)

    def encode(self, x: Tensor) -> Tensor:
        self.z = self.encoder(x)
        kept = self.z.topk(self.k, dim=-1)
        return torch.zeros_like(self.z).scatter(-1, kept.indices, kept.values)

    def forward(self, x: Tensor) -> Output:
        latents = self.encode(x)
        return Output(self.decoder(latents), latents)


def error(output: Output, x: Tensor) -> Tensor:
    return (output.x_hat - x).square().mean()


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def stepped(sae: SAE, loss: Tensor) -> list[Tensor]:
    sae.zero_grad()
    loss.backward()
    return gradients(sae)


PLACES = {
    "a function of the output": {"latents": lambda call: call.output.latents},
    "a method": {"latents": lambda call: call.output, "method": "encode"},
    "a method's own inputs": {
        "latents": lambda call: call.output,
        "inputs": lambda call: call.inputs[0],
        "method": "encode",
        "gradient_at": "active",
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_loss_and_gradient_are_those_by_hand(name, images) -> None:
    x, plain, sae = images[:100], SAE(), SAE()
    monoloss = attach(sae, MonoLoss(lam=0.5), reduction="mean", **PLACES[name])
    output = plain(x)
    term = functional.monoloss(output.latents, x)
    expected = error(output, x) + 0.5 * term  # X is 1: lam is the weight
    loss = error(sae(x), x) + monoloss()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stepped(sae, loss), stepped(plain, expected))
    assert monoloss.metrics["monoscore"].item() == pytest.approx(1 - term.item())
    assert monoloss.metrics["monoloss"].item() == pytest.approx(0.5 * term.item())
    assert sae.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("place", ["path", "layer", "attribute"])
def test_latents_may_be_a_layers_output_or_an_attribute(place, images) -> None:
    x, sae = images[:100], SAE()
    latents = {"path": "encoder", "layer": sae.encoder[1], "attribute": lambda call: call.module.z}
    loss = MonoLoss(lam=0.5, lam_units="raw")
    monoloss = attach(sae, loss, latents=latents[place])
    sae(x)
    torch.testing.assert_close(monoloss(), 0.5 * functional.monoloss(sae.encoder(x), x))


@pytest.mark.parametrize(("reduction", "times"), [("sum", D), ("mean", 1), ("fvu", None)])
def test_lam_follows_the_loss_of_the_loop(reduction, times, images) -> None:
    """On inputs three times as large, the host's loss is `grown` times the paper's."""
    x, sae = 3 * images[:100], SAE()
    monoloss = attach(sae, MonoLoss(lam=0.5), latents="encoder", reduction=reduction)
    sae(x)
    value = monoloss().item()
    variance = x.var(0, correction=0).sum().item()
    grown = 9 * times if times else 9 * D / variance
    assert value == pytest.approx(
        0.5 * grown * functional.monoloss(sae.encoder(x), x).item(), rel=1e-4
    )
    assert monoloss.terms.record["terms"]["monoloss"]["factor"] == pytest.approx(grown, rel=1e-4)


def test_a_loop_that_cannot_change_gets_the_term_in_the_output(images) -> None:
    class WithLoss(SAE):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            output = super().forward(x)
            return output.x_hat, output.latents, error(output, x)

    x, sae = images[:100], WithLoss()
    before = sae(x)[2]
    handle = attach(
        sae,
        MonoLoss(lam=0.5),
        latents=lambda call: call.output[1],
        reduction="mean",
        add=lambda output, term: (*output[:2], output[2] + term),
    )
    _, latents, loss = sae(x)
    torch.testing.assert_close(loss, before + 0.5 * functional.monoloss(latents, x))
    assert handle.terms.steps == 1
    assert torch.equal(sae.eval()(x)[2], before)
    with torch.no_grad():
        assert torch.equal(sae.train()(x)[2], before)
    handle.remove()
    assert torch.equal(sae(x)[2], before)
    assert sae.__dict__.keys() == WithLoss().__dict__.keys() | {"z"}


def test_tokens_are_flattened_together(images) -> None:
    x, sae = images[:120].reshape(4, 30, D), SAE()
    monoloss = attach(
        sae, MonoLoss(lam=1.0), latents=lambda call: call.output.latents, reduction="mean"
    )
    latents = sae(x).latents.flatten(0, 1)
    torch.testing.assert_close(monoloss(), functional.monoloss(latents, x.flatten(0, 1)))


@pytest.mark.parametrize("term", [OffSupportL1(lam=0.3), L1L2Ratio(lam=0.3)])
def test_the_regularizers_take_the_activations_before_the_selection(term, images) -> None:
    x, sae = images[:100], SAE()
    attached = attach(
        sae, term, latents=lambda call: call.output.latents, pre_acts="encoder", reduction="sum"
    )
    latents = sae(x).latents
    torch.testing.assert_close(attached(), term(sae.encoder(x), latents != 0))
    with pytest.raises(ValueError, match=f"pre_acts: {term.name} needs the activations before"):
        attach(SAE(), term, latents="encoder", reduction="sum")


def test_other_embeddings_and_the_images_of_patches(images) -> None:
    x, sae = images[:100], SAE()
    of, h = torch.arange(100) // 4, images[100:200]
    plain = attach(sae, MonoLoss(1.0, lam_units="raw"), latents="encoder", embeddings=lambda x: h)
    grouped = attach(
        sae,
        MonoLoss(1.0, lam_units="raw", name="of_images"),
        latents="encoder",
        embeddings=lambda x: Batch(x, h, images=of),
    )
    sae(x)
    latents = sae.encoder(x)
    torch.testing.assert_close(plain(), functional.monoloss(latents, h))
    torch.testing.assert_close(grouped(), functional.monoloss(latents, h, groups=of))


def train(sae: SAE, images: Tensor, attached=None, steps: int = 40, done: int = 0) -> SAE:
    optimizer = torch.optim.SGD(sae.parameters(), lr=1.0)
    for step in range(done, steps):
        x = images[torch.randperm(1500, generator=torch.Generator().manual_seed(step))[:128]]
        loss = error(sae(x), x)
        if attached is not None:
            loss = loss + attached()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sae


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_with_it_raises_the_score_of_held_out_images(images) -> None:
    scores = {}
    for lam in (0.0, 0.02):
        sae = SAE()
        loss = MonoLoss(lam=lam)
        train(sae, images, attach(sae, loss, latents="encoder.1", reduction="mean"), steps=150)
        metric = MonoScore()
        with torch.no_grad():
            metric.update(sae.encoder(images[1500:]), images[1500:])
        scores[lam] = metric.compute().mean_defined
    assert scores[0.02] > scores[0.0] + 0.02


def test_at_lam_0_and_after_removal_the_run_is_the_loops_own(images) -> None:
    plain = train(SAE(), images)
    zero, removed = SAE(), SAE()
    train(zero, images, attach(zero, MonoLoss(0.0), latents="encoder", reduction="mean"))
    attach(removed, MonoLoss(1.0), latents="encoder", reduction="mean").remove()
    assert not removed.encoder._forward_hooks
    train(removed, images)
    assert_same(plain, zero)
    assert_same(plain, removed)


def test_a_resumed_run_goes_on_with_its_schedule_and_scale(images) -> None:
    def make() -> tuple[SAE, object]:
        sae = SAE()
        loss = MonoLoss(lam=0.02)
        return sae, attach(
            sae, loss, latents="encoder", reduction="mean", warm_up_steps=30, start=5
        )

    x = images * torch.linspace(0.5, 2, len(images)).unsqueeze(1)
    sae, whole = make()
    train(sae, x, whole)
    half, first = make()
    train(half, x, first, steps=20)
    again, second = make()
    again.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    train(again, x, second, done=20)
    assert_same(sae, again)
    assert second.terms.steps == 40
    assert_same(train(SAE(), x, steps=5), train(*((s := make())[0], x, s[1]), steps=5))


@pytest.mark.parametrize("latents", ["encoder", lambda call: call.output.latents])
def test_a_module_compiled_afterwards_has_the_term(latents, images) -> None:
    x, sae = images[:64], SAE()
    monoloss = attach(sae, MonoLoss(lam=0.5), latents=latents, reduction="mean")
    compiled = torch.compile(sae, backend="eager")
    output = compiled(x)
    found = output.latents if callable(latents) else sae.encoder(x)
    torch.testing.assert_close(monoloss(), 0.5 * functional.monoloss(found, x))
    with pytest.raises(ValueError, match="module: it is compiled already"):
        attach(compiled, MonoLoss(1.0), latents="encoder", reduction="mean")


def test_a_copy_of_the_module_leaves_the_original_alone(images) -> None:
    sae = SAE()
    monoloss = attach(sae, MonoLoss(lam=0.5), latents="encoder", reduction="mean")
    sae(images[:64])
    del sae.z  # a graph's own tensor, which cannot be copied
    copied = copy.deepcopy(sae)
    with torch.no_grad():
        copied.encoder[0].weight.zero_()
    copied(images[:64])
    torch.testing.assert_close(
        monoloss(), 0.5 * functional.monoloss(sae.encoder(images[:64]), images[:64])
    )


def test_a_copy_takes_a_loss_of_its_own(images) -> None:
    x, sae = images[:64], SAE()
    monoloss = attach(sae, MonoLoss(lam=0.5), latents="encoder", reduction="mean")
    copied = copy.deepcopy(sae)
    own = attach(copied, MonoLoss(lam=2.0), latents="encoder", reduction="mean")
    copied(x)
    torch.testing.assert_close(own(), 2 * functional.monoloss(copied.encoder(x), x))
    own.remove()
    assert not copied.encoder._forward_hooks
    sae(x)
    torch.testing.assert_close(monoloss(), 0.5 * functional.monoloss(sae.encoder(x), x))


def test_validation_between_does_not_lose_the_term_of_a_step(images) -> None:
    x, sae = images[:64], SAE()
    monoloss = attach(sae, MonoLoss(lam=0.5), latents="encoder", reduction="mean")
    sae(x)
    with torch.no_grad():
        sae(images[64:128])
    sae.eval()(images[64:128])
    torch.testing.assert_close(monoloss(), 0.5 * functional.monoloss(sae.encoder(x), x))


@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpointed_module_trains_as_without_the_checkpoint(inside, images) -> None:
    """The backward pass calls it once more; with `add`, the term is computed once more too."""
    x = images[:64]

    class WithLoss(SAE):
        def forward(self, x: Tensor) -> Tensor:
            return error(super().forward(x), x)

    found = []
    for through in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        sae = WithLoss()
        add = (lambda loss, term: loss + term) if inside else None
        term = MonoLoss(lam=0.5)
        monoloss = attach(sae, term, latents="encoder", reduction="mean", add=add, warm_up_steps=4)
        for _ in range(3):
            loss = through(sae, x)
            loss = loss if inside else loss + monoloss()
            with torch.no_grad():
                sae(images[64:128])  # a validation that does not leave training mode
            grads = stepped(sae, loss)
        assert monoloss.terms.steps == 3
        found.append((loss, grads))
    torch.testing.assert_close(found[0], found[1])
    reentrant = WithLoss()
    monoloss = attach(reentrant, MonoLoss(lam=0.5), latents="encoder", reduction="mean", add=add)
    loss = checkpoint(reentrant, x.clone().requires_grad_(), use_reentrant=True)
    loss = loss if inside else loss + monoloss()
    with pytest.raises(ValueError, match="monoloss: the module runs inside a checkpoint"):
        loss.backward()


def test_the_first_argument_is_found_by_its_name(images) -> None:
    class Weighted(SAE):
        def forward(self, x: Tensor, weights: Tensor | None = None) -> Output:
            return super().forward(x)

    x, sae = images[:64], Weighted()
    monoloss = attach(sae, MonoLoss(lam=0.5), latents="encoder", reduction="mean")
    sae(weights=images[64:128], x=x)
    torch.testing.assert_close(monoloss(), 0.5 * functional.monoloss(sae.encoder(x), x))


def test_what_does_not_say_which_latents_is_an_error(images) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.relu()

    class Twice(SAE):
        def forward(self, x: Tensor) -> Output:
            super().forward(x)
            return super().forward(x)

    x = images[:64]
    sae = nn.Sequential(nn.Linear(D, M), Pair())
    attach(sae, MonoLoss(lam=0.5), latents="1", reduction="mean")
    with pytest.raises(ValueError, match="latents: the layer gave several tensors"):
        sae(x)
    twice = Twice()
    attach(twice, MonoLoss(lam=0.5), latents="encoder", reduction="mean")
    with pytest.raises(ValueError, match="latents: the layer ran 2 times in one call; say which"):
        twice(x)
    sae = SAE()
    cut = attach(
        sae, MonoLoss(0.5), latents=lambda call: call.output.latents.detach(), reduction="mean"
    )
    sae(x)
    with pytest.raises(ValueError, match="latents: they carry no gradient, so"):
        cut()


def test_a_failed_attach_leaves_nothing_behind() -> None:
    sae = SAE()
    with pytest.raises(ValueError, match="the model has no module 'nope'"):
        attach(sae, MonoLoss(0.5), latents="encoder", inputs="nope", reduction="mean")
    assert not sae.encoder._forward_hooks
    assert sae.__dict__.keys() == SAE().__dict__.keys()


def test_in_evaluation_the_term_is_zero(images) -> None:
    sae = SAE()
    monoloss = attach(sae, MonoLoss(lam=0.5), latents="encoder", reduction="mean")
    with pytest.raises(RuntimeError, match="monoloss: the module's forward was not called"):
        monoloss()
    sae.eval()(images[:64])
    assert monoloss() == 0
    assert monoloss.terms.steps == 0


def test_bad_input_is_named(images) -> None:
    sae, loss = SAE(), MonoLoss(lam=0.1)
    good = {"latents": "encoder", "reduction": "mean"}
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got the class SAE"):
        attach(SAE, loss, **good)
    with pytest.raises(ValueError, match="reduction: lam is measured against 'mse'; say how"):
        attach(sae, loss, latents="encoder")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        attach(sae, loss, latents="encoder", reduction="max")
    with pytest.raises(ValueError, match="latents: the model has no module 'encodr'"):
        attach(sae, loss, latents="encodr", reduction="mean")
    with pytest.raises(TypeError, match="latents: expected a layer, its path, or a function"):
        attach(sae, loss, latents=3, reduction="mean")
    with pytest.raises(ValueError, match="method: SAE has no method 'encod'"):
        attach(sae, loss, method="encod", **good)
    with pytest.raises(ValueError, match=r"start: 0.5 is a share of the run"):
        attach(sae, loss, start=0.5, **good)
    assert not sae.encoder._forward_hooks
    attach(sae, loss, **good)
    with pytest.raises(ValueError, match="monoloss: a term of this name is attached already"):
        attach(sae, loss, **good)
    signed = attach(
        sae, MonoLoss(0.1, name="b"), latents="encoder.0", reduction="mean", gradient_at="active"
    )
    sae(images[:9])
    signed.load_state_dict({"steps": 7, "record": {}})  # a resumed run is checked too
    with pytest.raises(ValueError, match="b: reads 0 as 'not active', but these latents are neg"):
        signed()
    whole = attach(sae, MonoLoss(0.1, name="c"), latents=lambda call: call.output, reduction="sum")
    with pytest.raises(TypeError, match="latents: expected a tensor in the call, got "):
        sae(images[:9])
    whole.remove()
    with pytest.raises(TypeError, match="target: expected a SAELens"):
        add_loss(sae, loss)

"""The sparsify adapter on sparsify's own trainer, with a small language model and real text."""

from __future__ import annotations

import copy
import importlib
import json
import logging
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sparsify
import torch
import torch.distributed as dist
from datasets import Dataset
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from monoloss_plugin import L1L2Ratio, MonoLoss, MonoScore, OffSupportL1, functional
from monoloss_plugin.adapters import sparsify as adapter
from monoloss_plugin.adapters.sparsify import add_loss, last_metrics
from monoloss_plugin.batch import Batch
from tests.pages import py_blocks

WIDTH, LATENTS, K = 32, 96, 6
BATCH, LENGTH = 8, 32

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "multi_topk": {"multi_topk": True},
    "skip": {"skip_connection": True},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
}


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "vocab_size": 128}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **layers, initializer_range=0.2)).eval()


def tokens(steps: int) -> Dataset:
    """Letters of Python's documentation, which ships with Python."""
    text = "\n".join(topics.values()).encode("ascii", "replace")[: steps * BATCH * LENGTH]
    ids = torch.tensor(list(text)).view(-1, LENGTH)
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tokens(40)


def make_trainer(
    model: GPTNeoXForCausalLM,
    data: Dataset,
    architecture: str = "topk",
    steps: int = 20,
    sae: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    options = {
        "hookpoints": ["layers.1.mlp"],
        "optimizer": "adam",
        "lr": 3e-3,
        "lr_warmup_steps": 0,
        "log_to_wandb": False,
        "save_every": 10**6,
        "save_dir": "saved",
        **options,
    }
    coder = SparseCoderConfig(
        num_latents=LATENTS, k=K, **{**ARCHITECTURES[architecture], **(sae or {})}
    )
    cfg = TrainConfig(coder, batch_size=BATCH, **options)
    return Trainer(cfg, data.select(range(steps * BATCH)), model)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, coder in trainer.saes.items()
        for key, value in coder.state_dict().items()
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Watched:
    """What a trainer gives its only SAE, and the gradients of its first step."""

    def __init__(self, trainer: Trainer) -> None:
        (self.coder,) = trainer.saes.values()
        self.given: list[dict[str, Tensor]] = []
        self.values: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        forward, step = self.coder.forward, trainer.optimizers[0].step

        def watched_forward(**given):
            self.given.append(given)
            output = forward(**given)
            self.values.append(output.fvu.detach().clone())
            return output

        def watched_step():
            if not self.gradients:
                self.parameters = {n: p.detach().clone() for n, p in self.coder.named_parameters()}
                self.gradients = {n: p.grad.clone() for n, p in self.coder.named_parameters()}
            return step()

        self.coder.forward = watched_forward
        trainer.optimizers[0].step = watched_step
        trainer.fit()


def encode_by_hand(
    coder: SparseCoder, parameters: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations before the ReLU (N, M), latents (N, M) and what is selected, all dense."""
    centred = x if coder.cfg.transcode else x - parameters["b_dec"]
    z = centred @ parameters["encoder.weight"].T + parameters["encoder.bias"]
    chosen = torch.zeros_like(z, dtype=torch.bool)
    if coder.cfg.activation == "groupmax":
        groups = z.relu().unflatten(1, (coder.cfg.k, -1))
        chosen = (
            torch.zeros_like(groups, dtype=torch.bool)
            .scatter(2, groups.max(2, keepdim=True).indices, True)
            .flatten(1)
        )
    else:
        chosen.scatter_(1, z.relu().topk(coder.cfg.k).indices, True)
    return z, z.relu() * chosen, chosen & (z > 0)


def inputs_of(trainer: Trainer, model: GPTNeoXForCausalLM, data: Dataset) -> Tensor:
    """What the only SAE reads of ten batches."""
    seen: list[Tensor] = []
    transcode = trainer.cfg.sae.transcode
    handle = model.base_model.get_submodule("layers.1.mlp").register_forward_hook(
        lambda _, given, out: seen.append(given[0] if transcode else out)
    )
    with torch.no_grad():
        model(data[: 10 * BATCH]["input_ids"])
    handle.remove()
    return seen[0].flatten(0, 1)


def encoded(trainer: Trainer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The only SAE's pre-activations, latents and selection, by hand."""
    (coder,) = trainer.saes.values()
    with torch.no_grad():
        return encode_by_hand(coder, dict(coder.named_parameters()), x)


# Training for real


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_with_monoloss_raises_the_score_of_every_architecture(architecture, model, data):
    scores = {}
    for lam in (0.0, 0.03):
        trainer = make_trainer(model, data, architecture, steps=40)
        trainer.add_loss(MonoLoss(lam=lam))
        trainer.fit()
        x = inputs_of(trainer, model, data)
        metric = MonoScore()
        metric.update(encoded(trainer, x)[1], x)
        scores[lam] = metric.compute().mean_defined
    assert scores[0.03] > scores[0.0] + 0.02


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_zero_is_bit_identical_to_the_host_s_own_training(
    architecture, optimizer, model, data
):
    trained = []
    for attach in (False, True):
        options = {"optimizer": optimizer, "auxk_alpha": 0.03, "dead_feature_threshold": 500}
        trainer = make_trainer(model, data, architecture, steps=8, **options)
        if attach:
            trainer.add_loss(MonoLoss(lam=0.0))
            trainer.add_loss(OffSupportL1(lam=0.0))
        trainer.fit()
        trained.append(weights(trainer))
    assert_same(*trained)


def test_after_remove_training_is_bit_identical_and_nothing_is_left(model, data):
    plain, cleaned = (make_trainer(model, data, steps=8) for _ in range(2))
    before = {name: set(coder.__dict__) for name, coder in cleaned.saes.items()}
    first = cleaned.add_loss(MonoLoss(lam=1.0), warm_up_steps=3)
    second = cleaned.add_loss(OffSupportL1(lam=1.0))
    first.remove()
    assert set(last_metrics(cleaned)) == {"layers.1.mlp"}
    second.remove()
    second.remove()
    assert last_metrics(cleaned) == {}
    assert {name: set(coder.__dict__) for name, coder in cleaned.saes.items()} == before
    assert cleaned.__dict__.keys() == plain.__dict__.keys()
    plain.fit()
    cleaned.fit()
    assert_same(weights(plain), weights(cleaned))
    assert not list(Path("saved").rglob("monoloss*"))


@pytest.mark.parametrize(("grad", "micro"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_the_host_s_plus_the_weighted_term(architecture, grad, micro, model, data):
    options = {"grad_acc_steps": grad, "micro_acc_steps": micro}
    plain, attached = (
        make_trainer(model, data, architecture, steps=grad, **options) for _ in range(2)
    )
    mono = MonoLoss(lam=0.5, lam_units="raw")
    penalty = OffSupportL1(lam=0.2, lam_units="raw")
    for term in (mono, penalty):
        attached.add_loss(term)
    host, ours = Watched(plain), Watched(attached)

    leaves = {name: p.requires_grad_() for name, p in host.parameters.items()}
    assert len(host.given) == grad * micro
    expected = torch.zeros(())
    for given in host.given:
        z, latents, selected = encode_by_hand(host.coder, leaves, given["x"])
        term = mono(latents, given["x"]) + penalty(z, selected)
        expected = expected + term / micro / (grad * micro)
    added = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    assert added[list(leaves).index("encoder.weight")].abs().max() > 1e-4
    for (name, gradient), more in zip(host.gradients.items(), added, strict=True):
        total = gradient if more is None else gradient + more
        torch.testing.assert_close(ours.gradients[name], total, rtol=1e-4, atol=1e-6)
    assert_same(dict(enumerate(host.values)), dict(enumerate(ours.values)))  # what the host logs


def test_zeros_that_the_selection_keeps_are_not_active_and_get_no_gradient(model, data):
    trainer = make_trainer(model, data)
    trainer.add_loss(MonoLoss(lam=0.5, lam_units="raw"))
    (coder,) = trainer.saes.values()
    coder.encoder.bias.data.fill_(-1.0)  # often fewer than k are above zero
    x = torch.randn(64, WIDTH)
    output = coder(x=x, y=x, total_variance=torch.tensor(1.0))
    assert (output.latent_acts == 0).any(1).sum() > 20
    leaves = {name: p.detach().clone().requires_grad_() for name, p in coder.named_parameters()}
    _, latents, _ = encode_by_hand(coder, leaves, x)
    term = 0.5 * functional.monoloss(latents, x)
    found = last_metrics(trainer)["layers.1.mlp"]
    assert found["monoloss"] == pytest.approx(term.item(), rel=1e-5)
    defined = ((latents > 0).sum(0) > 1).sum().item()
    assert found["monoscore_defined"] == defined
    moved = torch.autograd.grad(output.fvu, coder.encoder.bias)[0]
    coder_without = SparseCoder.forward(coder, x, x, total_variance=torch.tensor(1.0))
    moved = moved - torch.autograd.grad(coder_without.fvu, coder.encoder.bias)[0]
    by_hand = torch.autograd.grad(term, leaves["encoder.bias"])[0]
    torch.testing.assert_close(moved, by_hand, rtol=1e-4, atol=1e-5)


def test_we_allocate_nothing_of_the_size_of_samples_by_latents(model, data):
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.large = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else [out]:
                dense = isinstance(one, Tensor) and one.layout == torch.strided
                if dense and one.numel() >= 512 * LATENTS:
                    self.large.append(str(func))
            return out

    found = []
    for attach in (False, True):
        trainer = make_trainer(model, data)
        if attach:
            trainer.add_loss(MonoLoss(lam=0.5))
        (coder,) = trainer.saes.values()
        x = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(0))
        with Sizes() as sizes:
            coder(x=x, y=x, total_variance=torch.tensor(1.0)).fvu.backward()
        found.append(sizes.large)
    assert len(found[0]) > 0  # the host's own pre-activations
    assert found[0] == found[1]


def test_the_terms_act_only_in_training(model, data):
    trainer = make_trainer(model, data)
    seen = []
    trainer.add_loss(MonoLoss(lam=0.5), embeddings=lambda x: seen.append(1) or x)
    (coder,) = trainer.saes.values()
    x, one = torch.randn(64, WIDTH), torch.tensor(1.0)
    coder(x)
    coder.encode(x)
    with torch.no_grad():
        coder(x=x, y=x, total_variance=one)
    assert not seen
    copied = copy.deepcopy(coder)  # of the SAE alone, without the trainer and its model
    assert copied._monoloss_attachment.trainer() is trainer
    copied(x)
    assert not seen
    coder(x=x, y=x, total_variance=one)
    assert seen


# What lam means here


@pytest.mark.parametrize("lam_units", ["mse", "nmse", "raw"])
@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("architecture", ["topk", "transcoder"])
def test_lam_is_converted_to_the_host_s_own_loss(architecture, scale, lam_units, model, data):
    """The host's FVU, over the paper's loss of the same error on inputs of unit norm."""
    trainer = make_trainer(model, data, architecture)
    terms = (MonoLoss(lam=0.2, lam_units=lam_units), OffSupportL1(lam=0.2, lam_units=lam_units))
    for term in terms:
        trainer.add_loss(term)
    (coder,) = trainer.saes.values()
    unit = torch.nn.functional.normalize(torch.randn(256, WIDTH) + 0.5, dim=1)
    x = torch.randn(256, WIDTH) if architecture == "transcoder" else scale * unit
    y = scale * unit
    output = coder(x=x, y=y, total_variance=(y - y.mean(0)).square().sum())
    error = ((y - output.sae_out) / scale).square()
    paper = error.mean() if lam_units == "mse" else error.sum(1).mean()
    factor = 1.0 if lam_units == "raw" else (output.fvu / paper).item()
    record = adapter._Attachment.on(coder).computed.record["terms"]
    assert record["monoloss"]["factor"] == pytest.approx(factor, rel=1e-4)
    grown = 1.0 if lam_units == "raw" else scale  # a penalty that grows with the activations
    assert record["off_support_l1"]["factor"] == pytest.approx(factor / grown, rel=1e-4)


def test_the_conversion_is_logged_once_for_all_saes(model, data, caplog):
    options = {"hookpoints": ["layers.*.mlp"], "init_seeds": [0, 1]}
    trainer = make_trainer(model, data, steps=4, **options)
    trainer.add_loss(MonoLoss(lam=3e-4))
    with caplog.at_level(logging.INFO, logger="monoloss_plugin"):
        trainer.fit()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["WARNING"] + 3 * ["INFO"]
    assert "sparsify takes the squared error" in said[0][1]


@pytest.mark.parametrize(("start", "grad"), [(3, 1), (0.5, 1), (3, 2), (0.5, 2)])
def test_start_and_warm_up_count_steps_of_the_optimizer(start, grad, model, data):
    runs, seen = [], []
    for attach in (False, True):
        trainer = make_trainer(model, data, steps=6 * grad, grad_acc_steps=grad)
        if attach:
            trainer.add_loss(MonoLoss(lam=0.4, lam_units="raw"), warm_up_steps=2, start=start)
        step, path = trainer.optimizers[0].step, []

        def watched_step(step=step, path=path, trainer=trainer):
            step()
            path.append(weights(trainer))
            for found in last_metrics(trainer).values():
                seen.append(found["monoloss"] / (1 - found["monoscore"]))

        trainer.optimizers[0].step = watched_step
        trainer.fit()
        runs.append(path)
    assert seen == pytest.approx([0, 0, 0, 0, 0.2, 0.4], rel=1e-4)
    for plain, late in zip(*(run[:4] for run in runs), strict=True):
        assert_same(plain, late)
    assert not torch.equal(*(run[4]["layers.1.mlp.encoder.weight"] for run in runs))


def test_a_term_that_can_do_nothing_is_warned_of(model, data):
    trainer = make_trainer(model, data, steps=6)
    with pytest.warns(UserWarning, match="warm_up_steps=9 is longer than the 6 steps") as said:
        trainer.add_loss(MonoLoss(lam=0.1), warm_up_steps=9)
    assert said[0].filename == __file__
    trainer.fit()
    with pytest.warns(UserWarning, match=r"training has ended \(6 of 6 steps\)") as said:
        trainer.add_loss(MonoLoss(lam=0.1, name="late"))
    assert said[0].filename == __file__


def test_k_may_change_from_step_to_step(model, data):
    trainer = make_trainer(model, data, steps=4, k_decay_steps=4)
    trainer.add_loss(MonoLoss(lam=0.1))
    trainer.add_loss(OffSupportL1(lam=0.1))
    seen = Watched(trainer)
    assert seen.coder.cfg.k < 96
    assert last_metrics(trainer)["layers.1.mlp"].keys() >= {"monoloss", "off_support_l1"}


@pytest.mark.parametrize("attached", [False, True])
def test_a_step_of_the_benchmark_is_a_step_of_the_trainer(attached, monkeypatch):
    benchmark = importlib.import_module("benchmarks.hosts.sparsify")
    for name, value in {"WIDTH": 48, "LATENTS": 64, "K": 4, "LENGTH": 8}.items():
        monkeypatch.setattr(benchmark, name, value)
    steps: list[int] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda t: fit(t) or steps.append(t.global_step))
    step = benchmark.make_step(attached)
    for _ in range(3):
        step()
    assert steps == [1, 2, 3]
    assert not list(Path().iterdir())


# The host's names, logs, checkpoints


def test_one_sae_of_several_hookpoints_and_seeds(model, data):
    options = {"hookpoints": ["layers.*.mlp"], "init_seeds": [0, 1]}
    plain, attached = (make_trainer(model, data, steps=5, **options) for _ in range(2))
    handle = attached.add_loss(MonoLoss(lam=0.1), saes=["layers.1.mlp/seed1"])
    attached.add_loss(MonoLoss(lam=0.1), saes=["layers.0.mlp/seed0"])  # another SAE's own
    plain.fit()
    attached.fit()
    assert set(last_metrics(attached)) == {"layers.0.mlp/seed0", "layers.1.mlp/seed1"}
    changed = {
        name.rpartition(".encoder")[0]
        for name, value in weights(plain).items()
        if "encoder.weight" in name and not torch.equal(value, weights(attached)[name])
    }
    assert changed == {"layers.0.mlp/seed0", "layers.1.mlp/seed1"}
    handle.remove()
    assert set(last_metrics(attached)) == {"layers.0.mlp/seed0"}


def test_wandb_gets_the_terms_in_the_host_s_rows(model, data, monkeypatch):
    import wandb

    rows: dict[int, dict[str, float]] = {}
    log = lambda entries, step: rows.setdefault(step, {}).update(entries)  # noqa: E731
    monkeypatch.setattr(wandb, "log", log)
    monkeypatch.setattr(wandb, "run", "the run that init would start")
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    options = {"log_to_wandb": True, "grad_acc_steps": 2, "wandb_log_frequency": 2}
    trainer = make_trainer(model, data, steps=12, **options)
    trainer.add_loss(MonoLoss(lam=0.1))
    trainer.fit()
    keys = {f"{key}/layers.1.mlp" for key in ("fvu", "monoloss", "monoscore", "monoscore_defined")}
    assert len(rows) == 3
    assert all(keys <= row.keys() for row in rows.values())


class Stopped(Exception):  # noqa: N818
    """A run that ends at its first checkpoint."""


@pytest.mark.parametrize(
    ("sae", "grad"),
    [
        ({}, 1),
        ({}, 2),
        ({"transcode": True}, 2),
        ({"activation": "groupmax"}, 1),
        ({"multi_topk": True}, 1),
        ({"skip_connection": True}, 1),
    ],
)
def test_a_resumed_run_takes_the_path_of_an_uninterrupted_one(sae, grad, model, data):
    def fresh() -> Trainer:
        trainer = make_trainer(model, data, sae=sae, steps=20, grad_acc_steps=grad, save_every=5)
        trainer.add_loss(MonoLoss(lam=0.01), warm_up_steps=8)
        trainer.add_loss(OffSupportL1(lam=0.01))
        return trainer

    def save_and_stop() -> None:
        Trainer.save(interrupted)
        raise Stopped

    uninterrupted, interrupted, resumed = fresh(), fresh(), fresh()
    uninterrupted.fit()
    interrupted.save = save_and_stop
    with pytest.raises(Stopped):
        interrupted.fit()
    resumed.load_state("saved/unnamed")
    # The host's checkpoint does not count the last batch, and would train on it again.
    resumed.global_step += 1
    assert 0 < resumed.global_step < 20
    resumed.fit()
    assert_same(weights(uninterrupted), weights(resumed))


def test_the_saved_sae_loads_in_the_host_and_says_how_it_was_trained(model, data):
    trainer = make_trainer(model, data, steps=4, save_best=True)
    trainer.add_loss(MonoLoss(lam=3e-4))
    trainer.fit()
    trained = trainer.saes["layers.1.mlp"].state_dict()
    for folder in (Path("saved/unnamed"), Path("saved/unnamed/best/layers.1.mlp")):
        loaded = SparseCoder.load_many(str(folder), local=True, layers=["layers.1.mlp"])
        assert loaded["layers.1.mlp"].state_dict().keys() == trained.keys()
        record = json.loads((folder / "layers.1.mlp/monoloss_terms.json").read_text())
        assert record["terms"]["monoloss"]["lam"] == 3e-4
        assert record["input_variance"] > 0
    plain = make_trainer(model, data, steps=4)
    plain.load_state("saved/unnamed")  # without us


def test_a_plain_checkpoint_resumes_with_the_term(model, data):
    make_trainer(model, data, steps=4).fit()
    trainer = make_trainer(model, data, steps=8)
    trainer.add_loss(MonoLoss(lam=0.1))
    trainer.load_state("saved/unnamed")
    trainer.fit()
    assert last_metrics(trainer)["layers.1.mlp"]["monoloss"] > 0


# Several processes


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_with_distributed_modules_each_process_attaches_to_its_own(
    model, data, process_group, monkeypatch
):
    options = {"hookpoints": ["layers.*.mlp"], "distribute_modules": True}
    trainer = make_trainer(model, data, steps=4, **options)
    trainer.add_loss(MonoLoss(lam=0.1))
    trainer.fit()
    assert set(last_metrics(trainer)) == {"layers.0.mlp", "layers.1.mlp"}
    monkeypatch.setattr(Trainer, "local_hookpoints", lambda self: self.cfg.hookpoints[:1])
    first = make_trainer(model, data, steps=4, **options)
    first.add_loss(MonoLoss(lam=0.1), saes=["layers.1.mlp"])  # another process's
    assert last_metrics(first) == {}
    first.add_loss(MonoLoss(lam=0.1))
    assert set(last_metrics(first)) == {"layers.0.mlp"}


def test_a_wrapped_sae_trains_with_the_term(model, data, process_group):
    trainer = make_trainer(model, data)
    trainer.add_loss(MonoLoss(lam=0.5))
    (coder,) = trainer.saes.values()
    x, gradients = torch.randn(64, WIDTH), []
    for module in (coder, torch.nn.parallel.DistributedDataParallel(coder)):
        coder.zero_grad()
        module(x=x, y=x, total_variance=torch.tensor(1e9)).fvu.backward()
        gradients.append(coder.encoder.weight.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients)


# Regularizers, similarity spaces, bad input


@pytest.mark.parametrize("term", [OffSupportL1(lam=0.3), L1L2Ratio(lam=0.3)])
def test_regularizers_do_what_they_are_for(term, model, data):
    values = {}
    for lam in (0.0, term.lam):
        trainer = make_trainer(model, data, steps=40)
        trainer.add_loss(type(term)(lam=lam))
        trainer.fit()
        z, _, selected = encoded(trainer, inputs_of(trainer, model, data))
        values[lam] = type(term)(lam=1.0)(z, selected).item()
    assert values[term.lam] < 0.9 * values[0.0]


def test_embeddings_and_images_of_the_same_tokens(model, data):
    x = torch.randn(64, WIDTH)
    pooled, of = torch.randn(64, 5), torch.arange(64) // 4
    trainer = make_trainer(model, data)
    term = MonoLoss(lam=0.5, lam_units="raw")

    def samples_of(inputs):
        assert torch.equal(inputs, x)
        return Batch(inputs, embeddings=pooled, images=of)

    trainer.add_loss(term, embeddings=samples_of)
    trainer.add_loss(MonoLoss(lam=0.5, lam_units="raw", name="second"), embeddings=lambda _: pooled)
    (coder,) = trainer.saes.values()
    coder(x=x, y=x, total_variance=torch.tensor(1.0))
    _, latents, _ = encode_by_hand(coder, dict(coder.named_parameters()), x)
    found = last_metrics(trainer)["layers.1.mlp"]
    by_images = term(latents, pooled, images=of)
    assert found["monoloss"] == pytest.approx(by_images.item(), rel=1e-5)
    assert found["second"] == pytest.approx(term(latents, pooled).item(), rel=1e-5)
    assert found["monoloss"] != found["second"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"loss": "monoloss"}, TypeError, "loss: expected a loss term"),
        ({"warm_up_steps": -1}, ValueError, "warm_up_steps: expected"),
        ({"start": 1.5}, ValueError, "start: expected"),
        ({"embeddings": 3}, TypeError, "embeddings: expected a frozen encoder"),
        ({"saes": "layers.1.mlp"}, TypeError, "saes: expected a list of names"),
        ({"saes": ["layers.9"]}, ValueError, r"saes: expected some of \['layers.1.mlp'\]"),
        ({"saes": []}, ValueError, "saes: expected some of"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(options, error, said, model, data):
    trainer = make_trainer(model, data)
    options = {"loss": MonoLoss(lam=0.1), **options}
    before = set(trainer.__dict__), set(trainer.saes["layers.1.mlp"].__dict__)
    with pytest.raises(error, match=said):
        trainer.add_loss(**options)
    assert (set(trainer.__dict__), set(trainer.saes["layers.1.mlp"].__dict__)) == before


def test_wrong_targets_are_named(model, data):
    trainer = make_trainer(model, data)
    for target, got in (
        (Trainer, "Trainer"),
        (trainer.saes["layers.1.mlp"], "SparseCoder"),
        (model, "GPTNeoXForCausalLM"),
    ):
        for use in (lambda t: add_loss(t, MonoLoss(lam=0.1)), last_metrics):
            with pytest.raises(TypeError, match=f"trainer: expected a sparsify.Trainer, got {got}"):
                use(target)


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_losses_of_the_whole_model_are_refused(loss_fn, model, data):
    trainer = make_trainer(model, data, loss_fn=loss_fn)
    with pytest.raises(ValueError, match=f"loss_fn='{loss_fn}', which|loss_fn='{loss_fn}'"):
        trainer.add_loss(MonoLoss(lam=0.1))
    assert last_metrics(trainer) == {}


def test_a_second_term_of_the_same_name_is_refused(model, data):
    trainer = make_trainer(model, data)
    trainer.add_loss(MonoLoss(lam=0.1))
    with pytest.raises(ValueError, match="monoloss: a term of this name is attached already"):
        trainer.add_loss(MonoLoss(lam=0.2))


def test_a_version_without_the_shared_variance_is_refused(model, data, monkeypatch):
    trainer = make_trainer(model, data)
    monkeypatch.setattr(SparseCoder, "forward", lambda self, x, y=None, *, dead_mask=None: None)
    with pytest.raises(RuntimeError, match=rf"eai-sparsify {sparsify.__version__} has no Sparse"):
        trainer.add_loss(MonoLoss(lam=0.1))


@pytest.mark.filterwarnings("ignore:monoloss. warm_up_steps")  # the runs are short
def test_every_block_of_the_page_runs(model, data):
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=LATENTS, k=K),
        batch_size=BATCH,
        hookpoints=["layers.1"],
        log_to_wandb=False,
    )
    names = {"cfg": cfg, "dataset": data.select(range(4 * BATCH)), "model": model}
    blocks = py_blocks("docs/hosts/sparsify.md")
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("layers.3", "layers.1"), names)
        names["dataset"] = data.select(range(6 * BATCH))  # the resumed run goes on with two batches
    assert names["trainer"].global_step == 6

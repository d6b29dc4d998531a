"""MonoLoss in Hugging Face's own Trainer, on small real models."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from monoloss_plugin import MonoLoss, OffSupportL1
from monoloss_plugin.adapters.transformers import (
    add_loss,
    insert_mono_layer,
    load_with_mono_layer,
)
from monoloss_plugin.losses import LossTerm, TermValue
from tests.adapters.by_hand import step_by_hand
from tests.finetuning.test_mono_layer import SMALL

LAM = 0.5
LOSS = MonoLoss(lam=LAM, lam_units="raw")
ROWS = 64


def model_of(kind: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(**SMALL, num_labels=5, num_channels=1)
        model = transformers.ViTForImageClassification(config)
    else:  # whose forward takes no extra arguments, so that the host scales its loss itself
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 32], "depths": [1, 1]}
        config = transformers.ResNetConfig(**sizes, num_labels=5, num_channels=1)
        model = transformers.ResNetForImageClassification(config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # or the split of a batch would matter
                module.eval().train = lambda mode=True, own=module: own
    insert_mono_layer(model, width=48, relu=True)
    return model


@pytest.fixture(scope="module")
def data() -> datasets.Dataset:
    generator = np.random.default_rng(0)
    labels = np.arange(ROWS) % 5
    pixels = generator.normal(size=(ROWS, 1, 16, 16)) + labels[:, None, None, None]
    content = {
        "pixel_values": pixels.astype(np.float32),
        "labels": labels,
        "embeddings": generator.normal(size=(ROWS, 7)).astype(np.float32),
        "image_id": np.arange(ROWS),
    }
    return datasets.Dataset.from_dict(content).with_format("torch")


def trainer_of(model, data, folder, **options) -> Trainer:
    settings = {
        "per_device_train_batch_size": ROWS,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    more = {k: options.pop(k) for k in ("compute_loss_func", "data_collator") if k in options}
    arguments = TrainingArguments(str(folder), **(settings | options))
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, **more)


def trained_gradient(trainer) -> dict[str, torch.Tensor]:
    """What one step of plain SGD with rate 1 took away."""
    before = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
    trainer.train()
    return {k: before[k] - v.detach() for k, v in trainer.model.named_parameters()}


def expected_gradient(kind, data, micro, entropy=True) -> dict[str, torch.Tensor]:
    images, target, h = (data[name][:] for name in ("pixel_values", "labels", "embeddings"))

    def run(model):
        return model(pixel_values=images).logits

    model = model_of(kind).train()
    return step_by_hand(model, run, target, h, lam=LAM, micro=micro, entropy=entropy).gradients


def assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert any("mono.linear.weight" in key for key in found)
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 2e-5, key


@pytest.fixture
def in_order(monkeypatch):
    """Batches in the data's order, so that micro-batches are known."""

    def sequential(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    monkeypatch.setattr(Trainer, "_get_train_sampler", sequential)


def own_loss(outputs, labels, num_items_in_batch=None):
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / num_items_in_batch


SCALES = {
    "the model divides": ("vit", {}),
    "the model takes the count and ignores it": ("resnet", {}),
    "the host divides": ("vit", {"model_accepts_loss_kwargs": False}),
    "label smoothing": ("vit", {"label_smoothing_factor": 0.1}),
    "a loss function of one's own": ("vit", {"compute_loss_func": own_loss}),
}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("case", SCALES)
def test_the_term_of_a_step_is_the_mean_over_its_micro_batches(
    case, accumulation, data, in_order, tmp_path
) -> None:
    kind, options = SCALES[case]
    micro = ROWS // accumulation
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}

    def gradient(add):
        given = {k: v for k, v in options.items() if k != "model_accepts_loss_kwargs"}
        trainer = trainer_of(model_of(kind), data, tmp_path, **split, **given)
        if "model_accepts_loss_kwargs" in options:
            trainer.model_accepts_loss_kwargs = False
        if add:
            trainer.add_loss(LOSS, embeddings="embeddings")
        return trained_gradient(trainer)

    without, found = gradient(add=False), gradient(add=True)
    term = {key: found[key] - without[key] for key in found}
    assert_close(term, expected_gradient(kind, data, micro, entropy=False))


@dataclass(frozen=True)
class Spy(LossTerm):
    """Keeps the embeddings that it is given."""

    name: str = "spy"
    seen: list[torch.Tensor] = field(default_factory=list)
    lam_units: str = field(default="raw", kw_only=True)

    def compute_loss(self, step):
        self.seen.append(step.embeddings)
        return TermValue(step.latents.sum() * 0, {})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_embeddings_follow_shuffled_samples(accumulation, data, tmp_path) -> None:
    model, images = model_of(), []
    model.register_forward_pre_hook(
        lambda _, __, more: images.append(more["pixel_values"]), with_kwargs=True
    )
    means = data["pixel_values"][:].flatten(1).mean(1, keepdim=True)
    described = data.remove_columns("embeddings").add_column("embeddings", means.tolist())
    trainer = trainer_of(
        model,
        described.with_format("torch"),
        tmp_path,
        per_device_train_batch_size=9,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=True,
        max_steps=10,
    )
    spy = Spy(lam=1.0)
    trainer.add_loss(spy, embeddings="embeddings")
    trainer.train()
    assert len(spy.seen) == len(images) >= 10
    for embeddings, pixels in zip(spy.seen, images, strict=True):
        assert torch.allclose(embeddings, pixels.flatten(1).mean(1, keepdim=True), atol=1e-6)
    assert len({tuple(seen.flatten().tolist()) for seen in spy.seen}) == len(spy.seen)


def test_the_embeddings_are_never_the_models(data, tmp_path) -> None:
    model = model_of()
    forward, given = model.forward, []

    def watched(*arguments, **more):
        given.append(set(more))
        return forward(*arguments, **more)

    trainer = trainer_of(model, data, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.add_loss(LOSS, embeddings="embeddings")
    model.forward = watched
    trainer.train()
    trainer.predict(data)
    assert len(given) > 10
    assert not any("embeddings" in names for names in given)


def test_a_frozen_encoder_on_the_fly(data, in_order, tmp_path) -> None:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 7))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    trainer = trainer_of(model_of(), data.remove_columns("embeddings"), tmp_path)
    trainer.add_loss(LOSS, embeddings=encoder)
    found = trained_gradient(trainer)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        h = encoder.eval()(data["pixel_values"][:])
    described = data.remove_columns("embeddings").add_column("embeddings", h.numpy().tolist())
    assert_close(found, expected_gradient("vit", described.with_format("torch"), ROWS))


def test_logs_evaluation_and_removal(data, tmp_path) -> None:
    model = model_of()
    options = {"max_steps": 4, "logging_steps": 2, "learning_rate": 1e-3}
    trainer = trainer_of(model, data, tmp_path, eval_strategy="steps", eval_steps=2, **options)
    handle = trainer.add_loss(LOSS, embeddings="embeddings")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["monoloss"] == pytest.approx(LAM * (1 - entry["monoscore"]), rel=1e-5)
        assert 0 < entry["monoscore_defined"] <= 48
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated
    assert not any("monoscore" in entry for entry in evaluated)
    with torch.no_grad():
        logits = model.eval()(pixel_values=data["pixel_values"][:]).logits
        entropy = nn.functional.cross_entropy(logits, data["labels"][:])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(entropy.item(), rel=1e-4)
    handle.remove()
    handle.remove()
    assert not any(m._forward_hooks for m in model.modules())
    trainer.train()
    assert not any("monoscore" in entry for entry in trainer.state.log_history)


class Strict(nn.Module):
    """A model that takes what it names, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of()
        self.seen: list[torch.Tensor] = []

    def forward(self, pixel_values, labels=None):
        return self.inner(pixel_values=pixel_values, labels=labels)


def test_removed_columns_are_never_the_models(data, tmp_path) -> None:
    trainer = trainer_of(Strict(), data, tmp_path, learning_rate=1e-3, max_steps=4)
    trainer.add_loss(LOSS, embeddings="embeddings").remove()
    trainer.train()
    described = data.add_column("other", data["embeddings"][:].numpy().tolist())
    trainer = trainer_of(Strict(), described.with_format("torch"), tmp_path, max_steps=4)
    first = trainer.add_loss(LOSS, embeddings="embeddings")
    trainer.add_loss(MonoLoss(lam=0.1, lam_units="raw", name="b"), embeddings="other")

    class Remove(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            if state.global_step == 2:
                first.remove()

    trainer.add_callback(Remove())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["monoloss" in entry for entry in logged] == [True, True, False, False]
    assert all("b" in entry for entry in logged)


def test_a_trainer_that_computes_its_loss_itself(data, in_order, tmp_path) -> None:
    class Own(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None, **_):
            return model(**inputs).loss

    plain = trainer_of(model_of(), data, tmp_path)
    trainer = Own(plain.model, plain.args, train_dataset=data)
    trainer.add_loss(LOSS, embeddings="embeddings")
    assert_close(trained_gradient(trainer), expected_gradient("vit", data, ROWS))


def test_means_are_over_the_steps_that_had_the_term(data, tmp_path) -> None:
    trainer = trainer_of(model_of(), data, tmp_path, max_steps=4, logging_steps=4)
    trainer.add_loss(LOSS, embeddings="embeddings")
    late = MonoLoss(lam=0.1, lam_units="raw", name="late")

    class Add(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            if state.global_step == 2:
                trainer.add_loss(late, embeddings="embeddings")

    trainer.add_callback(Add())
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["late"] == pytest.approx(0.1 * (1 - entry["late_monoscore"]), rel=1e-5)
    assert entry["monoloss"] == pytest.approx(LAM * (1 - entry["monoscore"]), rel=1e-5)


def test_what_a_run_leaves_is_not_in_the_next_ones_log(data, tmp_path) -> None:
    trainer = trainer_of(model_of(), data, tmp_path, max_steps=3, logging_steps=2)
    trainer.add_loss(LOSS, embeddings="embeddings")
    trainer.train()
    attachment = trainer.__dict__["_monoloss_attachment"]
    assert attachment.sums
    attachment.sums = {"monoloss": (torch.tensor(100.0), 1)}
    trainer.train()
    assert trainer.state.log_history[0]["monoloss"] < 1


@pytest.mark.parametrize("latents", [None, "classifier.mono"])
def test_peft_adapters_of_any_name(latents, data, tmp_path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"])
    model = peft.get_peft_model(model_of(), config, adapter_name="mine")
    trainer = trainer_of(model, data, tmp_path, learning_rate=0.1)
    trainer.add_loss(LOSS, embeddings="embeddings", latents=latents)
    trainer.train()
    assert "monoscore" in trainer.state.log_history[0]


@pytest.mark.parametrize("late", [False, True])
def test_removed_or_before_its_start_it_leaves_the_hosts_own_run(late, data, tmp_path) -> None:
    runs = []
    for add in (False, True):
        trainer = trainer_of(model_of(), data, tmp_path, max_steps=2, learning_rate=1e-2)
        if add and late:
            trainer.add_loss(LOSS, embeddings="embeddings", start=1, warm_up_steps=1)
        elif add:
            trainer.add_loss(LOSS, embeddings="embeddings").remove()
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(runs[0][key], value) for key, value in runs[1].items())


@pytest.mark.parametrize(
    ("warm_up_steps", "start", "expected"),
    [(5, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (2, 4 / 6, [0, 0, 0, 0, 0, 0.5])],
)
def test_resume_gives_the_same_trajectory(warm_up_steps, start, expected, data, tmp_path) -> None:
    def run(folder, resume=None):
        # transformers 5.23 itself does not find a ViT's layers in its own checkpoint.
        vit = transformers.ViTForImageClassification
        trainer = trainer_of(
            load_with_mono_layer(vit, resume) if resume else model_of(),
            data,
            folder,
            max_steps=6,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=3,
        )
        schedule = {"warm_up_steps": warm_up_steps, "start": start}
        trainer.add_loss(LOSS, embeddings="embeddings", **schedule)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict(), trainer.state.log_history

    whole, log = run(tmp_path / "whole")
    resumed, again = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.allclose(whole[key], value, atol=1e-6) for key, value in resumed.items())
    logged = [entry for entry in log if "loss" in entry]
    weights = [entry["monoloss"] / (1 - entry["monoscore"]) for entry in logged]
    assert weights == pytest.approx([LAM * share for share in expected], rel=1e-4, abs=1e-7)
    for entry, other in zip(log[:6], again[:6], strict=True):
        assert other["monoloss"] == pytest.approx(entry["monoloss"], abs=1e-6)


def test_lora_as_in_the_paper(data, tmp_path) -> None:
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["query", "value", "q_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    model = peft.get_peft_model(model_of(), config)
    trainer = trainer_of(model, data, tmp_path, max_steps=3, learning_rate=0.1)
    trainer.add_loss(LOSS, embeddings="embeddings")
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    trainer.train()
    moved = {k for k, v in model.named_parameters() if not torch.equal(before[k], v)}
    assert moved
    assert all("lora_" in key or "modules_to_save" in key for key in moved)
    assert any(key.endswith("modules_to_save.default.mono.linear.weight") for key in moved)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(model_of(), tmp_path / "adapter")
    pixels = data["pixel_values"][:]
    with torch.no_grad():
        assert torch.allclose(again.eval()(pixels).logits, model.eval()(pixels).logits, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["compiled", "checkpointed", "checkpointed by reentry"],
)
def test_models_that_the_host_compiles_or_checkpoints(options, data, in_order, tmp_path) -> None:
    trainer = trainer_of(model_of(), data, tmp_path, **options)
    trainer.add_loss(LOSS, embeddings="embeddings")
    assert_close(trained_gradient(trainer), expected_gradient("vit", data, ROWS))


def test_two_terms_on_two_layers(data, tmp_path) -> None:
    model = model_of()
    trainer = trainer_of(model, data, tmp_path, max_steps=2, learning_rate=1e-2)
    first = trainer.add_loss(LOSS, embeddings="embeddings")
    second = MonoLoss(lam=0.1, lam_units="raw", name="of_logits")
    trainer.add_loss(second, embeddings="embeddings", latents="classifier")
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["of_logits"] == pytest.approx(0.1 * (1 - entry["of_logits_monoscore"]), rel=1e-5)
    assert entry["monoloss"] == pytest.approx(LAM * (1 - entry["monoscore"]), rel=1e-5)
    first.remove()
    trainer.train()
    assert "monoloss" not in trainer.state.log_history[0]
    assert "of_logits" in trainer.state.log_history[0]


def test_mixed_precision(data, tmp_path) -> None:
    trainer = trainer_of(model_of(), data, tmp_path, bf16=True, max_steps=2, learning_rate=1e-2)
    trainer.add_loss(LOSS, embeddings="embeddings")
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["monoloss"] == pytest.approx(LAM * (1 - entry["monoscore"]), rel=1e-5)
    assert torch.isfinite(next(iter(trainer.model.parameters()))).all()


def test_a_term_that_can_do_nothing_is_warned_of(data, tmp_path) -> None:
    trainer = trainer_of(model_of(), data, tmp_path)
    trainer.add_loss(LOSS, embeddings="embeddings", warm_up_steps=2)
    said = "monoloss: warm_up_steps=2 is longer than the 1 steps of training"
    with pytest.warns(UserWarning, match=said) as caught:
        trainer.train()
    assert sum("warm_up_steps" in str(one.message) for one in caught) == 1
    late = MonoLoss(lam=0.1, lam_units="raw", name="late")
    with pytest.warns(UserWarning, match="late: training has ended"):
        trainer.add_loss(late, embeddings="embeddings")
    trainer.save_model(tmp_path / "saved")
    again = load_with_mono_layer(type(trainer.model), tmp_path / "saved")
    pixels = data["pixel_values"][:]
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).logits, trainer.model.eval()(pixels).logits)


def test_what_is_wrong_is_named(data, tmp_path) -> None:
    trainer = trainer_of(model_of(), data, tmp_path)
    for arguments, error, said in (
        ((OffSupportL1(lam=1.0),), ValueError, "needs the activations before a Top-k SAE"),
        ((MonoLoss(lam=0.1),), ValueError, "lam is measured against 'mse'.*use lam_units='raw'"),
    ):
        with pytest.raises(error, match=said):
            trainer.add_loss(*arguments, embeddings="embeddings")
    with pytest.raises(TypeError, match="trainer: expected a transformers Trainer"):
        add_loss(trainer.model, LOSS, embeddings="embeddings")
    with pytest.raises(ValueError, match="has no module 'fc2'"):
        trainer.add_loss(LOSS, embeddings="embeddings", latents="fc2")
    assert "compute_loss" not in trainer.__dict__
    trainer.model_init = model_of
    with pytest.raises(ValueError, match="makes a new model when it trains"):
        trainer.add_loss(LOSS, embeddings="embeddings")
    trainer.model_init = None
    trainer.add_loss(LOSS, embeddings="embeddings")
    with pytest.raises(ValueError, match="monoloss: a term of this name is attached already"):
        trainer.add_loss(LOSS, embeddings="embeddings")

    def losing(rows):
        batch = torch.utils.data.default_collate(rows)
        return {k: v for k, v in batch.items() if k != "embeddings"}

    cases = [
        ({"data_collator": losing}, {"embeddings": "embeddings"}, "no column 'embeddings'; it has"),
        ({}, {"embeddings": "clip"}, "the batch has no column 'clip'; it has"),
        (
            {},
            {"embeddings": lambda inputs: torch.ones(3, 4)},
            "expected 64 rows, one for each sample",
        ),
        ({}, {"embeddings": "embeddings", "latents": "vit.embeddings"}, "expected one vector a"),
    ]
    for options, given, said in cases:
        trainer = trainer_of(model_of(), data, tmp_path, **options)
        trainer.add_loss(LOSS, **given)
        with pytest.raises(ValueError, match=said):
            trainer.train()
    frozen = model_of().requires_grad_(False)
    frozen.classifier.weight.requires_grad_(True)
    trainer = trainer_of(frozen, data, tmp_path)
    trainer.add_loss(LOSS, embeddings="embeddings")
    with pytest.raises(ValueError, match="its latents carry no gradient"):
        trainer.train()


SLOWLY = {"max_steps": 8, "learning_rate": 1e-2}

SCRIPT = """
import sys
import datasets, torch
from monoloss_plugin import MonoLoss
import monoloss_plugin.adapters.transformers
from tests.adapters.test_transformers import SLOWLY, LOSS, model_of, trainer_of
from tests.processes import leave_together

torch.set_num_threads(1)
data = datasets.load_from_disk(sys.argv[1]).with_format("torch")
trainer = trainer_of(model_of(), data, sys.argv[2], per_device_train_batch_size=32, **SLOWLY)
trainer.add_loss(LOSS, embeddings="embeddings", sync=True)
trainer.train()
if trainer.is_world_process_zero():
    torch.save(dict(trainer.model.state_dict()), sys.argv[2] + "/weights.pt")
    torch.save(trainer.state.log_history, sys.argv[2] + "/log.pt")
leave_together()
"""


def test_torchrun_with_sync_is_one_process_with_the_whole_batch(data, tmp_path, free_port) -> None:
    data.save_to_disk(tmp_path / "data")
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port}", str(tmp_path / "train.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "data"), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out" / "weights.pt")
    alone = trainer_of(model_of(), data, tmp_path, **SLOWLY)
    alone.add_loss(LOSS, embeddings="embeddings")
    alone.train()
    # Latents that are hardly defined must not blow the rounding of the sums up: 0.003 before they
    # were held back.
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0)
    entry = torch.load(tmp_path / "out" / "log.pt")[0]
    assert entry["monoloss"] == pytest.approx(LAM * (1 - entry["monoscore"]), rel=1e-5)

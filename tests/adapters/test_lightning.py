"""MonoLoss in a LightningModule, by a callback of Lightning's own Trainer."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from monoloss_plugin import MonoLoss
from monoloss_plugin.adapters.lightning import MonoLossCallback
from monoloss_plugin.finetuning import WithEmbeddings, insert_mono_layer
from tests.adapters.by_hand import step_by_hand

LOSS = MonoLoss(lam=0.5, lam_units="raw")
ROWS = 32


class Classifier(LightningModule):
    def __init__(self, returns="loss", manual=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        insert_mono_layer(self.model, "2", width=24, relu=True)
        self.returns = returns
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        loss = nn.functional.cross_entropy(self.model(x), y)
        return {"loss": loss, "dict": {"loss": loss}, "text": "x"}[self.returns]

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def tensors():
    generator = torch.Generator().manual_seed(1)
    x, h = (torch.randn(ROWS, width, generator=generator) for width in (6, 5))
    return x, torch.arange(ROWS) % 3, h


def loader(micro=ROWS):
    x, y, h = tensors()
    return DataLoader(WithEmbeddings(TensorDataset(x, y), h), batch_size=micro)


def trainer_of(callbacks, tmp_path, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    length = {} if "max_epochs" in options else {"max_steps": options.pop("max_steps", 1)}
    return Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=tmp_path,
        **quiet,
        **length,
        **options,
    )


def fit(module, callbacks, tmp_path, micro=ROWS) -> Trainer:
    trainer = trainer_of(callbacks, tmp_path, accumulate_grad_batches=ROWS // micro)
    trainer.fit(module, loader(micro))
    return trainer


@pytest.mark.parametrize("micro", [ROWS, 8])
@pytest.mark.parametrize("returns", ["loss", "dict"])
def test_a_step_is_the_mean_over_its_micro_batches(micro, returns, tmp_path) -> None:
    module = Classifier(returns)
    before = {k: v.detach().clone() for k, v in module.named_parameters()}
    callback = MonoLossCallback(LOSS, embeddings=lambda batch: batch[2])
    trainer = fit(module, [callback], tmp_path, micro)
    found = {k: before[k] - v.detach() for k, v in module.named_parameters()}

    x, y, h = tensors()
    by_hand = step_by_hand(Classifier(), lambda other: other.model(x), y, h, micro=micro)
    for name, gradient in by_hand.gradients.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name
    logged = trainer.callback_metrics
    assert logged["monoloss"].item() == pytest.approx(0.5 * by_hand.scores[-1].item(), rel=1e-4)
    assert logged["monoscore"].item() == pytest.approx(1 - by_hand.scores[-1].item(), rel=1e-4)


def test_the_module_is_given_back_as_it_was(tmp_path) -> None:
    module = Classifier()
    callback = MonoLossCallback(LOSS, embeddings=lambda batch: batch[2])
    trainer = fit(module, [callback], tmp_path)
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks for m in module.modules())
    trainer.validate(module, loader(), verbose=False)
    assert "monoscore" not in trainer.callback_metrics
    fit(module, [callback], tmp_path)


def test_several_callbacks_add_their_terms_and_give_the_module_back(tmp_path) -> None:
    other = MonoLoss(lam=0.1, lam_units="raw", name="of_logits")
    callbacks = [
        MonoLossCallback(LOSS, embeddings=embeddings_of),
        MonoLossCallback(other, embeddings=embeddings_of, latents="model.2"),
    ]
    module = Classifier()
    logged = fit(module, callbacks, tmp_path).callback_metrics
    assert logged["monoloss"].item() == pytest.approx(0.5 * (1 - logged["monoscore"].item()))
    assert logged["of_logits"] > 0
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks for m in module.modules())
    same = MonoLossCallback(LOSS, embeddings=embeddings_of)
    with pytest.raises(ValueError, match="monoloss: a term of this name is attached already"):
        fit(module, [callbacks[0], same], tmp_path)
    assert "training_step" not in module.__dict__


class OnlyBatch(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


def test_training_steps_of_fewer_parameters_and_of_the_instances_own(tmp_path) -> None:
    callback = MonoLossCallback(LOSS, embeddings=lambda batch: batch[2])
    assert "monoscore" in fit(OnlyBatch(), [callback], tmp_path).callback_metrics
    module, calls = Classifier(), []
    step = module.training_step

    def own(batch, batch_idx):
        calls.append(batch_idx)
        return step(batch, batch_idx)

    module.training_step = own
    assert "monoscore" in fit(module, [callback], tmp_path).callback_metrics
    assert module.__dict__["training_step"] is own
    assert calls


def embeddings_of(batch):
    return batch[2]


def test_the_callback_can_be_sent_to_other_processes() -> None:
    copied = pickle.loads(pickle.dumps(MonoLossCallback(LOSS, embeddings=embeddings_of)))
    assert isinstance(copied, MonoLossCallback)


def test_batches_that_are_dicts(tmp_path) -> None:
    x, y, h = tensors()
    rows = [{"x": a, "y": b, "clip": c} for a, b, c in zip(x, y, h, strict=True)]
    callback = MonoLossCallback(LOSS, embeddings="clip", warm_up_steps=2)
    trainer = trainer_of([callback], tmp_path, max_steps=3)
    trainer.fit(Classifier(), DataLoader(rows, batch_size=8))
    weighted, score = (trainer.callback_metrics[name].item() for name in ("monoloss", "monoscore"))
    assert weighted == pytest.approx(0.5 * (1 - score), rel=1e-5)
    missing = MonoLossCallback(LOSS, embeddings="siglip")
    with pytest.raises(ValueError, match="the batch has no column 'siglip'; it has x, y, clip"):
        trainer_of([missing], tmp_path).fit(Classifier(), DataLoader(rows, batch_size=8))


def test_resume_gives_the_same_trajectory(tmp_path) -> None:
    def run(module, checkpoint=None):
        kept = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1)
        callback = MonoLossCallback(LOSS, embeddings=lambda batch: batch[2], warm_up_steps=6)
        callbacks = [callback] if checkpoint else [callback, kept]
        trainer = trainer_of(callbacks, tmp_path, max_epochs=3)
        trainer.fit(module, loader(8), ckpt_path=checkpoint, weights_only=False)
        return module

    whole = run(Classifier())
    resumed = run(Classifier(), str(tmp_path / "step=4.ckpt"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


class Watch(Callback):
    """Notes the weight of each step."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, *_) -> None:
        logged = trainer.callback_metrics
        self.weights.append(logged["monoloss"].item() / (1 - logged["monoscore"].item()))


@pytest.mark.parametrize("start", [2, 0.25])
def test_a_term_starts_late(start, tmp_path) -> None:
    callback = MonoLossCallback(LOSS, embeddings=embeddings_of, warm_up_steps=2, start=start)
    watch = Watch()
    trainer_of([callback, watch], tmp_path, max_epochs=2).fit(Classifier(), loader(8))
    assert watch.weights == pytest.approx([0, 0, 0, 0.25, *[0.5] * 4], rel=1e-4, abs=1e-7)


def test_a_share_of_a_fit_without_an_end_is_an_error(tmp_path) -> None:
    callback = MonoLossCallback(LOSS, embeddings=embeddings_of, start=0.5)
    module = Classifier()
    with pytest.raises(ValueError, match=r"start: 0.5 is a share of the run, .* give a step"):
        trainer_of([callback], tmp_path, max_epochs=-1).fit(module, loader())
    assert "training_step" not in module.__dict__


def test_a_term_that_can_do_nothing_is_warned_of(tmp_path) -> None:
    long = MonoLossCallback(LOSS, embeddings=embeddings_of, warm_up_steps=3)
    trainer = trainer_of([long], tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match="warm_up_steps=3 is longer than the 2 steps"):
        trainer.fit(Classifier(), loader())
    with pytest.warns(UserWarning, match="fit.. ended without a training step"):
        trainer.fit(Classifier(), loader())

    class Add(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.callbacks.append(MonoLossCallback(LOSS, embeddings=embeddings_of))

    with pytest.warns(UserWarning, match="you added the callback after fit"):
        fit(Classifier(), [Add()], tmp_path)


def test_what_is_wrong_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="use lam_units='raw'"):
        MonoLossCallback(MonoLoss(lam=3e-4), embeddings="h")
    callback = MonoLossCallback(LOSS, embeddings=lambda batch: batch[2])
    with pytest.raises(ValueError, match="it optimizes manually"):
        fit(Classifier(manual=True), [callback], tmp_path)
    with pytest.raises(TypeError, match="expected a loss or a dict with one, got str"):
        fit(Classifier(returns="text"), [callback], tmp_path)
    with pytest.raises(ValueError, match="has no module 'head'"):
        fit(
            Classifier(),
            [MonoLossCallback(LOSS, embeddings=lambda b: b[2], latents="head")],
            tmp_path,
        )
    short = MonoLossCallback(LOSS, embeddings=lambda batch: batch[2][1:])
    module = Classifier()
    with pytest.raises(ValueError, match="expected 32 rows, one for each sample, got 31"):
        fit(module, [short], tmp_path)
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks for m in module.modules())

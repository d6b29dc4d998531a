"""MonoLoss in timm's own training tasks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from timm.data.mixup import Mixup
from timm.task import ClassificationTask
from torch import nn

from monoloss_plugin import MonoLoss
from monoloss_plugin.adapters.timm import insert_mono_layer, mix_with_embeddings
from monoloss_plugin.finetuning import latent_term
from tests.adapters.by_hand import ByHand, step_by_hand
from tests.finetuning.test_mono_layer import TIMM

LOSS = MonoLoss(lam=0.5, lam_units="raw")


def model_of(name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **TIMM[name])
    insert_mono_layer(model, width=48, relu=True)
    return model.train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    size = (16, 3, 16, 16)
    images = torch.randn(size, generator=generator)
    return images, torch.arange(16) % 5, torch.randn(16, 7, generator=generator)


def task_of(model) -> ClassificationTask:
    return ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)


def expected(images, target, h) -> ByHand:
    return step_by_hand(model_of(), lambda model: model(images), target, h)


def test_a_task_takes_one_line_more(batch) -> None:
    images, target, h = batch
    model = model_of()
    task = task_of(model)
    task.add_loss(LOSS)
    result = task(images, target, embeddings=h)
    result["loss"].backward()
    loss, (score,), gradients = expected(images, target, h)
    assert result["loss"].item() == pytest.approx(loss, rel=1e-6)
    assert result["monoloss"].item() == pytest.approx(0.5 * score.item(), rel=1e-5)
    assert result["monoscore"].item() == pytest.approx(1 - score.item(), rel=1e-5)
    assert torch.equal(result["output"], task_of(model_of())(images, target)["output"])
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-5), name


def test_a_frozen_encoder_sees_the_images_of_the_step(batch) -> None:
    images, target, _ = batch
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 7))
    task = task_of(model_of())
    task.add_loss(LOSS, embeddings=encoder)
    task.train()
    found = task(images, target)["monoscore"].item()
    with torch.no_grad():
        h = encoder.eval()(images)
    assert found == pytest.approx(1 - expected(images, target, h).scores.item(), rel=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any("encoder" in key for key in task.state_dict())
    arrays = task_of(model_of())
    arrays.add_loss(LOSS, embeddings=lambda images: encoder(images).numpy())
    assert arrays(images, target)["monoscore"].item() == pytest.approx(found, rel=1e-5)


def test_evaluation_checkpoints_and_removal_are_the_hosts_own(batch) -> None:
    images, target, h = batch
    plain, task = task_of(model_of()), task_of(model_of())
    handle = task.add_loss(LOSS, warm_up_steps=4)
    weighted = [task(images, target, embeddings=h)["monoloss"] for _ in range(6)]
    score = 1 - task(images, target, embeddings=h)["monoscore"].item()
    assert [w.item() / score for w in weighted] == pytest.approx(
        [0, 0.125, 0.25, 0.375, 0.5, 0.5], rel=1e-4, abs=1e-7
    )
    assert task.get_checkpoint_state().keys() == plain.get_checkpoint_state().keys()
    state, other = (t.get_checkpoint_state()["state_dict"] for t in (task, plain))
    assert state.keys() == other.keys()
    with torch.no_grad():
        assert "monoloss" not in task(images, target)
    handle.remove()
    handle.remove()
    assert set(task(images, target)) == {"loss", "output"}
    assert "forward" not in task.__dict__


def test_a_term_starts_late(batch) -> None:
    images, target, h = batch
    task = task_of(model_of())
    with pytest.raises(ValueError, match=r"start: 0.5 is a share of the run, .* give a step"):
        task.add_loss(LOSS, start=0.5)
    assert "forward" not in task.__dict__
    task.add_loss(LOSS, warm_up_steps=2, start=2)
    plain = task_of(model_of())(images, target)["loss"]
    assert torch.equal(task(images, target, embeddings=h * torch.nan)["loss"], plain)
    results = [task(images, target, embeddings=h) for _ in range(5)]
    score = 1 - results[0]["monoscore"].item()
    found = [result["monoloss"].item() / score for result in results]
    assert found == pytest.approx([0, 0, 0.25, 0.5, 0.5], rel=1e-4, abs=1e-7)


def test_copies_of_the_model_run(batch) -> None:
    images, target, h = batch
    model = model_of()
    task = task_of(model)
    task.add_loss(LOSS)
    model(images)  # what it records has a graph, and cannot be copied
    task.setup_ema()
    copied = copy.deepcopy(model).eval()
    assert copied(images).shape == (16, 5)
    result = task(images, target, embeddings=h)
    result["loss"].backward()
    task.update_ema()
    assert result["loss"].item() == pytest.approx(expected(images, target, h).loss, rel=1e-5)


def test_a_loss_added_before_compiling_is_seen(batch) -> None:
    images, target, h = batch
    task = task_of(model_of())
    task.add_loss(LOSS)
    task.compile(backend="eager")
    found = task(images, target, embeddings=h)
    assert found["loss"].item() == pytest.approx(expected(images, target, h).loss, rel=1e-5)
    late = task_of(model_of())
    late.compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled already"):
        late.add_loss(LOSS)


def test_what_is_wrong_is_named(batch) -> None:
    images, target, h = batch
    task = task_of(model_of())
    with pytest.raises(TypeError, match="expected a frozen encoder to call, got Tensor"):
        task.add_loss(LOSS, embeddings=h)
    with pytest.raises(ValueError, match="use lam_units='raw'"):
        task.add_loss(MonoLoss(lam=3e-4))
    with pytest.raises(ValueError, match="name: hosts use 'loss' in their logs"):
        task.add_loss(MonoLoss(lam=0.1, lam_units="raw", name="loss"))
    with pytest.raises(ValueError, match="the encoder shares parameters with the model"):
        task.add_loss(LOSS, embeddings=task.get_trainable_module())
    assert "forward" not in task.__dict__
    task.add_loss(LOSS)
    with pytest.raises(ValueError, match="a term of this name is attached already"):
        task.add_loss(LOSS)
    with pytest.raises(ValueError, match=r"no embeddings; call task\(images, target, embeddings="):
        task(images, target)
    with pytest.raises(ValueError, match="expected 16 rows, one for each sample, got 15"):
        task(images, target, embeddings=h[1:])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_embeddings_are_mixed_as_images_and_targets_are(kind, mode, batch) -> None:
    images, target, _ = batch
    alphas = {"mixup_alpha": 1.0, "cutmix_alpha": 0.0}
    if kind == "cutmix":
        alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}
    mixup = Mixup(**alphas, mode=mode, label_smoothing=0.1, num_classes=5)
    # Images that show their own number everywhere, and embeddings that do too.
    numbers = torch.eye(16)[:, :, None, None].expand(16, 16, 8, 8).contiguous()
    np.random.seed(3)
    mixed, soft, h = mix_with_embeddings(mixup, numbers.clone(), target, 7 * torch.eye(16))
    np.random.seed(3)
    plain_images, plain_soft = mixup(numbers.clone(), target)
    assert torch.equal(mixed, plain_images)
    assert torch.allclose(soft, plain_soft, atol=1e-6)
    # What share of an image shows which number is what its embedding is made of.
    assert torch.allclose(h, mixed.mean((2, 3)), atol=1e-5)
    assert ((h > 0.01).sum(1) == 2).any()
    assert (mixup.num_classes, mixup.label_smoothing) == (5, 0.1)
    with pytest.raises(ValueError, match=r"target: expected \(B,\) classes, got \(16, 5\)"):
        mix_with_embeddings(mixup, images, soft, torch.eye(16))
    with pytest.raises(ValueError, match="expected 16 rows, got 3"):
        mix_with_embeddings(mixup, images, target, torch.eye(3))


def test_sync_gathers_latents_and_embeddings(batch, free_port, monkeypatch) -> None:
    images, target, h = batch
    gathered = []
    monkeypatch.setattr(latent_term, "gather_rows", lambda rows: gathered.append(rows) or rows)
    address = f"tcp://127.0.0.1:{free_port}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        task = task_of(model_of())
        task.add_loss(LOSS, sync=True)
        task.prepare_distributed()
        loss = task(images, target, embeddings=h)["loss"]
    finally:
        dist.destroy_process_group()
    assert [tuple(rows.shape) for rows in gathered] == [(16, 48), (16, 7)]
    assert loss.item() == pytest.approx(expected(images, target, h).loss, rel=1e-5)

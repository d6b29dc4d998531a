"""Models that were saved with a MonoLayer come back with it."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import transformers
from timm.task import ClassificationTask
from torch import nn

import monoloss_plugin.adapters.transformers  # noqa: F401  # has from_pretrained warn
from monoloss_plugin.finetuning import MonoLayer, insert_mono_layer, load_with_mono_layer
from tests.finetuning.test_mono_layer import TIMM, logits_of, made

OPTIONS = {"width": 64, "selection": "topk", "k": 5}


def trained(name, **options):
    """A model with a layer, no weight of which is what it was at the start."""
    model, images = made(name)
    insert_mono_layer(model, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, images


@pytest.mark.parametrize("kind", ["vit", "resnet", "clip"])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "topk"])
def test_hugging_face_in_one_line(kind, options, tmp_path) -> None:
    model, images = trained(kind, **options)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = load_with_mono_layer(type(model), tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits_of(again, images), logits_of(model, images))
    assert again.config.monoloss == model.config.monoloss
    assert again.loss_type == model.loss_type
    again.save_pretrained(tmp_path / "again")
    auto = transformers.AutoModelForImageClassification
    again = load_with_mono_layer(auto, tmp_path / "again", dtype=torch.float64)
    assert again.dtype == torch.float64
    images = images.double()
    assert torch.equal(logits_of(again, images), logits_of(model.double(), images))


def test_from_pretrained_says_that_it_loses_the_layer(tmp_path) -> None:
    model, _ = trained("vit")
    model.save_pretrained(tmp_path)
    said = r"ViTForImageClassification: .*Use load_with_mono_layer\(ViTForImageClassification"
    with pytest.warns(UserWarning, match=said):
        plain = type(model).from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=said):
        insert_mono_layer(copy.deepcopy(plain))  # a new one, which is not the one that was saved
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made("vit")[0].save_pretrained(tmp_path / "plain")
        type(model).from_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"has no classifier.mono.linear.weight"):
        load_with_mono_layer(type(model), tmp_path / "lost")
    with pytest.raises(ValueError, match="was not saved with a MonoLayer"):
        load_with_mono_layer(type(model), tmp_path / "plain")


def test_timm_in_one_line(tmp_path) -> None:
    model, images = trained("resnet18", **OPTIONS)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.5)
    task.update_ema()
    optimizer = torch.optim.SGD(model.parameters())
    timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    state = timm.models.load_state_dict(str(tmp_path / "last.pth.tar"))
    plain = timm.create_model("resnet18", num_classes=10, **TIMM["resnet18"])
    again = load_with_mono_layer(plain, state)
    assert torch.equal(logits_of(again, images), logits_of(model, images))
    averaged = load_with_mono_layer(
        made("resnet18")[0], task.trainable_module_ema.module.state_dict()
    )
    assert averaged.fc.mono.options == model.fc.mono.options


def test_a_layer_of_other_options_does_not_take_the_weights() -> None:
    saved = MonoLayer(4, 8, selection="topk", k=2).state_dict()
    MonoLayer(4, 8, selection="topk", k=2).load_state_dict(saved)
    for other in ({}, {"relu": True}, {"selection": "batchtopk", "k": 2}):
        with pytest.raises(ValueError, match="state_dict: was saved from a MonoLayer with"):
            MonoLayer(4, 8, **other).load_state_dict(saved)


def test_a_checkpoint_without_the_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"checkpoint: expected one key .*, found 0"):
        load_with_mono_layer(model, model.state_dict())
    with pytest.raises(TypeError, match="checkpoint: expected a state dict for a model"):
        load_with_mono_layer(model, "a/path")

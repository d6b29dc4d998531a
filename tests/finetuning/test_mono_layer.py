"""The inserted layer, the recorder and what keeps embeddings with their samples."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import monoloss_plugin.adapters.timm as timm_adapter
import monoloss_plugin.adapters.transformers as transformers_adapter
from monoloss_plugin import MonoLoss, functional, load_features
from monoloss_plugin.finetuning import (
    LatentRecorder,
    MonoHead,
    MonoLayer,
    WithEmbeddings,
    aligned_embeddings,
    insert_mono_layer,
)

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}

TIMM = {
    "resnet18": {"channels": (8, 8, 16, 32), "layers": (1, 1, 1, 1), "stem_width": 8},
    "vit_tiny_patch16_224": {"img_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 32)},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
    },
}


def hugging_face(kind: str) -> nn.Module:
    t = transformers
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**SMALL, num_labels=10))
    if kind == "dinov2":
        return t.Dinov2ForImageClassification(t.Dinov2Config(**SMALL, mlp_ratio=1, num_labels=10))
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 32], "depths": [1, 1]}
        return t.ResNetForImageClassification(t.ResNetConfig(**sizes, num_labels=10))
    text = {"vocab_size": 20, "max_position_embeddings": 8}
    if kind == "siglip":
        config = t.SiglipConfig(text_config=SMALL | text, vision_config=SMALL, num_labels=10)
        return t.SiglipForImageClassification(config)
    config = t.CLIPConfig(text_config=SMALL | text, vision_config=SMALL, num_labels=10)
    return t.CLIPForImageClassification(config)


HUGGING_FACE = ("vit", "dinov2", "resnet", "siglip", "clip")


def logits_of(model, images):
    with torch.no_grad():
        found = model.eval()(images)
    return found if isinstance(found, torch.Tensor) else found.logits


def made(name):
    """A model and images for it."""
    torch.manual_seed(0)
    if name in TIMM:
        model = timm.create_model(name, num_classes=10, **TIMM[name])
        return model, torch.randn(4, 3, *_size(model))
    return hugging_face(name), torch.randn(4, 3, 16, 16)


def _size(model):
    size = model.pretrained_cfg["input_size"][-1]
    grid = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return grid or (min(size, 64),) * 2


@pytest.mark.parametrize("name", [*TIMM, *HUGGING_FACE])
def test_models_compute_at_first_what_they_did(name) -> None:
    model, images = made(name)
    before = logits_of(model, images)
    keys = set(model.state_dict())
    layer = insert_mono_layer(model)
    assert torch.allclose(logits_of(model, images), before, atol=1e-5)
    added = set(model.state_dict()) - keys
    new = {key.rpartition("mono.")[2] for key in added}
    assert new == {"linear.weight", "linear.bias", "_extra_state"}
    assert keys < set(model.state_dict())
    with LatentRecorder(model) as recorder:
        logits_of(model, images)
        assert recorder.take().shape == (4, layer.linear.out_features)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "vit", "resnet"])
def test_checkpoints_of_the_plain_model_fit(name, tmp_path) -> None:
    plain, images = made(name)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    model, _ = made(name)
    insert_mono_layer(model)
    found = model.load_state_dict(torch.load(tmp_path / "plain.pt"), strict=False)
    assert not found.unexpected_keys
    assert all(".mono." in key for key in found.missing_keys)
    assert torch.allclose(logits_of(model, images), logits_of(plain, images), atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "with.pt")
    again, _ = made(name)
    insert_mono_layer(again)
    again.load_state_dict(torch.load(tmp_path / "with.pt"))
    assert torch.equal(logits_of(again, images), logits_of(model, images))


class Torchvision(nn.Module):
    """Keeps its classifier as torchvision's ViT, VGG or ConvNeXt do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.features = nn.Linear(4, 32)
        setattr(self, name, nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)))

    def forward(self, x):
        return next(reversed(self._modules.values()))(self.features(x))


def test_one_function_finds_the_classifier_of_every_host() -> None:
    assert timm_adapter.insert_mono_layer is insert_mono_layer
    assert transformers_adapter.insert_mono_layer is insert_mono_layer
    for name in ("heads", "classifier"):
        model = Torchvision(name)
        insert_mono_layer(model)
        assert isinstance(model.get_submodule(f"{name}.2"), MonoHead)
    with pytest.raises(TypeError, match="got MonoHead"):
        insert_mono_layer(model)
    with pytest.raises(ValueError, match="classifier: found no linear layer in Linear"):
        insert_mono_layer(nn.Linear(2, 2))


def test_timms_own_ways_with_a_classifier_still_work() -> None:
    model, images = made("resnet18")
    insert_mono_layer(model, width=48)
    head = model.get_classifier()
    assert isinstance(head, MonoHead)
    assert head.in_features == 48
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.shape == (4, 32)
    model.reset_classifier(5)
    assert type(model.get_classifier()) is nn.Linear
    assert logits_of(model, images).shape == (4, 5)
    headless = timm.create_model("resnet18", num_classes=0, **TIMM["resnet18"])
    with pytest.raises(TypeError, match=r"expected a linear layer as 'fc'.*got Identity"):
        insert_mono_layer(headless)
    insert_mono_layer(model)
    with pytest.raises(TypeError, match="got MonoHead"):
        insert_mono_layer(model)


@pytest.mark.parametrize(
    ("options", "nonnegative", "exact"),
    [
        ({}, False, True),
        ({"width": 80}, False, True),
        ({"width": 12}, False, True),
        ({"width": 10}, False, True),
        ({"width": 9}, False, False),
        ({"relu": True}, True, True),
        ({"relu": True}, False, False),
        ({"relu": True, "width": 19}, False, False),
        ({"relu": True, "width": 20}, False, True),
        ({"relu": True, "width": 31}, False, True),
        ({"relu": True, "width": 64}, False, True),
        ({"relu": True, "width": 100}, False, True),
        ({"selection": "topk", "k": 64, "width": 64}, False, True),
        ({"selection": "topk", "k": 3, "width": 64}, False, False),
        ({"selection": "batchtopk", "k": 64, "width": 64}, False, True),
    ],
)
def test_where_the_width_allows_the_start_is_exact(options, nonnegative, exact) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 10))
    x = torch.randn(16, 32)
    x = x.abs() if nonnegative else x
    before = model(x)
    insert_mono_layer(model, "1", **options)
    assert torch.allclose(model(x), before, atol=1e-5) == exact


@pytest.mark.parametrize("width", [None, 12, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_of_other_precisions(dtype, width) -> None:
    model = nn.Sequential(nn.Linear(32, 5)).to(dtype)
    x = torch.randn(8, 32, dtype=dtype)
    before = model(x)
    layer = insert_mono_layer(model, "0", width=width)
    assert layer.linear.weight.dtype == dtype
    assert (model(x) - before).abs().max() < 0.05


def test_selections_keep_what_they_say() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    topk = MonoLayer(16, 64, selection="topk", k=5)
    plain = topk.linear(x).relu()
    latents = topk(x)
    assert torch.equal(latents[latents > 0], plain[latents > 0])
    assert ((latents > 0).sum(1) == 5).all()
    assert (latents.max(1).values == plain.max(1).values).all()
    batch = MonoLayer(16, 64, selection="batchtopk", k=5)
    kept = batch(x)
    assert int((kept > 0).sum()) == 40
    left_out = batch.linear(x).relu()[kept == 0]
    assert left_out.max() <= kept[kept > 0].min()
    assert (MonoLayer(16).gradient_at, topk.gradient_at) == ("all", "active")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 0}, "width: expected at least 1"),
        ({"selection": "top"}, "selection: expected one of"),
        ({"selection": "topk"}, "k: expected 1 to 8 with a selection"),
        ({"k": 3}, "no k without one, got 3"),
        ({"selection": "topk", "k": 9}, "got 9"),
    ],
)
def test_bad_options_are_named(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        MonoLayer(8, **options)


def test_a_plain_loop_trains_the_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    layer = insert_mono_layer(model, "2", width=24, relu=True)
    x, h = torch.randn(20, 6), torch.randn(20, 5)
    recorder, loss = LatentRecorder(model), MonoLoss(lam=0.1, lam_units="raw")
    model(x)
    found = loss(recorder.take(), h, gradient_at=recorder.gradient_at)
    found.backward()
    weight = layer.linear.weight.grad.clone()
    layer.zero_grad()
    latents = layer(torch.tanh(model[0](x)))
    expected = 0.1 * functional.monoloss(latents, h)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(weight, layer.linear.weight.grad, atol=1e-6)


def test_the_recorder_says_what_is_missing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match="expected one MonoLayer in the model, found none"):
        LatentRecorder(model)
    with pytest.raises(ValueError, match="has no module 'fc'; it has 0, 1"):
        LatentRecorder(model, "fc")
    recorder = LatentRecorder(model, "1")
    with pytest.raises(RuntimeError, match="gave no output since it was last taken"):
        recorder.take()
    model(torch.ones(2, 4))
    recorder.take()
    with pytest.raises(RuntimeError, match="gave no output"):
        recorder.take()
    model(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"expected one vector a sample \(B, M\), got \(2, 3, 4\)"):
        recorder.take()
    recorder.remove()
    model(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="gave no output"):
        recorder.take()
    with pytest.raises(ValueError, match="is compiled already"):
        LatentRecorder(torch.compile(model), "1")
    insert_mono_layer(model, "0")
    model.append(MonoLayer(4))
    with pytest.raises(ValueError, match=r"expected one MonoLayer in the model, found 0.mono, 2"):
        LatentRecorder(model)


def test_an_exact_path_counts_before_one_below_a_wrapper() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.fc = nn.Linear(4, 7)
            self.modelfc = nn.Linear(4, 5)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            self.model.fc(x), self.modelfc(x)
            return self.fc(x)

    module = Module()
    recorder = LatentRecorder(module, "fc")
    module(torch.ones(2, 4))
    assert recorder.take().shape == (2, 3)
    wrapped = LatentRecorder(nn.DataParallel(module.model), "fc")
    module.model.fc(torch.ones(2, 4))
    assert wrapped.take().shape == (2, 7)


def test_a_model_that_is_recorded_can_be_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    recorder = LatentRecorder(model, "0")
    model(torch.ones(2, 4))
    copied = copy.deepcopy(model)
    recorder.take()
    copied(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="gave no output"):
        recorder.take()


def test_embeddings_stay_with_their_samples() -> None:
    x, y = torch.arange(50.0)[:, None], torch.arange(50)
    data = WithEmbeddings(TensorDataset(x, y), torch.stack([x[:, 0], -x[:, 0]], 1))
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    seen = 0
    for images, labels, h in loader:
        assert torch.equal(h[:, 0], images[:, 0])
        assert torch.equal(h[:, 0].long(), labels)
        seen += len(h)
    assert seen == 48
    dicts = WithEmbeddings([{"a": 1}, {"a": 2}], np.eye(2, dtype=np.float32), key="h")
    assert torch.equal(dicts[1]["h"], torch.eye(2)[1])
    with pytest.raises(
        ValueError, match=r"expected \(50, d\), one row for each sample, got \(49, 2\)"
    ):
        WithEmbeddings(TensorDataset(x, y), torch.zeros(49, 2))
    with pytest.raises(ValueError, match="samples already have 'h'"):
        WithEmbeddings(dicts, torch.eye(2), key="h")[0]
    with pytest.raises(TypeError, match="samples that are tuples or dicts, got Tensor"):
        WithEmbeddings(x, torch.zeros(50, 2))[0]
    with pytest.raises(TypeError, match="embeddings: expected a floating-point tensor"):
        WithEmbeddings(TensorDataset(x, y), torch.zeros(50, 2).long())


def test_precomputed_features_are_found_by_image_id() -> None:
    features = load_features("digits", "held_out")
    ids = features.ids_of(torch.tensor([5, 3, 400]))
    found = aligned_embeddings(features, ids)
    assert torch.equal(found, features.take(torch.tensor([5, 3, 400])).float())
    with pytest.raises(ValueError, match=r"1 of 4 images have no features, such as 'x.png'"):
        aligned_embeddings(features, [*ids, "x.png"])
    assert torch.equal(aligned_embeddings(features, ids, split="held_out"), found)
    with pytest.raises(ValueError, match=r"split 'train', got features of .* \(split held_out\)"):
        aligned_embeddings(features, ids, split="train")

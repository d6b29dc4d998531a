"""Pictures from every place, against the pixels that were put there."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from sklearn.datasets import load_digits

from monoloss_plugin import load_features
from monoloss_plugin.features import FeatureSet, extract, open_source
from monoloss_plugin.features.encoders import Encoder
from monoloss_plugin.gallery.pictures import Pictures, open_pictures
from tests.hub.server import LoopbackHub

SIZES = [(6, 5), (5, 9), (7, 7), (5, 8), (7, 2)]
"""Width and height of each picture."""


def noise(number: int) -> np.ndarray[Any, Any]:
    """(H, W, 3) uint8."""
    width, height = SIZES[number % len(SIZES)]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def pixels_of(pictures: Pictures) -> list[np.ndarray[Any, Any]]:
    assert {picture.mode for picture in pictures} <= {"RGB"}
    return [np.asarray(picture) for picture in pictures]


def require_equal(pictures: Pictures, numbers: list[int]) -> None:
    found = pixels_of(pictures)
    assert len(found) == len(pictures) == len(numbers)
    for picture, number in zip(found, numbers, strict=True):
        np.testing.assert_array_equal(picture, noise(number))


def features_of(ids: list[str] | None, source: dict[str, Any] | None = None) -> FeatureSet:
    rows = torch.rand(len(ids) if ids else 5, 3)
    return FeatureSet.from_tensors(rows, ids=ids, record={"source": source or {}})


def write_folder(root: Path, count: int = 5) -> list[str]:
    """Write pictures into class folders, and return their names in order."""
    names = []
    for number in range(count):
        names.append(f"class-{number // 3}/é {number} #%&'.png")
        (root / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(number)).save(root / names[-1])
    return names


@pytest.fixture
def rgb() -> Encoder:
    """An encoder that needs no library: the mean colours of an image."""
    model = torch.nn.Flatten()
    return Encoder(
        model,
        lambda image: torch.tensor(np.asarray(image, np.float32).mean((0, 1)) / 255),
        model,
        {"name": "mean colours"},
    )


@pytest.mark.parametrize("make", [Path, str, lambda path: f"open-images:{path}"])
def test_images_of_a_folder_are_those_of_their_ids(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    names = write_folder(tmp_path / "train")
    wanted = [3, 0, 4]
    ids = [names[number] for number in wanted]
    source: dict[str, Any] = {"kind": "folder", "split": None}
    place = make(tmp_path / "train")
    if "open-images" in str(place):
        source, place = {"kind": "open-images", "split": "train"}, make(tmp_path)
        ids = [Path(name).stem for name in ids]
        require_equal(open_pictures(tmp_path, features_of(ids, source)), wanted)
    require_equal(open_pictures(place, features_of(ids, source)), wanted)


def test_the_split_of_the_features_is_taken_from_a_folder_that_has_it(tmp_path: Path) -> None:
    names = write_folder(tmp_path / "photos" / "val")
    (tmp_path / "photos" / "train" / "class-0").mkdir(parents=True)
    features = features_of(names, {"kind": "folder", "name": "photos", "split": "val"})
    for place in (tmp_path / "photos", tmp_path / "photos" / "val"):
        require_equal(open_pictures(place, features), [0, 1, 2, 3, 4])
    of_val = features_of(names, {"kind": "folder", "name": "val", "split": None})
    require_equal(open_pictures(tmp_path / "photos", of_val), [0, 1, 2, 3, 4])


def images_dataset(**columns: list[Any]) -> Dataset:
    images = [Image.fromarray(noise(number)) for number in range(5)]
    rows = Dataset.from_dict({"picture": images, **columns})
    return rows.cast_column("picture", ImageColumn())


def test_images_of_a_dataset_object_or_folder_are_those_of_their_ids(tmp_path: Path) -> None:
    rows = images_dataset(name=list("abcde"))
    source = {"kind": "dataset", "image": "picture", "image_id": "name", "split": "None"}
    features = features_of(["e", "b"], source)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows.select([0]), test=rows).save_to_disk(tmp_path / "splits")
    shuffled = rows.select([4, 2, 1, 3])
    for place in (rows, shuffled, tmp_path / "one", open_source(rows, image_id="name")):
        require_equal(open_pictures(place, features), [4, 1])
    of_test = features_of(["e", "b"], {**source, "split": "test"})
    for place in (tmp_path / "splits", DatasetDict(train=rows.select([0]), test=rows)):
        require_equal(open_pictures(place, of_test), [4, 1])


def test_ids_without_a_column_are_row_numbers_as_extraction_makes_them(
    tmp_path: Path, rgb: Encoder
) -> None:
    rows = images_dataset()
    extract(rows, rgb, tmp_path / "features", workers=0, progress=False)
    features = FeatureSet.open(tmp_path / "features").select(torch.tensor([3, 1]))
    require_equal(open_pictures(rows, features), [3, 1])


def test_rows_are_matched_when_extraction_left_an_image_out(tmp_path: Path, rgb: Encoder) -> None:
    names = write_folder(tmp_path / "photos")
    (tmp_path / "photos" / names[1]).write_bytes(b"damaged")
    extract(tmp_path / "photos", rgb, tmp_path / "features", workers=0, progress=False)
    features = FeatureSet.open(tmp_path / "features")
    pictures = open_pictures(tmp_path / "photos", features)
    require_equal(pictures, [0, 2, 3, 4])
    # The encoder says independently that each picture is that of its row.
    means = np.stack([picture.mean((0, 1)) for picture in pixels_of(pictures)]) / 255
    np.testing.assert_allclose(features.tensor().numpy(), means, atol=1e-3)
    assert pictures.name(1) == names[2]
    require_equal(open_pictures(None, features.select(torch.tensor([2, 0]))), [3, 0])


def test_features_without_ids_are_matched_by_position(tmp_path: Path) -> None:
    write_folder(tmp_path)
    require_equal(open_pictures(tmp_path, features_of(None)), [0, 1, 2, 3, 4])
    fewer = FeatureSet.from_tensors(torch.rand(3, 2))
    with pytest.raises(ValueError, match=r"images: expected 3, one for each row .* got 5"):
        open_pictures(tmp_path, fewer)


def test_a_few_missing_images_are_a_warning_and_many_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = write_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        pictures = open_pictures(tmp_path, features_of([*names, "gone.png", "lost.png"]))
    assert "2 of the 7 images of the features are missing: 'gone.png', 'lost.png'" in caplog.text
    np.testing.assert_array_equal(np.asarray(pictures[4]), noise(4))
    with pytest.raises(FileNotFoundError):
        pictures[5]
    with pytest.raises(ValueError, match=r"images: 3 of the 5 images .* not among these 5: 'x'"):
        open_pictures(tmp_path, features_of([*names[:2], "x", "y", "z"]))


def test_an_id_that_two_images_share_is_an_error_unless_the_order_is_the_same() -> None:
    rows = images_dataset(image_id=["a", "a", "b", "c", "d"])
    require_equal(open_pictures(rows, features_of(["a", "a", "b", "c", "d"])), [0, 1, 2, 3, 4])
    require_equal(open_pictures(rows, features_of(["d", "b"])), [4, 2])
    with pytest.raises(ValueError, match=r"images: 1 ids occur more than once.*'a'"):
        open_pictures(rows, features_of(["b", "a"]))


AS = {
    "uint8 HWC": lambda p: p,
    "uint8 CHW": lambda p: p.transpose(2, 0, 1),
    "float HWC": lambda p: p / 255,
    "float32 tensor CHW": lambda p: torch.tensor(p).permute(2, 0, 1) / 255,
    "uint8 tensor HWC": lambda p: torch.tensor(p),
    "uint16": lambda p: p.astype(np.uint16) * 257,
    "float16": lambda p: (p / 255).astype(np.float16),
    "RGBA": lambda p: np.dstack([p, np.full(p.shape[:2], 7, np.uint8)]),
    "PIL": Image.fromarray,
}


@pytest.mark.parametrize("kind", AS)
def test_a_list_of_pixels_of_any_size_is_taken_in_order(kind: str) -> None:
    images = [AS[kind](noise(number)) for number in range(5)]
    require_equal(open_pictures(images, features_of(list("abcde"))), [0, 1, 2, 3, 4])
    require_equal(open_pictures(tuple(images)), [0, 1, 2, 3, 4])


def test_true_and_false_are_white_and_black() -> None:
    mask = np.array([[True, False], [False, False]])
    assert np.asarray(open_pictures([mask])[0])[..., 1].tolist() == [[255, 0], [0, 0]]


def test_ambiguous_channels_are_last_in_arrays_and_first_in_tensors() -> None:
    cube = noise(2)[:3, :3]  # 3 x 3 x 3
    np.testing.assert_array_equal(np.asarray(open_pictures([cube])[0]), cube)
    tensor = torch.tensor(cube)
    found = np.asarray(open_pictures([tensor])[0])
    np.testing.assert_array_equal(found, cube.transpose(1, 2, 0))


def test_paths_and_images_may_be_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a:b.png", "http:x.png", os.fsdecode(b"not-utf8-\xff.png"), "-s p\n.png"]
    for number, name in enumerate(names):
        Image.fromarray(noise(number)).save(tmp_path / name)
    mixed = [names[0], Path(names[1]), names[2], tmp_path / names[3], noise(4)]
    pictures = open_pictures(mixed)
    require_equal(pictures, [0, 1, 2, 3, 4])
    assert pictures.name(0) == "a:b.png"
    assert len({pictures.identity(row) for row in range(5)}) == 5


@pytest.mark.parametrize("wrap", [np.asarray, torch.tensor])
def test_one_array_holds_all_images(wrap: Callable[..., Any]) -> None:
    colours = np.stack([noise(0), noise(0)[::-1]])
    for images in (colours, colours.transpose(0, 3, 1, 2)):
        found = pixels_of(open_pictures(wrap(images.copy())))
        np.testing.assert_array_equal(np.stack(found), colours)
    grey = colours[..., 0]
    for images in (grey, grey[:, None], grey[..., None], grey / 255):
        found = pixels_of(open_pictures(wrap(images.copy())))
        np.testing.assert_array_equal(np.stack(found), np.stack([grey] * 3, -1))


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        ([np.zeros((2, 2), np.uint8), 3], TypeError, r"images\[1\]: expected a path, .* got int"),
        ([np.zeros((2, 2), np.int64)], TypeError, r"images\[0\]: expected uint8.*got int64"),
        ([np.zeros((2, 5, 2), np.uint8)], ValueError, r"images\[0\]: .*got shape \(2, 5, 2\)"),
        ([np.zeros((0, 5), np.uint8)], ValueError, r"got shape \(0, 5\)"),
        ([torch.full((3, 5, 5), -2.0)], ValueError, r"images: expected floats in \[0, 1\], got -2"),
        (np.full((2, 8, 8), np.nan), ValueError, r"floats in \[0, 1\]"),
        (np.zeros((2, 8), np.uint8), ValueError, r"expected \(N, H, W\).*got shape \(2, 8\)"),
        (3, TypeError, "images: expected a folder.*got int"),
        (Image.new("L", (3, 3)), TypeError, "images: expected a folder.*got Image"),
        (None, ValueError, "images: expected images, or features"),
        ("./no such folder", FileNotFoundError, "images: no such folder"),
    ],
)
def test_what_are_no_images_is_said(images: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        open_pictures(images)


def test_a_list_of_another_length_than_the_features_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"images: expected 5, .*same order.*got 2"):
        open_pictures([noise(0), noise(1)], features_of(list("abcde")))
    with pytest.raises(TypeError, match="features: expected a FeatureSet, got Tensor"):
        open_pictures([noise(0)], torch.rand(1, 2))  # type: ignore[arg-type]


def test_pictures_are_upright_by_their_exif(tmp_path: Path) -> None:
    stored, exif = Image.fromarray(noise(1)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    stored.save(tmp_path / "turned.png", exif=exif)
    as_is = Image.open(tmp_path / "turned.png")
    for images in ([tmp_path / "turned.png"], [as_is], tmp_path):
        np.testing.assert_array_equal(open_pictures(images)[0], np.rot90(noise(1), -1))
    assert as_is.size == stored.size  # the caller's image stays as it is


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path: Path) -> None:
    grey = noise(3)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    for images in (tmp_path, [tmp_path / "grey.png"], [Image.open(tmp_path / "grey.png")]):
        np.testing.assert_array_equal(open_pictures(images)[0], np.stack([grey] * 3, -1))


def test_a_pipe_or_a_missing_file_is_refused_when_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    pictures = open_pictures([tmp_path / "pipe.png", tmp_path / "none.png", noise(0)])
    with pytest.raises(ValueError, match="not a regular file"):
        pictures[0]
    with pytest.raises(FileNotFoundError):
        pictures[1]
    np.testing.assert_array_equal(pictures[2], noise(0))
    with pytest.raises(IndexError, match="row 3 of 3 pictures"):
        pictures[3]
    with pytest.raises(IndexError, match="row -1 of 3"):
        pictures.identity(-1)


def test_a_large_jpeg_may_be_decoded_smaller_but_not_too_small(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 640 * 480 * 3).reshape(480, 640, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(tmp_path / "large.jpg", exif=exif)
    pictures = open_pictures([tmp_path / "large.jpg"])
    assert pictures[0].size == pictures.open(0, 640).size == (480, 640)
    smaller = pictures.open(0, 64)
    assert smaller.size == (120, 160)
    whole = np.asarray(pictures[0].resize(smaller.size), float)
    assert np.abs(whole - np.asarray(smaller, float)).mean() < 2


def test_the_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(0)).save(path)
    pictures = open_pictures([path, noise(0), noise(0), noise(0)[::-1], Image.fromarray(noise(0))])
    first = [pictures.identity(row) for row in range(5)]
    assert first[1] == first[2]
    assert len(set(first)) == 4
    os.utime(path, ns=(1, 1))
    assert pictures.identity(0) != first[0]


def test_images_are_found_again_beside_and_above_the_features(
    tmp_path: Path, rgb: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "photos" / "val", count=3)
    (tmp_path / "elsewhere" / "photos" / "val").mkdir(parents=True)  # same name, no images
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = open_source(tmp_path / "photos", split="val")
    extract(source, rgb, tmp_path / "features" / "val", workers=0, progress=False)
    features = FeatureSet.open(tmp_path / "features" / "val")
    require_equal(open_pictures(None, features), [0, 1, 2])
    monkeypatch.chdir(tmp_path)
    in_memory = FeatureSet.from_tensors(
        features.tensor(), ids=features.ids.to_pylist(), record=features.record
    )
    require_equal(open_pictures(None, in_memory), [0, 1, 2])
    monkeypatch.chdir(tmp_path / "photos")
    require_equal(open_pictures(None, in_memory), [0, 1, 2])


def test_images_of_the_hub_are_found_by_the_record(
    hub: LoopbackHub, tmp_path: Path, rgb: Encoder
) -> None:
    file = io.BytesIO()
    images_dataset(name=list("abcde")).to_parquet(file)
    hub.put("alice/pictures", {"data/test-00000-of-00001.parquet": file.getvalue()}, "dataset")
    commit = hub.repos["dataset", "alice/pictures"].refs["main"]
    source = open_source("alice/pictures", split="test", revision=commit, image_id="name")
    extract(source, rgb, tmp_path / "features", workers=0, progress=False)
    features = FeatureSet.open(tmp_path / "features").select(torch.tensor([4, 1]))
    hub.put("alice/pictures", {"data/test-00000-of-00001.parquet": b"replaced"}, "dataset")
    for images in (None, "alice/pictures"):
        require_equal(open_pictures(images, features), [4, 1])


def test_images_of_the_bundled_digits_are_found() -> None:
    features = load_features("digits", "held_out").select(torch.tensor([7, 3]))
    numbers = [int(Path(image_id).stem) for image_id in features.ids.to_pylist()]
    grey = (load_digits().images[numbers] / 16 * 255).round().astype(np.uint8)
    found = pixels_of(open_pictures(None, features))
    np.testing.assert_array_equal(np.stack(found), np.stack([grey] * 3, -1))


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ({}, ValueError, "the features do not say which images they come from; pass the images"),
        (
            {"kind": "folder", "name": "photos", "split": "val"},
            FileNotFoundError,
            "come from folder 'photos', split 'val', which is not in the current folder.*pass",
        ),
        ({"kind": "folder", "name": "../photos"}, FileNotFoundError, "come from folder"),
        ({"kind": "hub", "name": "../photos"}, FileNotFoundError, "come from hub"),
        ({"kind": "open-images", "name": "Open Images V7"}, FileNotFoundError, "open-images:FOL"),
        ({"kind": "hub", "name": "no/such"}, FileNotFoundError, "images: the Hub has no dataset"),
    ],
)
def test_what_is_not_found_is_said(
    source: dict[str, Any],
    error: type[Exception],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_folder(tmp_path / "photos")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(error, match=text):
        open_pictures(None, features_of(["a"], source))


def test_a_folder_of_the_same_name_with_other_images_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    features = features_of(["x.png", "y.png"], {"kind": "folder", "name": "photos"})
    with pytest.raises(FileNotFoundError, match=r"photos does not hold them .*'x.png', 'y.png'"):
        open_pictures(None, features)


def test_a_stream_is_refused(tmp_path: Path) -> None:
    stream = images_dataset(image_id=list("abcde")).to_iterable_dataset()
    with pytest.raises(TypeError, match="images: a stream has no images by number"):
        open_pictures(stream, features_of(["a"]))
    with pytest.raises(TypeError, match="images: a stream has no images by number"):
        open_pictures(stream)


def test_a_row_without_an_image_does_not_stop_the_others() -> None:
    columns = {"image": [None, Image.fromarray(noise(0))], "image_id": ["a", "b"]}
    kinds = Features({"image": ImageColumn(), "image_id": Value("string")})
    pictures = open_pictures(Dataset.from_dict(columns, features=kinds), features_of(["b", "a"]))
    np.testing.assert_array_equal(pictures[0], noise(0))
    with pytest.raises(ValueError, match="no image here"):
        pictures[1]


def test_a_list_of_files_that_moved_is_an_error(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.png" for n in range(4)]
    for file in files[:2]:
        Image.new("RGB", (4, 4)).save(file)
    assert len(open_pictures(files)) == 4  # half of them are there
    with pytest.raises(
        FileNotFoundError, match=r"images: 2 of 3 images are files that do not exist, such as /.*2"
    ):
        open_pictures(files[1:])

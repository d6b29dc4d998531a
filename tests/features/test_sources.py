"""Where images come from, and what they are called."""

from __future__ import annotations

import io
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    load_dataset,
)
from PIL import Image as PILImage

from monoloss_plugin.features.images import decode
from monoloss_plugin.features.sources import HUB_NAMES, Source, open_source
from tests.features.conftest import BAD
from tests.hub.server import Fault, LoopbackHub

NAME = "alice/digits"


def ids_of(source: Source) -> list[str]:
    return [source[i].image_id for i in range(source.num_images)]


def digits_dataset(images: list[PILImage.Image], **columns) -> Dataset:
    features = {"img": Image(), "fine_label": ClassLabel(names=list("0123456789"))}
    features |= {name: Value("string") for name in columns}
    data = {"img": images, "fine_label": [i % 10 for i in range(len(images))], **columns}
    return Dataset.from_dict(data, features=Features(features))


def test_a_folder_with_class_subfolders(image_folder: Path) -> None:
    source = open_source(image_folder)
    assert source.num_images == 153
    assert source.classes == [f"digit-{i}" for i in range(10)]
    ids = ids_of(source)
    assert ids == sorted(ids)
    assert set(ids) > BAD
    for number in range(153):
        row = source[number]
        assert source.classes[row.label] == row.image_id.split("/")[0]
        if row.image_id not in BAD:
            with PILImage.open(image_folder / row.image_id) as image:
                assert np.array_equal(
                    np.asarray(decode(row, "RGB")), np.asarray(image.convert("RGB"))
                )
    assert source.record["name"] == "images"
    assert str(image_folder.parent) not in str(source.record)


def test_a_folder_without_classes_and_a_split(image_folder: Path) -> None:
    flat = open_source(image_folder, split="digit-3")
    assert flat.classes is None
    assert flat[0].label is None
    assert all("/" not in name for name in ids_of(flat))
    shutil.copy(image_folder / "digit-3" / ids_of(flat)[0], image_folder / "top.png")
    assert open_source(image_folder).classes is None


def test_the_record_changes_with_the_files(image_folder: Path) -> None:
    before = open_source(image_folder).record
    (image_folder / "digit-4" / "004.png").rename(image_folder / "digit-4" / "renamed.png")
    after = open_source(image_folder).record
    assert before["images"] == after["images"]
    assert before["ids_sha256"] != after["ids_sha256"]


def test_columns_of_a_dataset_are_found(digit_images) -> None:
    source = open_source(digits_dataset(digit_images))
    assert (source.image, source.label, source.image_id) == ("img", "fine_label", None)
    assert source[13].label == 3
    assert source[13].image_id == "13"
    assert np.array_equal(np.asarray(decode(source[13], "L")), np.asarray(digit_images[13]))
    named = digits_dataset(digit_images, file_name=[f"d{i}.png" for i in range(60)])
    assert open_source(named)[5].image_id == "d5.png"


def test_columns_can_be_given(digit_images) -> None:
    dataset = digits_dataset(digit_images, other=[str(-i) for i in range(60)])
    dataset = dataset.add_column("second", [0] * 60).cast_column("second", ClassLabel(names=["x"]))
    source = open_source(dataset, image="img", label="second", image_id="other")
    assert source[7] == (7, source[7].image, 0, "-7")
    assert source.classes == ["x"]
    with pytest.raises(ValueError, match="label: no column 'lable'; there are fine_label, img"):
        open_source(dataset, label="lable")
    two = Dataset.from_dict({"img": digit_images[:1], "img2": digit_images[:1]})
    with pytest.raises(ValueError, match=r"found \['img', 'img2'\]"):
        open_source(two.cast(Features({"img": Image(), "img2": Image()})))
    with pytest.raises(ValueError, match="found none"):
        open_source(dataset.remove_columns("img"))


def test_labels_of_integers_and_of_strings(digit_images) -> None:
    images = digits_dataset(digit_images).remove_columns("fine_label")
    numbered = images.add_column("label", list(range(60)))
    assert open_source(numbered)[41].label == 41
    assert open_source(numbered).classes is None
    worded = images.add_column("kind", ["dog", "cat", "emu"] * 20)
    assert open_source(worded).label is None
    source = open_source(worded, label="kind")
    assert source.classes == ["cat", "dog", "emu"]
    assert [source[i].label for i in range(3)] == [1, 0, 2]
    for wrong in ([0.5] * 60, [[1]] * 60):
        with pytest.raises(ValueError, match="expected classes or integers in column 'x'"):
            open_source(images.add_column("x", wrong), label="x")


def test_a_format_of_the_dataset_is_left_aside(digit_images) -> None:
    dataset = digits_dataset(digit_images)
    plain = open_source(dataset)
    for formatted in (
        dataset.with_format("torch"),
        dataset.with_transform(lambda row: {"other": row["img"]}),
    ):
        source = open_source(formatted)
        assert source[3] == plain[3]
        assert source.record == plain.record


def test_the_record_tells_other_images_and_orders_of_equal_number(digit_images) -> None:
    dataset = digits_dataset(digit_images)
    records = [
        open_source(one).record["sample_sha256"]
        for one in (dataset, dataset.shuffle(seed=0), digits_dataset(digit_images[::-1]))
    ]
    assert len(set(records)) == 3
    assert open_source(digits_dataset(digit_images)).record["sample_sha256"] == records[0]
    streams = [open_source(one.to_iterable_dataset()) for one in (dataset, dataset.shuffle(seed=0))]
    assert streams[0].record["sample_sha256"] != streams[1].record["sample_sha256"]


def test_files_of_the_same_name_have_ids_of_their_own(image_folder: Path) -> None:
    (image_folder / "digit-0" / "x.png").write_bytes(
        (image_folder / "digit-4/004.png").read_bytes()
    )
    (image_folder / "digit-1" / "x.png").write_bytes(
        (image_folder / "digit-4/004.png").read_bytes()
    )
    loaded = load_dataset("imagefolder", data_dir=str(image_folder), split="train")
    ids = ids_of(open_source(loaded))
    assert len(set(ids)) == len(ids)
    assert sum(name.endswith(":x.png") for name in ids) == 2


def test_all_ids_are_those_of_the_rows(image_folder: Path, digit_images) -> None:
    loaded = load_dataset("imagefolder", data_dir=str(image_folder), split="train")
    named = digits_dataset(digit_images[:3], image_id=["a", None, "c"])
    shuffled = digits_dataset(digit_images).shuffle(seed=0).select(range(9))
    for place in (image_folder, loaded, named, named.select([2, 1]), shuffled):
        source = open_source(place)
        assert source.ids() == ids_of(source)
    with pytest.raises(TypeError, match="a stream does not tell its ids"):
        open_source(named.to_iterable_dataset()).ids()


def test_a_saved_dataset_and_its_splits(digit_images, tmp_path: Path) -> None:
    dataset = digits_dataset(digit_images)
    DatasetDict(train=dataset.select(range(50)), test=dataset.select(range(50, 60))).save_to_disk(
        tmp_path / "saved"
    )
    assert open_source(tmp_path / "saved", split="test").num_images == 10
    with pytest.raises(ValueError, match="expected one of train, test, got None"):
        open_source(tmp_path / "saved")


def published(hub: LoopbackHub, images: list[PILImage.Image], name: str = NAME) -> None:
    buffer = io.BytesIO()
    digits_dataset(images).to_parquet(buffer)
    hub.put(name, {"data/train-00000-of-00001.parquet": buffer.getvalue()}, "dataset")


def test_a_dataset_of_the_hub_mapped_streamed_and_from_the_cache(hub, digit_images) -> None:
    published(hub, digit_images)
    mapped = open_source(NAME, split="train")
    streamed = open_source(NAME, split="train", streaming=True)
    assert mapped.num_images == 60
    assert streamed.num_images is None
    rows = list(streamed.stream(20))
    assert [row.number for row in rows] == list(range(20, 60))
    for row in rows:
        assert row.label == mapped[row.number].label
        assert np.array_equal(np.asarray(decode(row, "L")), np.asarray(digit_images[row.number]))
    hub.faults += [Fault("GET", "/api/datasets/", "drop", 9)]
    cached = open_source(NAME, split="train")
    assert cached[7] == mapped[7]


def test_a_hub_that_cannot_be_reached_is_said_at_once(hub, monkeypatch, caplog) -> None:
    """One question, and no pages of retries."""
    (fault,) = hub.faults = [Fault("GET", "", "drop", 9)]
    with pytest.raises(ConnectionError, match=r"^source: the Hub could not be reached") as raised:
        open_source("alice/none", split="train")
    assert str(raised.value).endswith("; for a folder, write './alice/none'")
    assert fault.times == 8
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode is enabled"):
        open_source("alice/none", split="train")
    assert fault.times == 8
    assert "Retry" not in caplog.text


def test_a_mistyped_path_is_told_at_once(hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    for wrong in ("photos/2024/june", "photos/", "my photos", "fotos/*"):
        with pytest.raises(
            ValueError, match=r"^source: expected a folder, such as '\./photos', or"
        ):
            open_source(wrong)
    with pytest.raises(ValueError, match=r"for the local 'photos', write '\./photos'"):
        open_source("photos/")
    assert hub.requests == []
    with pytest.raises(FileNotFoundError, match=r"^source: .*, write '\./photos/2024'"):
        open_source("photos/2024")
    with pytest.raises(FileNotFoundError, match="source: the Hub has no dataset alice/photoz"):
        open_source("alice/photoz")
    assert len(hub.requests) == 2
    with pytest.raises(TypeError, match=r"source: expected a folder, .* got int"):
        open_source(3)


def open_images_folder(root: Path) -> None:
    ids = [f"{i:016x}" for i in range(12)]
    for number, image_id in enumerate(ids):
        place = ["train/data", "train_0", "train_f", "validation"][number // 3]
        (root / place).mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (9, 9), (number, 0, 0)).save(root / place / f"{image_id}.jpg")


def test_open_images_without_and_with_its_listing(tmp_path: Path) -> None:
    open_images_folder(tmp_path)
    name = f"open-images:{tmp_path}"
    assert ids_of(open_source(name, split="train")) == [f"{i:016x}" for i in range(9)]
    assert ids_of(open_source(name, split="validation")) == [f"{i:016x}" for i in range(9, 12)]

    listed = [8, 2, 99, 5]
    rows = "".join(f"{i:016x},train,http://example.org,0.0\n" for i in listed)
    rows += f"{1:016x},validation,http://example.org,0.0\n"
    listing = tmp_path / "train-images-boxable-with-rotation.csv"
    listing.write_text("ImageID,Subset,OriginalURL,Rotation\n" + rows)
    labels = tmp_path / "train-annotations-human-imagelabels.csv"
    labels.write_text("ImageID,Source,LabelName,Confidence\nx,verification,/m/01,1\n")
    source = open_source(name, split="train")
    assert ids_of(source) == [f"{i:016x}" for i in (8, 2, 5)]
    assert source.record["listing"] == listing.name
    assert decode(source[1], "RGB").size == (9, 9)


def test_open_images_listings_may_be_quoted_and_name_an_image_twice(tmp_path: Path) -> None:
    open_images_folder(tmp_path)
    rows = "".join(f'"{i:016x}","train"\n' for i in (2, 2, 5))
    (tmp_path / "train.csv").write_text('"ImageID","Subset"\n' + rows)
    source = open_source(f"open-images:{tmp_path}", split="train")
    assert ids_of(source) == [f"{i:016x}" for i in (2, 5)]


def test_grey_values_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(2, 0)
    PILImage.fromarray(ramp).save(tmp_path / "a.png")
    PILImage.fromarray(ramp.astype(np.int32)).save(tmp_path / "b.tiff")
    PILImage.fromarray(ramp.astype(np.float32)).save(tmp_path / "c.tiff")
    source = open_source(tmp_path)
    for number in (0, 1):
        assert np.array_equal(np.asarray(decode(source[number], "L"))[0], np.arange(256))
    with pytest.raises(ValueError, match="floating-point grey values"):
        decode(source[2], "RGB")


def test_links_that_lead_in_a_circle_and_other_files_are_left_alone(image_folder: Path) -> None:
    before = ids_of(open_source(image_folder))
    (image_folder / "digit-3" / "up").symlink_to("..")
    (image_folder / "digit-3" / "data.h5").write_bytes(b"")
    assert ids_of(open_source(image_folder)) == before


def test_folders_of_splits_are_not_taken_for_classes(image_folder: Path, caplog) -> None:
    splits = image_folder.parent / "splits"
    for split in ("train", "Test", "val2017"):
        shutil.copytree(image_folder, splits / split)
    said = r"are splits, not classes: Test, train, val2017\. .* --split Test as a command"
    with pytest.raises(ValueError, match=said):
        open_source(splits)
    (splits / "logo.png").write_bytes(b"")
    with pytest.raises(ValueError, match="are splits, not classes"):
        open_source(splits)
    assert open_source(splits, split="train").classes == [f"digit-{i}" for i in range(10)]
    assert caplog.text == ""
    shutil.copytree(image_folder / "digit-0", splits / "val" / "images")
    assert open_source(splits, split="val").classes == ["images"]
    assert (
        "is in the folder 'images', which makes one class; if it is not a class, take"
        in caplog.text
    )


@pytest.mark.skipif(os.name != "posix", reason="files of a POSIX system")
def test_what_is_no_file_or_has_no_utf8_name_is_listed_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    PILImage.new("L", (9, 9)).save(tmp_path / "cat" / "a.png")
    os.mkfifo(tmp_path / "cat" / "fifo.png")
    (tmp_path / "cat" / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "cat" / "socket.png"))
    for folder in (b"cat", b"dog-\xff"):
        os.makedirs(os.fsencode(tmp_path) + b"/" + folder, exist_ok=True)
        with open(os.fsencode(tmp_path) + b"/" + folder + b"/caf\xe9.png", "wb"):
            pass
    source = open_source(tmp_path)
    assert source.classes == ["cat", "dog-\\udcff"]
    reasons = {}
    for number in range(source.num_images):
        try:
            decode(source[number], "L")
        except ValueError as error:
            reasons[source[number].image_id] = str(error)[:30]
    other, name = "not a regular file, but a pipe", "no image here, or a file whose"
    assert reasons == {
        "cat/caf\\udce9.png": name,
        "cat/device.jpg": other,
        "cat/fifo.png": other,
        "cat/socket.png": other,
        "dog-\\udcff/caf\\udce9.png": name,
    }


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    PILImage.new("RGB", (30, 10)).save(buffer, "JPEG", exif=exif)
    dataset = Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
    source = open_source(dataset.cast_column("image", Image()))
    assert decode(source[0], "RGB").size == (10, 30)


def test_the_papers_datasets_have_short_names() -> None:
    assert set(HUB_NAMES) == {"imagenet-1k", "cifar10", "cifar100"}


@pytest.mark.parametrize("name", ["imagenet-1k", "cifar10"])
def test_a_short_name_asks_the_hub_for_its_repository(name, hub, digit_images) -> None:
    published(hub, digit_images, HUB_NAMES[name])
    commit = hub.repos["dataset", HUB_NAMES[name]].refs["main"]
    record = open_source(name, split="train", revision=commit).record
    assert (record["name"], record["revision"]) == (HUB_NAMES[name], commit)


@pytest.mark.parametrize(
    ("source", "split", "error", "said"),
    [
        ("/no/such/folder", None, FileNotFoundError, "no such folder: /no/such/folder"),
        ("~/no-such-folder", None, FileNotFoundError, "no such folder: /.*/no-such-folder"),
        ("{empty}", None, ValueError, "no image files in"),
        ("{empty}", "train", ValueError, "no folder 'train' in"),
        ("open-images:{empty}", None, ValueError, "expected one of train, validation, test"),
        ("open-images:{empty}", "test", ValueError, "no images of split 'test'"),
        ("open-images:/no/such", "test", FileNotFoundError, "no such folder: /no/such"),
    ],
)
def test_what_is_not_there_is_named(source, split, error, said, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        open_source(source.format(empty=tmp_path), split=split)


def test_a_stream_without_columns_is_refused() -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"image": 1}]))
    with pytest.raises(ValueError, match="does not name its columns"):
        open_source(stream)

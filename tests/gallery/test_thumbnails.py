"""Thumbnails: their size and pixels, and what is kept between calls."""

from __future__ import annotations

import io
import logging
import os
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from monoloss_plugin.gallery import thumbnail_cache, thumbnails
from monoloss_plugin.gallery.picture import StoredPicture
from monoloss_plugin.gallery.pictures import Pictures, open_pictures
from monoloss_plugin.gallery.thumbnail_cache import ThumbnailCache
from monoloss_plugin.gallery.thumbnails import make_thumbnails


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for what each test keeps; its file."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(thumbnail_cache, "cached_assets_path", lambda *_: folder)
    return folder / "thumbnails.sqlite3"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is decoded."""
    counts: Counter[str] = Counter()
    decode = StoredPicture.open

    def count(picture: StoredPicture, least: int | None = None) -> Image.Image:
        counts[Path(picture.row.image_id).name] += 1
        return decode(picture, least)

    monkeypatch.setattr(StoredPicture, "open", count)
    return counts


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """640 x 427 pixels."""
    return Image.fromarray(load_sample_images().images[0])


def decoded(thumbnail: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(thumbnail))
    assert picture.format == "WEBP"
    return picture.convert("RGB")


def keep(**thumbnails: bytes) -> None:
    cache = ThumbnailCache()
    for key, thumbnail in thumbnails.items():
        cache.add(key, thumbnail)
    cache.close()


def write_files(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{number} é'.png" for number in range(count)]
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    return files


@pytest.mark.parametrize("size", [48, 64, 100])
@pytest.mark.parametrize("form", ["jpg", "png", "image"])
def test_a_photograph_keeps_its_aspect_and_its_look(
    form: str, size: int, photograph: Image.Image, tmp_path: Path
) -> None:
    for turned in (False, True):
        picture = photograph.transpose(Image.Transpose.ROTATE_90) if turned else photograph
        image: Any = picture
        if form != "image":
            image = tmp_path / f"{turned}.{form}"
            picture.save(image)
        (thumbnail,) = make_thumbnails(open_pictures([image]), [0], size).values()
        found = decoded(thumbnail)
        assert max(found.size) == size
        assert abs(found.width / found.height - picture.width / picture.height) < 0.03
        # A mean over each block of pixels is another way to reduce a picture.
        means = picture.resize(found.size, Image.Resampling.BOX)
        difference = np.asarray(found, float) - np.asarray(means, float)
        assert np.abs(difference).mean() < 8  # of 255; a shift by one pixel gives 10 or more
        assert len(thumbnail) < size * size


@pytest.mark.parametrize(("width", "height"), [(8, 8), (16, 16), (5, 16), (1, 1)])
def test_small_pictures_stay_as_they_are(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    for row, thumbnail in make_thumbnails(open_pictures(list(pixels)), [1, 0]).items():
        np.testing.assert_array_equal(decoded(thumbnail), pixels[row])


def test_no_picture_is_enlarged_and_thin_ones_keep_a_pixel(photograph: Image.Image) -> None:
    images = [photograph.resize((40, 30)), photograph.resize((1000, 2))]
    found = make_thumbnails(open_pictures(images), [0, 1], 64)
    assert [decoded(found[row]).size for row in (0, 1)] == [(40, 30), (64, 1)]


def test_rows_may_be_a_tensor_in_any_order_with_repeats(tmp_path: Path) -> None:
    pictures = open_pictures(write_files(tmp_path, 5))
    found = make_thumbnails(pictures, torch.tensor([4, 1, 4]))
    assert list(found) == list(make_thumbnails(pictures, np.array([4, 1, 4]))) == [4, 1]
    for row, thumbnail in found.items():
        np.testing.assert_array_equal(decoded(thumbnail), np.asarray(pictures[row]))
    assert make_thumbnails(pictures, []) == {}


def test_a_second_call_decodes_nothing(tmp_path: Path, opened: Counter[str]) -> None:
    files = write_files(tmp_path, 7)
    first = make_thumbnails(open_pictures(files), range(7))
    assert sorted(opened.values()) == [1] * 7
    opened.clear()
    again = make_thumbnails(open_pictures(files[::-1]), range(7))
    assert not opened
    assert [again[6 - row] for row in range(7)] == [first[row] for row in range(7)]
    make_thumbnails(open_pictures(files), [2], size=5)  # another size is another thumbnail
    assert opened == {files[2].name: 1}


def test_what_was_made_before_an_interrupt_is_kept(
    tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = open_pictures(write_files(tmp_path, 6))
    with monkeypatch.context() as patch:
        save = thumbnails._make

        def interrupt(of: Pictures, size: int, row: int) -> bytes | Exception:
            if row == 4:
                raise KeyboardInterrupt
            return save(of, size, row)

        patch.setattr(thumbnails, "_make", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_thumbnails(pictures, range(6))
    opened.clear()
    make_thumbnails(pictures, range(6))
    assert set(opened) == {pictures.name(row).rpartition("/")[2] for row in (4, 5)}


def test_a_changed_file_or_way_of_making_is_made_anew(
    tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path, 3)
    make_thumbnails(open_pictures(files), range(3))
    black = Image.new("RGB", (7, 9))
    black.save(files[1])
    opened.clear()
    found = make_thumbnails(open_pictures(files), range(3))
    assert opened == {files[1].name: 1}
    assert decoded(found[1]).getextrema() == ((0, 0),) * 3
    monkeypatch.setattr(thumbnails, "_MAKING", "another")
    make_thumbnails(open_pictures(files), range(3))
    assert sum(opened.values()) == 4


def test_a_damaged_file_of_thumbnails_is_replaced(
    tmp_path: Path, kept: Path, opened: Counter[str]
) -> None:
    pictures = open_pictures(write_files(tmp_path, 30))
    first = make_thumbnails(pictures, range(30))
    whole = kept.read_bytes()
    for damaged in (b"not a database" * 100, whole[:4096] + b"\xff" * (len(whole) - 4096)):
        kept.write_bytes(damaged)
        assert make_thumbnails(pictures, range(30)) == first
        make_thumbnails(pictures, range(30))  # at the latest this one writes a sound file
        opened.clear()
        assert make_thumbnails(pictures, range(30)) == first
        assert not opened


@pytest.mark.parametrize("obstacle", ["no folder", "a folder", "read-only", "refused"])
def test_thumbnails_are_made_where_none_can_be_kept(
    obstacle: str, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = open_pictures(write_files(tmp_path, 3))
    first = make_thumbnails(pictures, range(3))
    kept.unlink()
    if obstacle == "no folder":
        kept.parent.rmdir()
    elif obstacle == "a folder":
        kept.mkdir()
    elif obstacle == "read-only":
        connect = sqlite3.connect
        sqlite3.connect(kept).execute("CREATE TABLE thumbnails (key PRIMARY KEY, content)")

        def read_only(file: Path, **options: Any) -> sqlite3.Connection:
            return connect(f"file:{file}?mode=ro", uri=True, **options)

        monkeypatch.setattr(sqlite3, "connect", read_only)
    else:

        def refuse(*_: str) -> Path:
            raise PermissionError("read-only")

        monkeypatch.setattr(thumbnail_cache, "cached_assets_path", refuse)
    assert make_thumbnails(pictures, range(3)) == first


def test_two_writers_at_once_lose_nothing(kept: Path) -> None:
    def write(part: int) -> None:
        for number in range(20):
            keep(**{f"{part} {number}": b"x"})

    with ThreadPoolExecutor() as pool:  # SQLite locks the file, whoever has it open
        list(pool.map(write, range(4)))
    every = [f"{part} {number}" for part in range(4) for number in range(20)]
    assert ThumbnailCache(kept).get([*every, "none"]) == dict.fromkeys(every, b"x")


def test_more_keys_than_one_query_takes_are_found(kept: Path) -> None:
    numbers = {str(number): b"%d" % number for number in range(1201)}
    keep(**numbers)
    assert ThumbnailCache(kept).get(list(numbers)) == numbers


def test_a_file_that_grew_too_large_is_begun_anew(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(a=b"x" * 10_000)
    assert ThumbnailCache(kept).get(["a"])
    monkeypatch.setattr(thumbnail_cache, "_LARGEST", 10_000)
    assert not ThumbnailCache(kept).get(["a"])


def test_unreadable_pictures_are_counted_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_files(tmp_path, 6)
    files[1].write_bytes(b"not an image")
    files[2].unlink()
    files[3].unlink()
    os.mkfifo(files[3])
    files[4].write_bytes(files[4].read_bytes()[:60])
    for _ in range(2):  # what cannot be read is not kept
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = make_thumbnails(open_pictures(files), range(6))
        assert [row for row in found if not found[row]] == [1, 2, 3, 4]
        (record,) = caplog.records
        assert "4 of 6 pictures cannot be read" in record.getMessage()
        assert f"{files[1]} (UnidentifiedImageError" in record.getMessage()


def test_the_progress_bar_counts_what_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = open_pictures(write_files(tmp_path, 4))
    make_thumbnails(pictures, [0])
    assert capsys.readouterr().err == ""
    make_thumbnails(pictures, range(4), progress=True)
    shown = capsys.readouterr().err
    assert "Making thumbnails" in shown
    assert "3.00/3.00" in shown


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([3],), IndexError, "rows: row 3 of 3 pictures"),
        (([-1],), IndexError, "rows: row -1 of 3"),
        (([1.0],), TypeError, "rows: expected integers, got float"),
        (("012",), TypeError, "rows: expected a list, got str"),
        (([0], 0), ValueError, "size: expected at least 1, got 0"),
        (([0], 6.4), TypeError, "size: expected an integer"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[Any, ...], error: type[Exception], text: str
) -> None:
    pictures = open_pictures(np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(error, match=text):
        make_thumbnails(pictures, *arguments)
    with pytest.raises(TypeError, match="pictures: expected Pictures, got ndarray"):
        make_thumbnails(np.zeros((3, 4, 4)), [0])  # type: ignore[arg-type]

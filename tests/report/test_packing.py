"""What lies in a page's file, read without a browser."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monoloss_plugin.report.packing import json_in_html, pack_floats, pack_integers
from monoloss_plugin.report.page import write_page
from tests.report.synthetic import make_page


class Scripts(HTMLParser):
    """The texts of a page's scripts, by id."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.policy = ""
        self._id: str | None = None
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self._id = (given.get("id") or "script") if tag == "script" else None
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])

    def handle_endtag(self, tag: str) -> None:
        self._id = None

    def handle_data(self, data: str) -> None:
        if self._id:
            self.texts[self._id] = self.texts.get(self._id, "") + data


def unpack(packed: dict[str, Any]) -> Tensor:
    array = np.frombuffer(b64decode(packed["data"]), np.dtype(packed["dtype"]).newbyteorder("<"))
    values = torch.from_numpy(array.astype("f8" if "float" in packed["dtype"] else "i8"))
    return values.reshape(packed["shape"]) + packed.get("start", 0)


def test_the_file_holds_every_number_text_and_image(tmp_path: Path) -> None:
    page = make_page(images=1100)
    path = write_page(page, tmp_path / "new folder" / "page.html")
    found = Scripts(path.read_text(encoding="utf-8"))
    assert found.policy.startswith("default-src 'none'; img-src data:;")
    assert set(found.texts) == {"data", "script", "pack-0", "pack-1"}
    data = json.loads(found.texts["data"])
    assert data["imageIds"][:4] == page.image_ids[:4]
    assert data["imageIds"][4] == r"bell\x07"
    assert unpack(data["imageLabels"]).equal(page.image_labels)
    ends = unpack(data["imageLengths"]).tolist()
    text, images = found.texts["pack-0"] + found.texts["pack-1"], []
    for length in ends:
        images.append(b64decode(text[:length]))
        text = text[length:]
    assert images == page.thumbnails
    assert text.strip() == ""
    for sae, packed in zip(page.saes, data["saes"], strict=True):
        assert packed["names"][0] == sae.names[0]  # type: ignore[index]
        for name, column in sae.columns.items():
            torch.testing.assert_close(
                unpack(packed["columns"][name]).float(),
                column.float(),
                rtol=0,
                atol=0,
                equal_nan=True,
            )
        assert unpack(packed["histogram"]).equal(sae.histogram)
        for name, (chosen, values) in sae.bands.items():
            assert unpack(packed["bands"][name][0]).equal(chosen.long())
            torch.testing.assert_close(
                unpack(packed["bands"][name][1]).float(), values, rtol=1e-3, atol=0
            )
        for given, two in ((sae.nearest, packed["nearest"]), (sae.of_images, packed["ofImages"])):
            assert unpack(two[0]).equal(given[0].long())
            torch.testing.assert_close(unpack(two[1]).float(), given[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("values", "dtype"), [([-1, 254], "uint8"), ([0, 256], "uint16"), ([-1, 65535], "uint32")]
)
def test_integers_take_the_shortest_type_that_holds_them(values: list[int], dtype: str) -> None:
    packed = pack_integers(torch.tensor(values))
    assert packed["dtype"] == dtype
    assert unpack(packed).tolist() == values
    with pytest.raises(ValueError, match="at most 32 bits"):
        pack_integers(torch.tensor([0, 2**32]))


def test_floats_are_short_only_where_it_changes_no_shown_digit() -> None:
    assert pack_floats(torch.tensor([0.1, torch.nan, -3.0]), short=True)["dtype"] == "float16"
    for value in (1e-7, 1e6):
        packed = pack_floats(torch.tensor([value]), short=True)
        assert packed["dtype"] == "float32"
        assert unpack(packed).item() == pytest.approx(value, rel=1e-7)


def test_no_text_can_end_the_element_that_holds_the_json() -> None:
    text = "</script><!-- & \u2028"
    written = json_in_html([text])
    assert "<" not in written
    assert json.loads(written) == [text]


def test_parts_of_other_images_or_saes_are_refused() -> None:
    page = make_page()
    for change, message in (
        ({"saes": []}, "saes: expected one or more"),
        ({"thumbnails": page.thumbnails[1:]}, "thumbnails: expected one for each of the 120"),
        ({"image_labels": torch.zeros(3)}, "image_labels: expected one for each of the 120"),
        (
            {"saes": page.saes[:1]},
            "matches of .*: expected one entry for each of the 1 saes, got 2",
        ),
        (
            {"saes": make_page(images=60).saes},
            "of_images of .*: expected one row for each of the 120",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(page, **change)  # type: ignore[arg-type]


def test_a_page_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="page: expected a Page, got str"):
        write_page("page", tmp_path / "page.html")  # type: ignore[arg-type]
    page = make_page()
    page.saes[0].columns["score"] = torch.full((60,), 2**40)
    with pytest.raises(ValueError, match="at most 32 bits"):
        write_page(page, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []

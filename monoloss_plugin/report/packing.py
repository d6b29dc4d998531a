"""Numbers and images as text, for a page whose script decodes them (``data.js``)."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGES_PER_PACK = 1000
BASE64 = 4 / 3
"""Characters of a text for each byte that it holds."""

_UNSIGNED = {2**8: "uint8", 2**16: "uint16", 2**32: "uint32"}
_NUMPY = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "float16": "<f2", "float32": "<f4"}
_SHORT_ERROR = 1e-3
"""The relative error that a page may show. float16 stays below it, but for tiny or huge values."""


def pack_integers(values: Tensor) -> dict[str, Any]:
    """Return integers or booleans of any shape as the shortest unsigned type.

    ``start`` is what the script adds to each, so that -1 needs no sign.

    Raises:
        ValueError: the values span more than 32 bits.
    """
    values = values.detach().cpu().long()
    start = min(0, int(values.min())) if values.numel() else 0
    largest = int(values.max()) - start if values.numel() else 0
    for limit, dtype in _UNSIGNED.items():
        if largest < limit:
            return {"start": start, **_pack(values - start, dtype)}
    raise ValueError(f"values: expected integers that span at most 32 bits, got {largest}")


def pack_floats(values: Tensor, *, short: bool = False) -> dict[str, Any]:
    """Return floats of any shape as float32.

    With ``short``, they become float16 if no value changes by more than a thousandth of itself.
    """
    values = values.detach().cpu().float()
    finite = values[values.isfinite()]
    error = (finite.half().float() - finite).abs()
    if short and bool((error <= _SHORT_ERROR * finite.abs()).all()):
        return _pack(values, "float16")
    return _pack(values, "float32")


def pack_column(values: Tensor) -> dict[str, Any]:
    """Return a column of a table: integers and booleans as such, the rest as float32."""
    return pack_floats(values) if values.is_floating_point() else pack_integers(values)


def _pack(values: Tensor, dtype: str) -> dict[str, Any]:
    data = values.contiguous().numpy().astype(_NUMPY[dtype]).tobytes()
    return {
        "dtype": dtype,
        "shape": list(values.shape),
        "data": b64encode(data).decode("ascii"),
    }


def json_in_html(content: Any) -> str:
    """Return JSON that cannot end the ``<script>`` element that it lies in.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has no word for.
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def image_packs(files: Sequence[bytes]) -> Iterator[str]:
    """Yield the images as base64, one after another, :data:`IMAGES_PER_PACK` in each text."""
    for start in range(0, len(files), IMAGES_PER_PACK):
        chunk = files[start : start + IMAGES_PER_PACK]
        yield "".join(b64encode(file).decode("ascii") for file in chunk)


def packed_lengths(files: Sequence[bytes]) -> Tensor:
    """Return how many characters each image takes in its pack: (I,) int64."""
    return torch.tensor([(len(file) + 2) // 3 * 4 for file in files], dtype=torch.int64)

"""One picture: an image file, a row of a dataset, or pixels in memory."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from monoloss_plugin._places import kind_of
from monoloss_plugin.features.images import decode, to_mode
from monoloss_plugin.features.sources import Row

_CHANNELS = (1, 3, 4)
_DTYPES = ("bool", "uint8", "uint16", "float16", "float32", "float64", "bfloat16")
_ROUNDING = 1e-3
"""How far a float may lie outside [0, 1], since a resize may overshoot."""


class Picture(Protocol):
    """A picture that can be read when it is needed."""

    def identity(self) -> str:
        """Return a checksum that changes when the picture does."""
        ...

    def open(self, least: int | None = None) -> Image.Image:
        """Return the picture in RGB, upright; see :func:`~monoloss_plugin.features.images.decode`.

        Raises:
            Exception: whatever its decoder raises on a damaged or missing file.
        """
        ...


@dataclass(frozen=True)
class StoredPicture:
    """A picture of a source: the bytes or the path of a file."""

    row: Row

    def identity(self) -> str:
        """Return a checksum of the bytes; of a file, of its path, size and time of change."""
        content, path = self.row.image["bytes"], self.row.image["path"]
        if content is not None:
            return hashlib.sha256(content).hexdigest()
        if path is None or "://" in path:  # no file on this machine
            return _checksum("path", path)
        status = os.stat(path)
        return _checksum("file", os.path.abspath(path), status.st_size, status.st_mtime_ns)

    def open(self, least: int | None = None) -> Image.Image:
        """Return the picture in RGB, upright, perhaps smaller but with ``least`` pixels."""
        return decode(self.row, "RGB", least)


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that is a PIL image already."""

    image: Image.Image

    def identity(self) -> str:
        """Return a checksum of the pixels."""
        image = ImageOps.exif_transpose(self.image)
        colours = image.getpalette() if image.mode == "P" else None
        return _checksum("image", image.mode, image.size, colours, content=image.tobytes())

    def open(self, least: int | None = None) -> Image.Image:
        """Return a copy in RGB, upright."""
        return to_mode(ImageOps.exif_transpose(self.image), "RGB")


@dataclass(frozen=True)
class PixelPicture:
    """A picture that is an array or a tensor: (H, W), (H, W, C) or (C, H, W)."""

    pixels: Any

    def identity(self) -> str:
        """Return a checksum of the values."""
        values = as_pixels(self.pixels, "the picture")
        return _checksum("pixels", values.shape, content=np.ascontiguousarray(values).tobytes())

    def open(self, least: int | None = None) -> Image.Image:
        """Return the picture in RGB.

        Raises:
            ValueError: floats are not in [0, 1].
        """
        return Image.fromarray(as_pixels(self.pixels, "the picture")).convert("RGB")


@dataclass(frozen=True)
class MissingPicture:
    """A picture of the features that the images lack."""

    def identity(self) -> str:
        """Return a checksum that no picture has."""
        return _checksum("missing")

    def open(self, least: int | None = None) -> Image.Image:
        """Raise FileNotFoundError."""
        raise FileNotFoundError("no image has this id")


def as_picture(value: Any, argument: str) -> Picture:
    """Return a path, a PIL image, an array or a tensor as a picture. Nothing is read yet.

    Raises:
        TypeError: something else, or an array of another type.
        ValueError: an array of another shape.
    """
    if isinstance(value, (str, os.PathLike)):
        # Absolute, so that no relative name such as "a:b.jpg" is taken for an address on the web.
        path = os.path.abspath(Path(value).expanduser())
        return StoredPicture(Row(0, {"bytes": None, "path": path}, None, os.fspath(value)))
    if isinstance(value, Image.Image):
        return DrawnPicture(value)
    if is_array(value):
        _require_pixels(tuple(value.shape), str(value.dtype), argument)
        return PixelPicture(value)
    raise TypeError(
        f"{argument}: expected a path, a PIL image, an array or a tensor, got {kind_of(value)}"
    )


def is_array(value: Any) -> bool:
    """Return whether something is an array or a tensor."""
    return isinstance(value, (torch.Tensor, np.ndarray))


def as_pixels(values: Any, argument: str) -> np.ndarray[Any, Any]:
    """Return an array or a tensor as uint8 pixels (H, W), (H, W, 3) or (H, W, 4).

    Where both the first and the last dimension may be the channels, they are the first of a tensor
    and the last of an array, as is usual.

    Raises:
        TypeError: neither bools, uint8, uint16 nor floats.
        ValueError: another shape, or floats that are not in [0, 1].
    """
    _require_pixels(tuple(values.shape), str(values.dtype), argument)
    channels_first = values.ndim == 3 and values.shape[0] in _CHANNELS
    if channels_first and values.shape[2] in _CHANNELS:
        channels_first = isinstance(values, torch.Tensor)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    pixels: np.ndarray[Any, Any] = np.asarray(values)
    if channels_first:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        pixels = pixels // 257
    elif pixels.dtype == np.bool_:
        pixels = pixels * 255
    else:
        least, most = float(pixels.min()), float(pixels.max())
        if not -_ROUNDING <= least <= most <= 1 + _ROUNDING:  # NaN is not either
            raise ValueError(
                f"{argument}: expected floats in [0, 1], got {least:.4g} to {most:.4g}; undo the "
                "normalisation, or give uint8"
            )
        pixels = (pixels.clip(0, 1) * 255).round()
    return pixels.astype(np.uint8)


def _require_pixels(shape: tuple[int, ...], dtype: str, argument: str) -> None:
    """Raise TypeError or ValueError for an array that holds no picture."""
    if dtype.removeprefix("torch.") not in _DTYPES:
        raise TypeError(f"{argument}: expected uint8, or floats in [0, 1], got {dtype}")
    coloured = len(shape) == 3 and (shape[0] in _CHANNELS or shape[2] in _CHANNELS)
    if not (len(shape) == 2 or coloured) or 0 in shape:
        raise ValueError(
            f"{argument}: expected pixels (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, "
            f"got shape {shape}"
        )


def _checksum(*parts: object, content: bytes = b"") -> str:
    """Return a checksum of some values and bytes."""
    digest = hashlib.sha256(repr(parts).encode(errors="surrogateescape"))
    digest.update(content)
    return digest.hexdigest()

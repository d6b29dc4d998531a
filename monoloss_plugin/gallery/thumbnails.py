"""Thumbnails of pictures: small WebP files, made by threads and kept between calls."""

from __future__ import annotations

import hashlib
import io
import logging
import operator
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from PIL import Image
from PIL.Image import Resampling

from monoloss_plugin._checks import as_list, require_at_least
from monoloss_plugin._places import kind_of
from monoloss_plugin._progress import progress_bar
from monoloss_plugin.gallery.pictures import Pictures
from monoloss_plugin.gallery.thumbnail_cache import ThumbnailCache

__all__ = ["make_thumbnails"]

logger = logging.getLogger(__name__)

PIXELATED = 32
"""Pictures of at most so many pixels are shown enlarged, pixel by pixel."""
_OPTIONS: dict[int, dict[str, Any]] = {
    16: {"lossless": True, "quality": 20, "method": 2},
    PIXELATED: {"quality": 90, "method": 4},
}
"""Options of WebP for thumbnails of at most so many pixels: errors show where they are enlarged.
More effort for so few pixels takes longer, for no fewer bytes."""
_USUAL: dict[str, Any] = {"quality": 65, "method": 4}
_MAKING = f"2 {_OPTIONS} {_USUAL}"
"""Version of how thumbnails are made. Another version finds none of those that are kept."""


def make_thumbnails(
    pictures: Pictures,
    rows: Iterable[int] | Any,
    size: int = 64,
    *,
    progress: bool = False,
    warn: bool = True,
) -> dict[int, bytes]:
    """Make thumbnails of some pictures. Those of earlier calls are kept, and found again.

    A picture's longer side becomes ``size`` pixels, unless it is shorter; it is never enlarged.
    Thumbnails of at most 16 pixels are lossless.

    Args:
        pictures: as :func:`~monoloss_plugin.gallery.pictures.open_pictures` returns them.
        rows: (n,) rows of the pictures.
        size: pixels of the longer side.
        progress: show a progress bar.
        warn: log a warning that says how many pictures cannot be read.

    Returns:
        For each row a WebP file; no bytes where a picture cannot be read.

    Raises:
        TypeError: ``pictures`` or ``rows`` are something else, or ``size`` is not an integer.
        ValueError: ``size`` is below 1.
        IndexError: there is no such row.
    """
    if not isinstance(pictures, Pictures):
        raise TypeError(f"pictures: expected Pictures, got {kind_of(pictures)}")
    require_at_least(1, size, "size")
    wanted = _rows(rows, len(pictures))
    cache, pool = ThumbnailCache(), ThreadPoolExecutor()
    try:
        keys = dict(zip(wanted, pool.map(partial(_key, pictures, size), wanted), strict=True))
        kept = cache.get([key for key in keys.values() if key is not None])
        found = {row: kept[key] for row, key in keys.items() if key in kept}
        left = [row for row in wanted if row not in found]
        made = pool.map(partial(_make, pictures, size), left)
        errors = {}
        with progress_bar("Making thumbnails", len(left), progress and bool(left)) as advance:
            for row, thumbnail in zip(left, made, strict=True):
                advance(1)
                if isinstance(thumbnail, Exception):
                    errors[row], found[row] = thumbnail, b""
                    continue
                found[row] = thumbnail
                if (key := keys[row]) is not None:
                    cache.add(key, thumbnail)
    finally:  # after an interrupt too
        pool.shutdown(cancel_futures=True)
        cache.close()
    for row, error in list(errors.items())[: int(warn)]:
        logger.warning(
            "%d of %d pictures cannot be read; the first is %s (%s: %s)",
            *(len(errors), len(wanted), pictures.name(row), type(error).__name__, error),
        )
    return {row: found[row] for row in wanted}


def is_pixelated(thumbnails: Iterable[bytes]) -> bool:
    """Return whether thumbnails have a few pixels only, by the first 64 that can be read."""
    looked_at = list(islice(filter(None, thumbnails), 64))
    return bool(looked_at) and all(_longer_side(one) <= PIXELATED for one in looked_at)


def _longer_side(thumbnail: bytes) -> int:
    with Image.open(io.BytesIO(thumbnail)) as image:
        longer: int = max(image.size)
        return longer


def _rows(rows: Any, num_pictures: int) -> list[int]:
    """Return row numbers without repeats, checked."""
    numbers: dict[int, None] = {}
    for row in as_list(rows, "rows"):
        if not hasattr(row, "__index__"):
            raise TypeError(f"rows: expected integers, got {kind_of(row)}")
        if not 0 <= row < num_pictures:
            raise IndexError(f"rows: row {row} of {num_pictures} pictures")
        numbers[operator.index(row)] = None
    return list(numbers)


def _key(pictures: Pictures, size: int, row: int) -> str | None:
    """Return the name of a thumbnail in the cache; None for a picture that cannot be found."""
    try:
        identity = pictures.identity(row)
    except Exception:  # _make meets the same, and says so
        return None
    return hashlib.sha256(f"{identity} {size} {_MAKING}".encode()).hexdigest()


def _make(pictures: Pictures, size: int, row: int) -> bytes | Exception:
    """Return a thumbnail, or what went wrong."""
    try:
        picture = pictures.open(row, size)
        picture.thumbnail((size, size), Resampling.LANCZOS)
        file = io.BytesIO()
        longer = max(picture.size)
        options = next((of for most, of in _OPTIONS.items() if longer <= most), _USUAL)
        picture.save(file, "WEBP", **options)
        return file.getvalue()
    except Exception as error:  # a decoder may raise anything on a damaged file
        return error

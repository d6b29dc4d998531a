"""The pictures of the rows of a feature set, from wherever its images are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from monoloss_plugin._optional import missing_extra

try:
    from PIL import Image

    from monoloss_plugin.features import FeatureSet
    from monoloss_plugin.features.feature_set import require_set
    from monoloss_plugin.features.sources import Source
    from monoloss_plugin.gallery.finding import DIGITS, find_source, open_place
    from monoloss_plugin.gallery.matching import ids_of_all, match_by_id, require_as_many
    from monoloss_plugin.gallery.picture import (
        MissingPicture,
        Picture,
        PixelPicture,
        StoredPicture,
        as_picture,
        as_pixels,
        is_array,
    )
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

__all__ = ["Pictures", "open_pictures"]


@dataclass(frozen=True)
class Pictures:
    """N pictures, which are read one by one when they are needed.

    ``pictures[row]`` is a PIL image in RGB, turned upright by its EXIF. Threads may share this.
    """

    num_pictures: int
    """N."""
    find: Callable[[int], Picture]
    """Gives the picture of a row from 0 to N - 1, not read yet."""
    names: Sequence[str] | None = None
    """(N,) ids of the features; None if they have no ids."""

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, row: int) -> Image.Image:
        return self.open(row)

    def open(self, row: int, size: int | None = None) -> Image.Image:
        """Return a picture in RGB, upright.

        Args:
            row: from 0 to N - 1.
            size: a smaller picture will do, with at least this many pixels on its longer side. This
                makes reading large JPEG files faster.

        Raises:
            IndexError: there is no such row.
            Exception: whatever a decoder raises on a damaged or missing file.
        """
        return self._picture(row).open(size)

    def identity(self, row: int) -> str:
        """Return a checksum of the picture: of a file's path, size and time of change, or of bytes.

        Raises:
            IndexError: there is no such row.
            OSError: there is no such file.
        """
        return self._picture(row).identity()

    def name(self, row: int) -> str:
        """Return what to call a picture in a message: the features' id, a file, or the row."""
        if self.names is not None:
            return self.names[row]
        picture = self._picture(row)
        return picture.row.image_id if isinstance(picture, StoredPicture) else f"row {row}"

    def _picture(self, row: int) -> Picture:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} pictures")
        return self.find(row)


def open_pictures(images: Any = None, features: FeatureSet | None = None) -> Pictures:
    """Find the pictures of the rows of a feature set. They are read later, one by one.

    Args:
        images: one of these:

            - anything that :func:`~monoloss_plugin.features.open_source` takes (a folder,
              ``open-images:FOLDER``, the name of a Hub dataset, a ``datasets`` object), or what it
              returns. The images are matched with the features by their ids; features without ids,
              by position. The split is that of the features, where there are several;
            - a list of paths, PIL images, arrays and tensors, in the order of the features. Arrays
              are (H, W), (H, W, C) or (C, H, W), with 1, 3 or 4 channels; uint8, or floats in
              [0, 1];
            - an array or a tensor (N, H, W), (N, H, W, C) or (N, C, H, W) of the same;
            - None: the images that the record of the features tells of. A folder is looked for in
              the current folder, beside the features and above them.
        features: the features of the images, or of their patches. Without them, every image is
            taken, in order.

    Returns:
        A picture for each row of the features, or for each image of a patch set. Where a source
        lacks a few of the images, a warning says so, and reading such a picture raises
        FileNotFoundError.

    Raises:
        TypeError: images of another kind.
        ValueError: the source lacks more than half of the images, the numbers of images and rows
            differ, or the features do not say where their images are.
        FileNotFoundError: there is no such folder or dataset, more than half of the files in a
            list do not exist, or images that the record tells of are not found.
        ConnectionError: the Hub cannot be reached.

    Examples:
        >>> import numpy as np
        >>> pictures = open_pictures(np.zeros((2, 4, 6), "uint8"))
        >>> len(pictures), pictures[0].size, pictures[0].mode
        (2, (6, 4), 'RGB')
    """
    if features is not None:
        require_set(features, "features")
        features = features.images
    if images is None:
        return _from_record(features)
    if is_array(images) and images.ndim not in (3, 4):
        raise ValueError(
            "images: expected (N, H, W), (N, H, W, C) or (N, C, H, W), got shape "
            f"{tuple(images.shape)}"
        )
    if isinstance(images, (list, tuple)) or is_array(images):
        return _in_order(images, features)
    source = images
    if not isinstance(images, Source):
        source = open_place(images, features.record.source if features is not None else {})
    if source.num_images is None:
        raise TypeError("images: a stream has no images by number; open the dataset without it")
    if features is None:
        ids = source.ids()
        return Pictures(len(ids), lambda row: StoredPicture(source[row]), ids)
    return _of_source(source, match_by_id(source, features), features)


def _from_record(features: FeatureSet | None) -> Pictures:
    if features is None:
        raise ValueError("images: expected images, or features that say where their images are")
    if features.record.source.get("name") == DIGITS:
        from monoloss_plugin.features.digits import digit_images

        return _in_order(digit_images(features), features)
    return _of_source(*find_source(features), features)


def _of_source(source: Source, numbers: Sequence[int], features: FeatureSet) -> Pictures:
    """Return the pictures of some numbers (N,) in a source; -1 stands for a missing one."""

    def find(row: int) -> Picture:
        number = numbers[row]
        return StoredPicture(source[number]) if number >= 0 else MissingPicture()

    return Pictures(len(features), find, ids_of_all(features) or source.ids())


def _require_files(given: Sequence[Picture]) -> None:
    """Raise FileNotFoundError if more than half of the files in a list do not exist."""
    paths = [one.row.image["path"] for one in given if isinstance(one, StoredPicture)]
    missing = [path for path in paths if not os.path.exists(path)]
    if 2 * len(missing) > len(given):
        raise FileNotFoundError(
            f"images: {len(missing):,} of {len(given):,} images are files that do not exist, such "
            f"as {missing[0]}"
        )


def _in_order(images: Any, features: FeatureSet | None) -> Pictures:
    """Return the pictures of a list or an array, in the order of the features."""
    if features is not None:
        require_as_many(len(images), len(features), "in the same order")
    names = ids_of_all(features) if features is not None else None
    if is_array(images):

        def find(row: int) -> Picture:
            return as_picture(images[row], "images")

        pictures = Pictures(len(images), find, names)
    else:
        given = [as_picture(image, f"images[{row}]") for row, image in enumerate(images)]
        _require_files(given)
        pictures = Pictures(len(given), given.__getitem__, names)
    if len(pictures) and isinstance(first := pictures.find(0), PixelPicture):
        as_pixels(first.pixels, "images")  # a whole set of normalised images is an error
    return pictures

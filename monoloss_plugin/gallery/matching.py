"""Which image of a source belongs to each row of a feature set."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch

from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.sources import Source

logger = logging.getLogger(__name__)

_NAMED = 3
"""How many ids an error names."""


def match_by_id(source: Source, features: FeatureSet) -> Sequence[int]:
    """Return the number in the source (N,) of each row's image, -1 where the source lacks it.

    Features without ids are matched by position. If some of the images are missing, a warning says
    so.

    Raises:
        ValueError: fewer than half of the images are in the source, an id occurs twice there, or
            features without ids are not as many as the images.
    """
    if features.ids is None:
        require_as_many(len(source.ids()), len(features), "they have no ids to find images by")
        return range(len(features))
    ids = pa.array(source.ids(), pa.string())
    if pa.chunked_array([ids]).equals(features.ids):
        return range(len(features))
    numbers = pc.fill_null(pc.index_in(features.ids, value_set=ids), -1)
    missing = features.ids.filter(pc.less(numbers, 0))
    _require_most(missing, ids, len(features))
    _require_once(ids, features.ids)
    if len(missing):
        counts = len(missing), len(features), _names(missing)
        logger.warning("images: %d of the %d images of the features are missing: %s", *counts)
    found: list[int] = numbers.to_pylist()
    return found


def require_as_many(images: int, rows: int, why: str) -> None:
    """Raise ValueError if there are not as many images as rows of features."""
    if images != rows:
        raise ValueError(
            f"images: expected {rows}, one for each row of the features ({why}), got {images}"
        )


def ids_of_all(features: FeatureSet) -> list[str] | None:
    """Return the id of every row; None if the set has no ids."""
    return features.ids_of(torch.arange(len(features)))


def _require_most(missing: pa.ChunkedArray, ids: pa.Array, rows: int) -> None:
    if 2 * len(missing) > rows:
        raise ValueError(
            f"images: {len(missing)} of the {rows} images of the features are not among these "
            f"{len(ids)}: {_names(missing)}; here are {_names(ids)}. If they are the same images "
            "in the same order, pass a list of them"
        )


def _require_once(ids: pa.Array, wanted: pa.ChunkedArray) -> None:
    counted = pc.value_counts(ids)
    repeated = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    unclear = repeated.filter(pc.is_in(repeated, value_set=wanted.combine_chunks()))
    if len(unclear):
        raise ValueError(
            f"images: {len(unclear)} ids occur more than once ({_names(unclear)}), so that it is "
            "not clear which image is meant; pass a list of the images, one for each row of the "
            "features"
        )


def _names(ids: pa.Array | pa.ChunkedArray) -> str:
    """Return the first few ids, for an error."""
    more = ", ..." if len(ids) > _NAMED else ""
    return ", ".join(map(repr, ids[:_NAMED].to_pylist())) + more

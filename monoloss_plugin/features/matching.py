"""Which images of several feature sets are the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor

from monoloss_plugin.features.feature_set import FeatureSet

logger = logging.getLogger(__name__)


def rows_in_common(first: FeatureSet, others: Sequence[FeatureSet]) -> list[Tensor]:
    """Match feature sets by the ids of their images; row by row, with a warning, without ids.

    Returns:
        For each set, the rows (n,) of the images that every set has, in the order of ``first``. Of
        a patch set, they are rows of its ``images``.

    Raises:
        ValueError: the sets are of different sources or splits, have no image in common, or have
            an id twice; or they have no ids and different numbers of rows.
    """
    for other in others:
        _require_same_source(first.record.source, other.record.source)
    sets = [one.images for one in (first, *others)]
    ids = [one.ids for one in sets if one.ids is not None]
    in_order = [torch.arange(first.num_images)] * len(sets)
    if len(ids) < len(sets) and others:
        if len({len(one) for one in sets}) > 1:
            sizes = ", ".join(str(len(one)) for one in sets)
            raise ValueError(
                f"embeddings: sets without image_id must be equally long, got {sizes} rows"
            )
        logger.warning("a set has no image_id: row i of each set is taken for the same image")
        return in_order
    if all(column.equals(ids[0]) for column in ids[1:]):
        return in_order
    for column in ids:
        if pc.count_distinct(column).as_py() < len(column):
            raise ValueError("image_id: an id occurs twice; ids must be unique to match sets")
    found = [pc.index_in(ids[0], value_set=column.combine_chunks()) for column in ids]
    rows = torch.stack([torch.tensor(pc.fill_null(column, -1).to_numpy()) for column in found])
    rows = rows[:, (rows >= 0).all(dim=0)].long()
    if rows.shape[1] == 0:
        raise ValueError("embeddings: the sets have no image in common")
    return list(rows)


def _require_same_source(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise ValueError if two sources hold different images: their ids may still be the same."""
    if not (one and other):
        return
    checksums = ["ids_sha256", "sample_sha256"]
    # The parts of Open Images are one collection, and a stream has a checksum of its beginning.
    if one.get("kind") == "open-images" or (one.get("images") is None) != (
        other.get("images") is None
    ):
        checksums = []
    names = ["kind", "name", "config", "split"]
    names += [name for name in checksums if name in one and name in other]
    differing = [name for name in names if one.get(name) != other.get(name)]
    if differing:
        said = [f"{source.get('name')} (split {source.get('split')})" for source in (one, other)]
        raise ValueError(
            f"embeddings: expected features of the same images, {said[0]}, got {said[1]}; the "
            f"records differ in {', '.join(differing)}. If you know that the images are the same, "
            "open one set without its record: FeatureSet(other.dataset, record={})"
        )

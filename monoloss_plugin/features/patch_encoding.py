"""Patches on their way from an encoder to the disk: some or all of each image, in one column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoloss_plugin.features.encoders.encoder import PatchTokens, mean_of_patches
from monoloss_plugin.features.patches import CLASS_TOKEN, LARGEST_GRID
from monoloss_plugin.features.shards import EncodedPatches


def check_tokens(tokens: PatchTokens) -> None:
    """Raise ValueError unless shapes of patches, grid, padding and class tokens fit together."""
    x, grid, present, class_token = tokens
    if x.ndim != 3:
        raise ValueError(f"encoder: expected patches (B, P, d), got {tuple(x.shape)}")
    for name, given, shape in (
        ("grid", grid if isinstance(grid, Tensor) else None, (len(x), 2)),
        ("present", present, x.shape[:2]),
        ("class_token", class_token, (len(x), x.shape[2])),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(
                f"encoder: expected {name} of shape {tuple(shape)}, got {tuple(given.shape)}"
            )


def pack(
    tokens: PatchTokens, dtype: torch.dtype, numbers: Sequence[int], keep: int | None
) -> tuple[Tensor, np.ndarray[Any, Any], EncodedPatches]:
    """Put the patches of B images one after another, as they are stored.

    Args:
        tokens: the patches, on any device. All that is converted or chosen is so there.
        dtype: of the result.
        numbers: (B,) the images' rows in the source. They say which patches are chosen.
        keep: how many patches of each image to keep at most, besides the class token; None for all.

    Returns:
        The patches (n, d) on the CPU, each image's class token first; which images (B,) have finite
        values only; and what the patches are.

    Raises:
        ValueError: an image does not have a patch for each place of its grid.
    """
    x, _, present, class_token = tokens
    grids, there = _grids(tokens), None if present is None else present.cpu().numpy()
    first = 0 if class_token is None else 1
    if there is None:
        pooled = x.mean(1, dtype=torch.float32)
    else:
        pooled = mean_of_patches(x.float(), torch.from_numpy(there).to(x.device))
    if there is None and (keep is None or keep >= x.shape[1]):
        rows = x.new_empty((len(x), first + x.shape[1], x.shape[2]), dtype=dtype)
        if class_token is not None:
            rows[:, 0] = class_token
        rows[:, first:] = x
        counts = np.full(len(x), rows.shape[1])
        places = np.tile(np.arange(rows.shape[1], dtype=np.int16) - first, len(x))
        rows = rows.flatten(0, 1)
    else:
        if there is None:
            there = np.ones(x.shape[:2], bool)
        place = np.cumsum(there, axis=1) - 1
        chosen = there if keep is None else choose(place, there, numbers, keep)
        counts = chosen.sum(1) + first
        is_patch = np.ones(counts.sum(), bool)
        if first:
            is_patch[np.cumsum(counts) - counts] = False
        places = np.full(len(is_patch), CLASS_TOKEN, np.int16)
        places[is_patch] = place[chosen]
        rows = x.new_empty((len(is_patch), x.shape[2]), dtype=dtype)
        image, token = (torch.from_numpy(one).to(x.device) for one in np.nonzero(chosen))
        rows[torch.from_numpy(is_patch).to(x.device)] = x[image, token].to(dtype)
        if class_token is not None:
            rows[torch.from_numpy(~is_patch).to(x.device)] = class_token.to(dtype)
    mean = pooled.to(dtype)
    finite = np.logical_and.reduceat(_are_finite(rows), np.cumsum(counts) - counts)
    found = EncodedPatches(counts, places, grids, mean.cpu().numpy())
    return rows.cpu(), finite & _are_finite(mean), found


def _are_finite(rows: Tensor) -> np.ndarray[Any, Any]:
    """Return which rows (n, d) are finite, as (n,). This is faster than a look at each value."""
    ends = torch.stack((rows.amin(1), rows.amax(1)))
    return ends.isfinite().all(0).cpu().numpy()


def choose(
    places: np.ndarray[Any, Any], there: np.ndarray[Any, Any], numbers: Sequence[int], keep: int
) -> np.ndarray[Any, Any]:
    """Choose some patches of each image at random; the same ones for a row of the source, always.

    Args:
        places: (B, P) of the patches in their image's grid.
        there: (B, P) which patches are no padding.
        numbers: (B,) the images' rows in the source.
        keep: how many to choose at most.

    Returns:
        (B, P) bool.
    """
    keys = _mixed(_mixed(np.asarray(numbers, np.uint64))[:, None] + places.astype(np.uint64))
    keys[~there] = np.iinfo(np.uint64).max
    chosen = np.zeros(there.shape, bool)
    np.put_along_axis(chosen, np.argsort(keys, axis=1, kind="stable")[:, :keep], True, axis=1)
    chosen &= there
    return chosen


def _mixed(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a random number for each number: splitmix64 (Steele, Lea & Flood 2014)."""
    z: np.ndarray[Any, Any] = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _grids(tokens: PatchTokens) -> np.ndarray[Any, Any]:
    """Return the grids (B, 2) of images, after a look at how many patches each has."""
    x, grid, present, _ = tokens
    each = torch.as_tensor(grid).cpu().long().expand(len(x), 2)
    counts = torch.full((len(x),), x.shape[1]) if present is None else present.sum(1).cpu()
    sizes = each.prod(1)
    if len(x) and (not torch.equal(sizes, counts.long()) or bool((each < 1).any())):
        wrong = int((sizes != counts).to(torch.uint8).argmax())
        raise ValueError(
            f"encoder: expected a patch for each place of a grid {tuple(each[wrong].tolist())}, "
            f"got {int(counts[wrong])}"
        )
    if len(x) and int(sizes.max()) > LARGEST_GRID:
        raise ValueError(
            f"encoder: expected at most {LARGEST_GRID} patches of an image, got {int(sizes.max())}"
        )
    return each.numpy().astype(np.int16)

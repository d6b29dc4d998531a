"""Which images a page shows, and how large, so that its file stays below a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monoloss_plugin.features import FeatureSet
from monoloss_plugin.gallery.contributions import KEPT
from monoloss_plugin.gallery.pictures import Pictures
from monoloss_plugin.gallery.samples import ActivatingSamples
from monoloss_plugin.gallery.thumbnails import is_pixelated, make_thumbnails
from monoloss_plugin.report.maps import Plan, plan_maps
from monoloss_plugin.report.packing import BASE64

MOST_BYTES = 48_000_000
"""What the page is made for. The sizes of images are estimated, so this leaves 2 MB of 50."""
SIZES = (128, 96, 80, 64, 56, 48)
"""Sizes of thumbnails in pixels, the best first."""
_TRIED = 128
"""So many thumbnails are made to see how large they are."""
_OF_AN_IMAGE = 50
"""Bytes of an image beside its thumbnail and its latents: its id, its length."""
_OF_A_LATENT = 200
"""Bytes of a latent beside its bands and its histogram."""


@dataclass(frozen=True)
class Shown:
    """The images of a page."""

    rows: Tensor
    """(I,) their rows in the features."""
    thumbnails: list[bytes]
    """(I,)"""
    size: int
    """Pixels of the longer side of a thumbnail, at most."""
    left_out: int
    """How many more images the bands name, for which there was no room."""
    pixelated: bool
    """Whether the pictures themselves have a few pixels only."""
    plan: Plan | None = None
    """The heat maps; None if the features are no patches."""
    num_seen: int = 0
    """For so many of the images, the first, there is room for the latents of each place."""

    def places(self, rows: Tensor) -> Tensor:
        """Return the numbers of images in the page; -1 for rows that are not in it, and for -1."""
        highest = int(torch.cat((rows.flatten(), self.rows, torch.zeros(1).long())).max())
        place = torch.full((highest + 2,), -1, dtype=torch.int32)
        place[self.rows] = torch.arange(len(self.rows), dtype=torch.int32)
        return place[rows]  # the last place, -1, is that of no row


def choose_images(
    saes: Sequence[ActivatingSamples],
    pictures: Pictures,
    features: FeatureSet | None = None,
    *,
    progress: bool = False,
) -> Shown:
    """Choose the images of all bands, or as many as there is room for, and make thumbnails.

    The strongest of each band come first, so that every latent keeps some.

    Args:
        saes: what was found of each SAE.
        pictures: of the rows of the features.
        features: of a patch set, the heat maps take a part of the room.
        progress: show a progress bar.
    """
    rows = _by_importance(saes)
    room = MOST_BYTES - sum(_bytes_of(one) for one in saes)
    plan = None
    if features is not None and features.patches is not None:
        plan = plan_maps(saes, features, room)
        room -= plan.size + plan.reserved
    beside = _OF_AN_IMAGE + BASE64 * 4 * KEPT * len(saes)
    tried = rows[torch.linspace(0, max(0, len(rows) - 1), min(_TRIED, len(rows))).long()].tolist()
    for size in SIZES:
        files = [one for one in make_thumbnails(pictures, tried, size, warn=False).values() if one]
        each = beside + BASE64 * sum(map(len, files)) / max(1, len(files))
        if each * len(rows) <= room:
            break
    kept = rows[: max(0, int(room / each))] if len(rows) else rows
    made = make_thumbnails(pictures, kept.tolist(), size, progress=progress)
    left_out = len(rows) - len(kept)
    num_seen = 0
    if plan is not None:
        left = plan.reserved + max(0.0, room - each * len(kept)) if len(rows) else 0.0
        num_seen = min(len(kept), int(left / plan.each))
    return Shown(
        *(kept, list(made.values()), size, left_out, is_pixelated(made.values())),
        plan=plan,
        num_seen=num_seen,
    )


def _by_importance(saes: Sequence[ActivatingSamples]) -> Tensor:
    """Return the rows of all bands, each once: first the first of every band."""
    bands = [band.rows for one in saes for band in one.bands.values()]
    ranks = max(band.shape[1] for band in bands)
    listed = [band[:, i] for i in range(ranks) for band in bands if i < band.shape[1]]
    rows = torch.cat(listed)
    unique, place = rows.unique(return_inverse=True)
    first = torch.full((len(unique),), len(rows)).scatter_reduce_(
        0, place, torch.arange(len(rows)), "amin"
    )
    unique = unique[first.argsort()]
    real: Tensor = unique[unique >= 0]
    return real


def _bytes_of(one: ActivatingSamples) -> int:
    """Return about how many bytes the latents of an SAE take in the page."""
    images = sum(band.rows.shape[1] for band in one.bands.values())
    of_each = 5 * images + 4 * one.histogram.shape[1] + _OF_A_LATENT
    return int(BASE64 * len(one.histogram) * of_each)

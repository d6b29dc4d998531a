"""Choose which latents of two SAEs to draw side by side, and draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from monoloss_plugin.gallery.grid import LatentGrid
from monoloss_plugin.gallery.pictures import Pictures
from monoloss_plugin.gallery.samples import ActivatingSamples
from monoloss_plugin.gallery.show import latent_grid
from monoloss_plugin.metrics import MonoScoreResult

BAND = 5
"""Number of images in each of a latent's bands."""
_BANDS = ("top", "middle", "bottom")

_PLACES = (0.1, 0.4, 0.7)
"""Where to look in the ranking by MonoScore, as shares of its length."""


class Pair(NamedTuple):
    """A latent of each of two SAEs."""

    latents: tuple[int, int]
    where: str
    """What the two have in common, for their titles."""


def pairs_of_the_same_rank(a: MonoScoreResult, b: MonoScoreResult) -> list[Pair]:
    """Return pairs of latents with the same rank by MonoScore.

    At each place in the ranking, this is the next rank whose latents fill their bands in both SAEs.

    Source: Nasiri-Sarvi et al. 2026, figure 5.
    """
    ranks = list(enumerate(zip(_ranking(a), _ranking(b), strict=False)))
    pairs = []
    for place in _PLACES:
        onwards = ranks[int(place * len(ranks)) :]
        filled = [r for r in onwards if _fills_bands(a, r[1][0]) and _fills_bands(b, r[1][1])]
        pairs += [Pair(latents, f"rank {rank}") for rank, latents in (filled or onwards)[:1]]
    return pairs


def pairs_of_the_same_latent(a: MonoScoreResult, b: MonoScoreResult) -> list[Pair]:
    """Return pairs of the same latent in both SAEs, which start training with equal weights.

    They are at places in the first SAE's ranking, among latents that fill their bands in both.

    Source: Nasiri-Sarvi et al. 2026, figure 3.
    """
    shared = [
        latent
        for latent in _ranking(a)
        if b.defined[latent] and _fills_bands(a, latent) and _fills_bands(b, latent)
    ]
    picks = [shared[int(place * len(shared))] for place in _PLACES] if shared else []
    return [Pair((latent, latent), f"latent {latent}") for latent in dict.fromkeys(picks)]


def draw_pairs(
    pairs: Sequence[Pair],
    saes: tuple[ActivatingSamples, ActivatingSamples],
    names: tuple[str, str],
    pictures: Pictures,
    *,
    title: str,
) -> Figure:
    """Draw pairs of latents, a pair in each row, with the images of their bands.

    Args:
        pairs: one or more.
        saes: what was found of each SAE.
        names: of the SAEs.
        pictures: of the rows of the features.
        title: title of the figure.
    """
    halves = []
    for side, (found, name) in enumerate(zip(saes, names, strict=True)):
        latents = [pair.latents[side] for pair in pairs]
        titles = [
            _title(found.evaluation.monoscore, latent, f"{name}: {pair.where}")
            for latent, pair in zip(latents, pairs, strict=True)
        ]
        halves.append(latent_grid(found, pictures, latents, _BANDS, BAND, titles=titles))
    left, right = halves
    in_pairs = [latent for pair in zip(left.latents, right.latents, strict=True) for latent in pair]
    return LatentGrid(in_pairs, left.pixelated).figure(columns=2, title=title)


def _title(monoscore: MonoScoreResult, latent: int, where: str) -> str:
    score, support = float(monoscore.scores[latent]), int(monoscore.support[latent])
    return f"{where}, score {score:.2f}, active on {support}"


def _ranking(monoscore: MonoScoreResult) -> list[int]:
    """Return the latents that have a score, the highest first."""
    scores = monoscore.scores.masked_fill(~monoscore.defined, -torch.inf)
    order: list[int] = scores.argsort(descending=True)[: monoscore.num_defined].tolist()
    return order


def _fills_bands(monoscore: MonoScoreResult, latent: int) -> bool:
    """Return whether enough images activate the latent for its bands without repeats."""
    return int(monoscore.support[latent]) >= len(_BANDS) * BAND

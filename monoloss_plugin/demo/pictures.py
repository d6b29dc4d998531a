"""Choose which latents of two SAEs to draw side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin.figures import LatentRow
from monoloss_plugin.metrics import MonoScoreResult

BAND = 5
"""Number of images in each of a latent's three bands."""

_PLACES = (0.1, 0.4, 0.7)
"""Where to look in the ranking by MonoScore, as shares of its length."""


class ScoredSAE(NamedTuple):
    """An SAE's results on held-out images."""

    name: str
    monoscore: MonoScoreResult
    activations: Tensor
    """(N, M)."""

    def row(self, latent: int, where: str) -> LatentRow:
        """Return a latent to draw; its title tells its place and score."""
        score = float(self.monoscore.scores[latent])
        return LatentRow(f"{self.name}: {where}, score {score:.2f}", self.activations[:, latent])

    def ranking(self) -> list[int]:
        """Return the latents that have a score, the highest first."""
        scores = self.monoscore.scores.masked_fill(~self.monoscore.defined, -torch.inf)
        order: list[int] = scores.argsort(descending=True)[: self.monoscore.num_defined].tolist()
        return order

    def fills_bands(self, latent: int) -> bool:
        """Return whether enough images activate the latent for three bands without repeats."""
        return int((self.activations[:, latent] > 0).sum()) >= 3 * BAND


Pair = tuple[LatentRow, LatentRow]


def pairs_of_the_same_rank(a: ScoredSAE, b: ScoredSAE) -> list[Pair]:
    """Return pairs of latents with the same rank by MonoScore.

    At each place in the ranking, this is the next rank whose latents fill their bands in both SAEs.

    Source: Nasiri-Sarvi et al. 2026, figure 5.
    """
    ranks = list(enumerate(zip(a.ranking(), b.ranking(), strict=False)))
    pairs = []
    for place in _PLACES:
        onwards = ranks[int(place * len(ranks)) :]
        filled = [r for r in onwards if a.fills_bands(r[1][0]) and b.fills_bands(r[1][1])]
        for rank, (of_a, of_b) in (filled or onwards)[:1]:
            pairs.append((a.row(of_a, f"rank {rank}"), b.row(of_b, f"rank {rank}")))
    return pairs


def pairs_of_the_same_latent(a: ScoredSAE, b: ScoredSAE) -> list[Pair]:
    """Return pairs of the same latent in both SAEs, which start training with equal weights.

    They are at places in the first SAE's ranking, among latents that fill their bands in both.

    Source: Nasiri-Sarvi et al. 2026, figure 3.
    """
    shared = [
        latent
        for latent in a.ranking()
        if b.monoscore.defined[latent] and a.fills_bands(latent) and b.fills_bands(latent)
    ]
    picks = [shared[int(place * len(shared))] for place in _PLACES] if shared else []
    return [(a.row(k, f"latent {k}"), b.row(k, f"latent {k}")) for k in dict.fromkeys(picks)]

"""Which latents of two SAEs to lay side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin.metrics import MonoScoreResult
from monoloss_plugin.report import LatentRow

BAND = 5
"""Images in each of the three bands of a latent."""

_PLACES = (0.1, 0.4, 0.7)
"""Where in the ranking by MonoScore to look."""


class Scored(NamedTuple):
    """An SAE on held-out images."""

    name: str
    monoscore: MonoScoreResult
    activations: Tensor
    """(N, M)."""

    def row(self, latent: int, where: str) -> LatentRow:
        """The latent, titled with its place and score."""
        score = float(self.monoscore.scores[latent])
        title = f"{self.name}: {where}, score {score:.2f}"
        return LatentRow(title, self.activations[:, latent])

    def ranking(self) -> list[int]:
        """The defined latents by decreasing score."""
        scores = self.monoscore.scores.masked_fill(~self.monoscore.defined, -torch.inf)
        order: list[int] = scores.argsort(descending=True)[: self.monoscore.num_defined].tolist()
        return order

    def fills_bands(self, latent: int) -> bool:
        """Enough images activate the latent for three bands without repeats."""
        return int((self.activations[:, latent] > 0).sum()) >= 3 * BAND


Pair = tuple[LatentRow, LatentRow]


def pairs_of_the_same_rank(a: Scored, b: Scored) -> list[Pair]:
    """Latents of equal rank, as in figure 5 of the MonoLoss paper.

    From each place in the ranking on, the first rank whose latents fill their bands in both.
    """
    ranks = list(enumerate(zip(a.ranking(), b.ranking(), strict=False)))
    pairs = []
    for place in _PLACES:
        onwards = ranks[int(place * len(ranks)) :]
        shown = [r for r in onwards if a.fills_bands(r[1][0]) and b.fills_bands(r[1][1])]
        for rank, (of_a, of_b) in (shown or onwards)[:1]:
            pairs.append((a.row(of_a, f"rank {rank}"), b.row(of_b, f"rank {rank}")))
    return pairs


def pairs_of_the_same_latent(a: Scored, b: Scored) -> list[Pair]:
    """The same latent in both, as in figure 3 of the MonoLoss paper: they start at equal weights.

    At the places of the first one's ranking, among the latents that fill their bands in both.
    """
    shared = [
        latent
        for latent in a.ranking()
        if b.monoscore.defined[latent] and a.fills_bands(latent) and b.fills_bands(latent)
    ]
    picks = [shared[int(place * len(shared))] for place in _PLACES] if shared else []
    return [(a.row(k, f"latent {k}"), b.row(k, f"latent {k}")) for k in dict.fromkeys(picks)]

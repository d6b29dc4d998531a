"""The latents that the demo lays side by side."""

from __future__ import annotations

import torch

from monoloss_plugin.demo.pictures import (
    ScoredSAE,
    pairs_of_the_same_latent,
    pairs_of_the_same_rank,
)
from monoloss_plugin.metrics import MonoScoreResult


def scored(name: str, scores: list[float], defined: list[bool], active: list[int]) -> ScoredSAE:
    activations = torch.zeros(40, len(scores))
    for latent, count in enumerate(active):
        activations[:count, latent] = 1.0
    none = torch.zeros(len(scores))
    result = MonoScoreResult(
        torch.tensor(scores).double(),
        torch.tensor(defined),
        support=torch.tensor(active),
        largest=none,
        z_scores=none,
        p_values=none,
        chance=0.0,
        num_samples=40,
    )
    return ScoredSAE(name, result, activations)


def test_ranking_puts_negative_scores_before_undefined_latents() -> None:
    one = scored("a", [0.0, -0.5, 0.9, 0.2], [False, True, True, True], [0, 20, 20, 20])
    assert one.ranking() == [2, 3, 1]


def test_same_rank_pairs_take_the_first_rank_that_fills_its_bands_in_both() -> None:
    a = scored("a", [0.9, 0.8, 0.7, 0.6], [True] * 4, [20, 20, 20, 20])
    b = scored("b", [0.1, 0.2, 0.3, 0.4], [True] * 4, [20, 20, 20, 3])
    first = pairs_of_the_same_rank(a, b)[0]
    assert first[0].title == "a: rank 1, score 0.80"
    assert first[1].title == "b: rank 1, score 0.30"


def test_same_latent_pairs_are_defined_and_well_filled_in_both() -> None:
    a = scored("a", [0.9, 0.8, 0.7], [True, True, True], [20, 20, 2])
    b = scored("b", [0.1, 0.0, 0.3], [True, False, True], [20, 0, 20])
    titles = [(x.title, y.title) for x, y in pairs_of_the_same_latent(a, b)]
    assert titles == [("a: latent 0, score 0.90", "b: latent 0, score 0.10")]


def test_saes_with_nothing_defined_have_no_pairs() -> None:
    empty = scored("a", [0.0, 0.0], [False, False], [0, 0])
    assert pairs_of_the_same_rank(empty, empty) == []
    assert pairs_of_the_same_latent(empty, empty) == []

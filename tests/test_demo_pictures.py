"""The latents that the demo lays side by side."""

from __future__ import annotations

from typing import Any

import torch

from monoloss_plugin.demo.pictures import (
    Pair,
    draw_pairs,
    pairs_of_the_same_latent,
    pairs_of_the_same_rank,
)
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.figures import describe
from monoloss_plugin.gallery import activating_samples, open_pictures
from monoloss_plugin.metrics import MonoScoreResult


def scored(scores: list[float], defined: list[bool], active: list[int]) -> MonoScoreResult:
    none = torch.zeros(len(scores))
    return MonoScoreResult(
        torch.tensor(scores).double(),
        torch.tensor(defined),
        support=torch.tensor(active),
        largest=none,
        z_scores=none,
        p_values=none,
        chance=0.0,
        num_samples=40,
    )


def test_same_rank_pairs_take_the_first_rank_that_fills_its_bands_in_both() -> None:
    a = scored([0.9, 0.8, 0.7, 0.6], [True] * 4, [20, 20, 20, 20])
    b = scored([0.1, 0.2, 0.3, 0.4], [True] * 4, [20, 20, 20, 3])
    assert pairs_of_the_same_rank(a, b)[0] == Pair((1, 2), "rank 1")


def test_ranks_put_negative_scores_before_undefined_latents() -> None:
    one = scored([0.0, -0.5, 0.9, 0.2], [False, True, True, True], [0, 20, 20, 20])
    pairs = pairs_of_the_same_rank(one, one)
    assert pairs == [Pair((2, 2), "rank 0"), Pair((3, 3), "rank 1"), Pair((1, 1), "rank 2")]


def test_same_latent_pairs_are_defined_and_well_filled_in_both() -> None:
    a = scored([0.9, 0.8, 0.7], [True, True, True], [20, 20, 2])
    b = scored([0.1, 0.0, 0.3], [True, False, True], [20, 0, 20])
    assert pairs_of_the_same_latent(a, b) == [Pair((0, 0), "latent 0")]


def test_saes_with_nothing_defined_have_no_pairs() -> None:
    empty = scored([0.0, 0.0], [False, False], [0, 0])
    assert pairs_of_the_same_rank(empty, empty) == []
    assert pairs_of_the_same_latent(empty, empty) == []


class Identity:
    """An SAE whose latents are the features, in another order."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.order]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, self.order]


def shown(figure: Any) -> list[int]:
    """How bright each picture of a figure is, row by row in each of its panels."""
    return [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes if axes.images]


def test_each_image_is_drawn_where_its_band_is_and_each_latent_in_its_half() -> None:
    up = torch.arange(20.0)
    features = FeatureSet.from_tensors(torch.stack([up, 19 - up], 1))
    saes = tuple(
        activating_samples(Identity(order), features, count=5, normalize=False)
        for order in ([0, 1], [1, 0])
    )
    images = (torch.arange(20)[:, None, None].expand(20, 8, 8) * 10).byte()  # image n is as bright
    figure = draw_pairs(
        [Pair((0, 0), "rank 3")], saes, ("a", "b"), open_pictures(images, features), title="Some"
    )
    left = [19, 18, 17, 16, 15, 12, 11, 10, 9, 8, 5, 4, 3, 2, 1]
    assert shown(figure) == [10 * n for n in left + [19 - n for n in left]]
    scores = [one.evaluation.monoscore.scores[0] for one in saes]
    told = [
        f"{name}: rank 3, score {score:.2f}, active on 19"
        for name, score in zip("ab", scores, strict=True)
    ]
    assert describe(figure) == f"Some. {told[0]}. {told[1]}. 30 pictures."
    image = next(axes.images[0] for axes in figure.axes if axes.images)
    assert image.get_interpolation() == "nearest"

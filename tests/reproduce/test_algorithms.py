"""The paper's algorithms against the definition of MonoScore."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monoloss_plugin import functional
from monoloss_plugin.reproduce.algorithms import (
    pairwise_by_products,
    pairwise_monoscore,
    two_pass_monoscore,
)


def in_batches(latents: Tensor, embeddings: Tensor) -> Tensor:
    return two_pass_monoscore(list(zip(latents.split(16), embeddings.split(16), strict=True)))


WAYS = {
    "Algorithm 1": lambda a, e: pairwise_monoscore(a, e, block=7),
    "Algorithm 1, one block": pairwise_monoscore,
    "matrix products": lambda a, e: pairwise_by_products(a, e, block=7),
    "matrix products, one block": pairwise_by_products,
    "Algorithm 2": in_batches,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_definition(way: str) -> None:
    latents = torch.rand(40, 12) * (torch.rand(40, 12) > 0.6)
    latents[:, 0] = 3 - 2 * torch.rand(40)  # measured from its minimum, which is not zero
    embeddings = torch.randn(40, 5) + 1
    expected = functional.monoscore_pairwise(latents, embeddings).float()
    assert expected.std() > 0.02
    torch.testing.assert_close(WAYS[way](latents, embeddings), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_latent_without_a_pair_scores_zero(way: str) -> None:
    latents = torch.zeros(40, 2)
    latents[3, 1] = 1.0
    assert WAYS[way](latents, torch.randn(40, 5)).tolist() == [0, 0]

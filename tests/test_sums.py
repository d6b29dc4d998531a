"""MonoScore's sums: dense, sparse and raised ones equal the sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monoloss_plugin.groups import as_groups
from monoloss_plugin.kernels.support import support_of
from monoloss_plugin.sums import Sums, UnitEmbeddings, dense_sums, range_of, sparse_sums
from tests import oracle

CASES = oracle.activation_cases()


def written_out(
    latents: Tensor, embeddings: Tensor, lowest: Tensor, groups: Tensor | None = None
) -> Sums:
    a, norms = latents - lowest, embeddings.norm(dim=1)
    h = embeddings / norms.where(norms > 0, 1.0).unsqueeze(1)
    of = torch.arange(len(a)) if groups is None else groups
    mates = [[j for j in range(len(a)) if of[j] == of[i]] for i in range(len(a))]
    sums = Sums.zeros(a.shape[1], h.shape[1], a)
    for i, group in enumerate(mates):
        sums.u.add_(a[i])
        sums.w.add_(torch.outer(a[i], h[i]))
        for j in group:
            sums.v.add_(a[i] * a[j])
            sums.t.add_(a[i] * a[j] * (h[i] @ h[j]))
            sums.p.add_(a[i] * (h[i] @ h[j]))
            sums.r.add_(a[i])
    return sums


@pytest.mark.parametrize("case", ["sparse", "dense", "signed", "shifted", "constant latents"])
@pytest.mark.parametrize("form", ["dense", "sparse", "added to a total"])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_sum_is_what_it_says_before_and_after_the_minimum_falls(
    case: str, form: str, grouped: bool, embeddings: Tensor
) -> None:
    a, e = CASES[case].double(), embeddings.double()
    groups = as_groups(torch.arange(len(a)) * 7 % 11, len(a)) if grouped else None
    unit, (lowest, _) = UnitEmbeddings.of(e, torch.float64, groups), range_of(a)
    if form == "dense":
        sums = dense_sums(a, unit, lowest)
    else:
        total = torch.zeros(12, 7, dtype=torch.float64) if form == "added to a total" else None
        sums = sparse_sums(support_of(a), unit, lowest, add_to=total)
        assert total is None or sums.w is total
    torch.testing.assert_close(sums, written_out(a, e, lowest, groups), rtol=1e-9, atol=1e-9)
    drop = torch.linspace(0, 2, 12, dtype=torch.float64)
    sums.raise_by_(drop, unit.sums)
    fallen = written_out(a, e, lowest - drop, groups)
    torch.testing.assert_close(sums, fallen, rtol=1e-9, atol=1e-9)


def test_a_scale_divides_activations(embeddings: Tensor) -> None:
    a, e = CASES["signed"].double(), embeddings.double()
    unit, (lowest, highest) = UnitEmbeddings.of(e, torch.float64), range_of(a)
    scale = highest - lowest
    expected = written_out(a / scale, e, lowest / scale)
    for sums in (
        dense_sums(a, unit, lowest, scale),
        sparse_sums(support_of(a), unit, lowest, scale),
    ):
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-9)

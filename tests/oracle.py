"""The papers' definitions, written as the loops they are: the independent oracle of the tests."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def monoscore_by_loops(
    latents: Tensor, embeddings: Tensor, groups: Tensor | None = None
) -> np.ndarray:
    """Algorithm 1 of the MonoLoss paper, pair by pair in float64; NaN where undefined.

    With groups (N,), pairs of samples of one group are skipped.
    """
    a = latents.detach().double().numpy()
    e = embeddings.detach().double().numpy()
    norms = np.linalg.norm(e, axis=1)
    scores = np.full(a.shape[1], math.nan)
    for k in range(a.shape[1]):
        low, high = a[:, k].min(), a[:, k].max()
        if low == high:
            continue
        scaled = (a[:, k] - low) / (high - low)
        numerator = denominator = 0.0
        for n in range(len(a)):
            for m in range(n + 1, len(a)):
                if groups is not None and groups[n] == groups[m]:
                    continue
                product = norms[n] * norms[m]
                similarity = float(e[n] @ e[m]) / product if product else 0.0
                numerator += scaled[n] * scaled[m] * similarity
                denominator += scaled[n] * scaled[m]
        if denominator > 0:
            scores[k] = numerator / denominator
    return scores


def mean_embeddings_by_loops(latents: Tensor, embeddings: Tensor) -> np.ndarray:
    """The mean unit embedding of each latent, weighted by activation above its minimum; or 0."""
    a, e = latents.double().numpy(), embeddings.double().numpy()
    means = np.zeros((a.shape[1], e.shape[1]))
    for k in range(a.shape[1]):
        low, weight = a[:, k].min(), 0.0
        for n in range(len(a)):
            norm = math.sqrt(sum(x * x for x in e[n]))
            means[k] += (a[n, k] - low) * e[n] / (norm or 1.0)
            weight += a[n, k] - low
        means[k] /= weight or 1.0
    return means


def purity_by_loops(latents: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Section 4.1 of the MonoLoss paper, sample by sample; NaN where never active."""
    binary, weighted = [], []
    for column in latents.double().T:
        active = [n for n in range(len(column)) if column[n] > 0]
        if not active:
            binary.append(math.nan)
            weighted.append(math.nan)
            continue
        members: dict[int, list[int]] = {}
        for n in active:
            members.setdefault(int(labels[n]), []).append(n)
        dominant = min(members, key=lambda c: (-len(members[c]), c))
        binary.append(len(members[dominant]) / len(active))
        share = sum(float(column[n]) for n in members[dominant])
        weighted.append(share / sum(float(column[n]) for n in active))
    return np.array(binary), np.array(weighted)


def off_support_l1_by_loops(z: Tensor, selected: Tensor, every_unit: bool) -> float:
    """Regularizer 1 of Beyond the Hard Budget, entry by entry."""
    total = 0.0
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            if not selected[i, j] and (every_unit or bool(selected[:, j].any())):
                total += abs(float(z[i, j]))
    return total / z.shape[0]


def l1_l2_ratio_by_loops(z: Tensor, selected: Tensor, every_unit: bool) -> float:
    """Regularizer 2 of Beyond the Hard Budget, entry by entry."""
    total = 0.0
    for i in range(z.shape[0]):
        used = [
            float(z[i, j]) for j in range(z.shape[1]) if every_unit or bool(selected[:, j].any())
        ]
        l2 = math.sqrt(sum(x * x for x in used))
        total += sum(abs(x) for x in used) / l2 if l2 else 0.0
    return total / z.shape[0]


def embeddings_with_a_zero() -> Tensor:
    """Embeddings (40, 7), of which one is zero."""
    e = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    e[5] = 0
    return e


def activation_cases() -> dict[str, Tensor]:
    """Latents (40, 12) of every kind that a formula could get wrong, in float32."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 12, generator=generator)
    uniform = torch.rand(40, 12, generator=generator)
    sparse = (normal - 1).relu()
    with_dead = sparse.clone()
    with_dead[:, :3] = 0
    with_constant = normal.abs()
    with_constant[:, :3] = 0.7
    single = torch.zeros(40, 12)
    single[torch.arange(12), torch.arange(12)] = 2.5
    return {
        "sparse": sparse,
        "dense": normal.abs(),
        "signed": normal,
        "shifted": 100 + 0.01 * uniform,
        "huge": sparse * 1e30,
        "tiny": sparse * 1e-30,
        "dead latents": with_dead,
        "constant latents": with_constant,
        "one sample each": single,
    }

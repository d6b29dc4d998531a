"""The decoder directions of SAEs: which are alike, and do they come back with another seed?

A dictionary is a decoder's weight (M, d), one direction for each latent: SAELens's ``sae.W_dec``.
Lengths do not count. Signs do: activations are not negative, so the opposite direction is another
feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_list,
    as_rows,
    as_tensor,
    require_at_least,
    require_finite,
    require_number,
)
from monoloss_plugin._chunks import row_chunks
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.embeddings import unit_rows

__all__ = ["NearestLatents", "Stability", "nearest_latents", "redundancy", "stability"]

_COSINES = 1 << 24
"""Cosines per chunk, about: 64 MiB in float32."""
_ROUNDS = 10
"""After ten, the covariance is right to 0.2 % of its norm if M > 2 d (measured)."""


class Stability(NamedTuple):
    """How well the directions of several dictionaries match."""

    mean: float
    """Mean cosine of matched directions, over all pairs of dictionaries."""
    chance: float
    """The same for random directions with the same mean and covariance."""


@torch.no_grad()
def stability(
    dictionaries: Sequence[Tensor], *, alive: Sequence[Tensor] | None = None
) -> Stability:
    """Return how similar the decoder directions are that SAEs learn with different seeds.

    Each latent of one SAE gets a latent of the other, one to one, so that the sum of cosines is
    largest (the Hungarian method). If the numbers of latents differ, each latent of the smaller
    gets one of the larger.

    Even random directions match somewhat, and more so if they share a mean or lie in few
    dimensions. So compare ``mean`` with ``chance``: each dictionary is replaced by random
    directions with the same mean and covariance (so the same second moments W^T W / M), which are
    Gaussian but for their unit length, drawn once with a fixed seed. Between independent random
    dictionaries of this kind, ``mean`` differs from ``chance`` by less than 0.005 if M is at least
    256, and by 0.01 at M = 64 (measured).

    One pair takes one (M, M) array, on the CPU. On two cores, two dictionaries of (2048, 768) take
    15 seconds, and two of (8192, 768) a minute; most of it is to draw.

    Args:
        dictionaries: two or more (M, d), finite; M may differ.
        alive: (M,) bool for each dictionary: the latents to count. Without it, all. Directions
            that are zero never count.

    Returns:
        ``mean`` and ``chance``; NaN if a dictionary has no latent that counts.

    Raises:
        TypeError: a dictionary is not a floating-point tensor, or a mask is not bool.
        ValueError: fewer than two dictionaries, shapes that do not match, or NaN or infinite
            values.
        ModuleNotFoundError: scipy is not installed.

    Examples:
        >>> import torch
        >>> stability([torch.eye(4), torch.eye(4)[[2, 0, 3, 1]]]).mean
        1.0

    Source: Paulo & Belrose 2025, arXiv 2501.16615; Song et al. 2025, arXiv 2505.20254. The chance
    level is ours.
    """
    given = as_list(dictionaries, "dictionaries")
    if len(given) < 2:
        raise ValueError(f"dictionaries: expected at least two, got {len(given)}")
    masks = [None] * len(given) if alive is None else as_list(alive, "alive")
    if len(masks) != len(given):
        raise ValueError(f"alive: expected one mask for each dictionary, got {len(masks)}")
    learned = [
        _directions(one, mask, "dictionaries").cpu() for one, mask in zip(given, masks, strict=True)
    ]
    for one in learned[1:]:
        if one.shape[1] != learned[0].shape[1]:
            raise ValueError(
                f"dictionaries: expected width {learned[0].shape[1]} as the first, got "
                f"{one.shape[1]}"
            )
    mean = _mean_match(learned)
    generator = torch.Generator().manual_seed(0)
    return Stability(mean, chance=_mean_match([_random_like(one, generator) for one in learned]))


class NearestLatents(NamedTuple):
    """The latents with the most similar decoder directions, the most similar first."""

    latents: Tensor
    """(M, count) int64; -1 where there is none."""
    cosines: Tensor
    """(M, count) float32: the cosine of the two directions; NaN where there is none."""


@torch.no_grad()
def nearest_latents(
    dictionary: Tensor,
    other: Tensor | None = None,
    *,
    count: int = 5,
    alive: Tensor | None = None,
) -> NearestLatents:
    """Return for each decoder direction the most similar ones, of this or another dictionary.

    Memory is for a chunk of the cosines, never for all of them. On two cores, (8192, 768) takes
    two seconds.

    Args:
        dictionary: (M, d), finite.
        other: (L, d), finite: look for similar directions here. Without it, look among the other
            directions of ``dictionary`` itself.
        count: how many to return for each latent.
        alive: (M,) bool: the latents of ``dictionary`` that count. Without it, all. Directions that
            are zero never count. The others have no nearest latents, and are nearest to none.

    Returns:
        Latents and cosines, on the device of ``dictionary``.

    Raises:
        TypeError: a dictionary is not a floating-point tensor, the mask is not bool, or ``count``
            is not an integer.
        ValueError: ``count`` below 1, shapes that do not match, or NaN or infinite values.

    Examples:
        >>> import torch
        >>> found = nearest_latents(torch.tensor([[1.0, 0.0], [4.0, 3.0], [0.0, 1.0]]), count=1)
        >>> found.latents.flatten(), found.cosines.flatten()
        (tensor([1, 0, 1]), tensor([0.8000, 0.8000, 0.6000]))
    """
    require_at_least(1, count, "count")
    u, counts = _unit_directions(dictionary, alive, "dictionary")
    if other is None:
        v, candidates = u, counts
    else:
        v, candidates = (one.to(u.device) for one in _unit_directions(other, None, "other"))
        if v.shape[1] != u.shape[1]:
            raise ValueError(
                f"other: expected width {u.shape[1]} to match dictionary, got {v.shape[1]}"
            )
    asked, offered = counts.nonzero().squeeze(1), candidates.nonzero().squeeze(1)
    u, v = u[asked], v[offered]
    found = NearestLatents(
        torch.full((len(counts), count), -1, device=u.device),
        torch.full((len(counts), count), torch.nan, device=u.device),
    )
    kept = min(count, len(v) - (other is None))
    if kept < 1:
        return found
    for rows in row_chunks(len(u), len(v), _COSINES):
        cosines = u[rows] @ v.T
        if other is None:
            itself = torch.arange(rows.start, rows.stop, device=u.device).unsqueeze(1)
            cosines.scatter_(1, itself, -torch.inf)
        nearest = cosines.topk(kept, dim=1)
        found.latents[asked[rows], :kept] = offered[nearest.indices]
        found.cosines[asked[rows], :kept] = nearest.values
    return found


@torch.no_grad()
def redundancy(dictionary: Tensor, threshold: float = 0.9, *, alive: Tensor | None = None) -> float:
    """Return the share of latents that have a near twin.

    A twin is another latent whose decoder direction has a cosine above the threshold;
    :func:`nearest_latents` says which. Memory is for a chunk of the cosines, never for all (M, M).

    Args:
        dictionary: (M, d), finite.
        threshold: in [-1, 1].
        alive: (M,) bool: the latents to count, and to look for twins in. Without it, all.
            Directions that are zero never count.

    Returns:
        In [0, 1]; NaN if no latent counts.

    Raises:
        TypeError: the dictionary is not a floating-point tensor, or the mask is not bool.
        ValueError: a threshold outside [-1, 1], shapes that do not match, or NaN or infinite
            values.

    Examples:
        >>> import torch
        >>> redundancy(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]))
        0.5
    """
    require_number(threshold, "threshold")
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold: expected a cosine in [-1, 1], got {threshold}")
    num_counted = len(_directions(dictionary, alive, "dictionary"))
    twins = nearest_latents(dictionary, count=1, alive=alive).cosines > threshold
    return int(twins.sum()) / num_counted if num_counted else float("nan")


def _directions(dictionary: Any, alive: Any, name: str) -> Tensor:
    """Return the unit directions (m, d) of the latents that count, in float32."""
    u, counts = _unit_directions(dictionary, alive, name)
    return u[counts]


def _unit_directions(dictionary: Any, alive: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return unit directions (M, d) in float32, and which of them count (M,)."""
    weight = as_rows(dictionary, name)
    require_finite(weight, name)
    u, squares = unit_rows(weight, torch.float32)
    counts = squares > 0
    if alive is not None:
        mask = as_tensor(alive, "alive")
        if mask.dtype != torch.bool:
            raise TypeError(f"alive: expected bool, got {mask.dtype}")
        if mask.shape != counts.shape:
            raise ValueError(
                f"alive: expected ({len(counts)},) to match {name}, got {tuple(mask.shape)}"
            )
        counts &= mask.to(counts.device)
    return u.float(), counts


def _random_like(u: Tensor, generator: torch.Generator) -> Tensor:
    """Return random directions with the mean and the covariance of the rows of u (m, d)."""
    if not len(u):
        return u
    wanted = u.double()
    mean = wanted.mean(0)
    # R^T R is m times the covariance, also if the rows lie in fewer than d dimensions.
    factor = torch.linalg.qr(wanted - mean, mode="r").R
    drawn = torch.randn(len(u), len(factor), generator=generator, dtype=torch.float64)
    # Scaling Gaussian rows to unit length evens out their covariance. So repeat both steps.
    for _ in range(_ROUNDS):
        drawn = mean + torch.linalg.qr(drawn - drawn.mean(0)).Q @ factor
        drawn = unit_rows(drawn, torch.float64)[0]
    return drawn.float()


def _mean_match(directions: list[Tensor]) -> float:
    """Return the mean cosine of matched rows, over all pairs of (m, d)."""
    return float(torch.tensor([_match(*pair) for pair in combinations(directions, 2)]).mean())


def _match(u: Tensor, v: Tensor) -> float:
    """Return the mean cosine of rows matched one to one; NaN if there are none."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise missing_extra(error, "referee") from error
    cosines = (u @ v.T).numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean(dtype="float64")) if len(rows) else float("nan")

"""Matrix products over many samples that keep float32's precision."""

from __future__ import annotations

from torch import Tensor

from monoloss_plugin._checks import looks_are_free

SUMMED_AT_ONCE = 256
"""At most this many terms of a float32 sum are added one after another.

Rounding of equal terms is biased: 16,384 of them err by 8e-5, 256 by 9e-7 (measured).
"""


def weighted_embeddings(a: Tensor, h: Tensor) -> Tensor:
    """Return w = Σ a h over samples, (M, d), of activations (N, M) and embeddings (N, d)."""
    # An accelerator's product sums by tiles, and many small ones would only cost launches.
    if not looks_are_free(a) or len(a) <= SUMMED_AT_ONCE:
        return a.T @ h
    w = a.new_zeros(a.shape[1], h.shape[1])
    for rows, embeddings in zip(a.split(SUMMED_AT_ONCE), h.split(SUMMED_AT_ONCE), strict=True):
        w += rows.T @ embeddings  # not addmm_, which goes on from w inside the product
    return w

"""The view from a sample: which latents it activates, and what each adds to the reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._chunks import row_chunks
from monoloss_plugin.gallery.reservoir import Entries, Reservoir

KEPT = 12
"""So many latents of each sample are kept."""
_ELEMENTS = 1 << 24
"""Elements of gathered directions per chunk, about: 64 MiB."""


class RowLatents(NamedTuple):
    """The latents that are strongest on each of N samples, strongest first."""

    rows: Tensor
    """(N,) int64: row numbers."""
    latents: Tensor
    """(N, 12) int32; -1 where fewer are active."""
    shares: Tensor
    """(N, 12) float32: the latent's share of the reconstruction.

    Of the reconstruction r without the decoder's bias, a latent that adds c has the share
    c·r / r·r. The shares of all active latents add up to 1, and some may be negative. NaN if the
    SAE's decoder directions cannot be known.
    """


def joined(parts: Sequence[RowLatents]) -> RowLatents:
    """Return parts as one, in the order of their rows."""
    rows, latents, shares = (torch.cat(of) for of in zip(*parts, strict=True))
    order = rows.argsort(stable=True)
    return RowLatents(rows[order], latents[order], shares[order])


class Contributions:
    """What each latent of an SAE adds to a reconstruction."""

    def __init__(self, sae: Any, num_latents: int, like: Tensor) -> None:
        bias, self.directions = decoder_directions(sae, num_latents, like)
        self._bias = like.new_zeros(like.shape[1]) if bias is None else bias
        self._lengths = None if self.directions is None else self.directions.norm(dim=1)

    def of(self, entries: Entries, rows: Tensor, reconstruction: Tensor) -> RowLatents:
        """Return the strongest latents of some samples.

        Args:
            entries: the positive activations of B samples, by their place in 0 to B - 1.
            rows: (B,) the samples' row numbers.
            reconstruction: (B, d_in)
        """
        strength = entries.values
        if self._lengths is not None:
            strength = strength * self._lengths[entries.latents]
        strongest = Reservoir(len(rows), KEPT, rows.device)
        strongest.add(Entries(entries.rows, entries.latents, entries.values), strength)
        latents, values = strongest.rows, strongest.values
        shares = torch.full_like(values, torch.nan)
        if self.directions is not None:
            r = (reconstruction - self._bias).float()
            whole = r.square().sum(1, keepdim=True)
            for part in row_chunks(len(rows), KEPT * r.shape[1], _ELEMENTS):
                directions = self.directions[latents[part].clamp(min=0)]
                along = (directions @ r[part].unsqueeze(2)).squeeze(2)
                shares[part] = values[part] * along / whole[part]
        return RowLatents(rows.cpu(), latents.int().cpu(), shares.cpu())


def decoder_directions(sae: Any, num_latents: int, like: Tensor) -> tuple[Tensor | None, ...]:
    """Return an SAE's decoder bias (d_in,) and directions (M, d_in), what a unit of a latent adds.

    They come from decoding, so they hold for every linear decoder, whatever it does to latents
    first. Where that fails, they are SAELens's ``b_dec`` and ``W_dec``, or None.

    Args:
        sae: with ``decode``.
        num_latents: M.
        like: a reconstruction (B, d_in), for dtype and device.
    """
    try:
        bias = sae.decode(like.new_zeros(1, num_latents))[0]
        parts = []
        for part in row_chunks(num_latents, num_latents, _ELEMENTS):
            units = like.new_zeros(part.stop - part.start, num_latents)
            units[:, part].fill_diagonal_(1.0)
            parts.append(sae.decode(units) - bias)
        return bias, torch.cat(parts).float()
    except Exception:  # a decoder may depend on the batch that was encoded before
        weight, bias = getattr(sae, "W_dec", None), getattr(sae, "b_dec", None)
        return bias, weight.float() if isinstance(weight, Tensor) else None

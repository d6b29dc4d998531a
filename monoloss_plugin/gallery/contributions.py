"""The view from a sample: which latents it activates, and what each adds to the reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._chunks import row_chunks
from monoloss_plugin.gallery.reservoir import Entries, Reservoir
from monoloss_plugin.kernels.support import Support

KEPT = 12
"""So many latents of each sample are kept."""
_ELEMENTS = 1 << 24
"""Elements of gathered directions per chunk, about: 64 MiB."""
_UNITS = 64.0
"""The activation that is decoded. In half precision the decoder's bias would round away what an
activation of 1 adds."""


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
    SAE's decoder directions cannot be known. Of an image with patches, these are the shares of the
    mean of the patches' reconstructions.
    """


def joined(parts: Sequence[RowLatents]) -> RowLatents:
    """Return parts as one, in the order of their rows."""
    rows, latents, shares = (torch.cat(of) for of in zip(*parts, strict=True))
    order = rows.argsort(stable=True)
    return RowLatents(rows[order], latents[order], shares[order])


class Contributions:
    """What each latent of an SAE adds to a reconstruction.

    Args:
        sae: with ``encode`` and ``decode``.
        num_latents: M.
        sample: (1, d_in), one that the SAE encodes, for :func:`decoder_directions`.
    """

    def __init__(self, sae: Any, num_latents: int, sample: Tensor) -> None:
        self.directions = decoder_directions(sae, num_latents, sample)
        self._lengths = None if self.directions is None else self.directions.norm(dim=1)

    def of(self, entries: Entries, rows: Tensor, activations: Tensor | Support) -> RowLatents:
        """Return the strongest latents of some samples.

        Args:
            entries: the positive activations of B samples, by their place in 0 to B - 1.
            rows: (B,) the samples' row numbers.
            activations: (B, M), all of them.
        """
        strength = entries.values
        if self._lengths is not None:
            strength = strength * self._lengths[entries.latents]
        strongest = Reservoir(len(rows), KEPT, rows.device)
        strongest.add(Entries(entries.rows, entries.latents, entries.values), strength)
        latents, values = strongest.rows, strongest.values
        shares = torch.full_like(values, torch.nan)
        if self.directions is not None:
            r = _added_up(activations, self.directions)
            whole = r.square().sum(1, keepdim=True)
            for part in row_chunks(len(rows), KEPT * r.shape[1], _ELEMENTS):
                directions = self.directions[latents[part].clamp(min=0)]
                along = (directions @ r[part].unsqueeze(2)).squeeze(2)
                shares[part] = values[part] * along / whole[part]
        return RowLatents(rows.cpu(), latents.int().cpu(), shares.cpu())


def decoder_directions(sae: Any, num_latents: int, sample: Tensor) -> Tensor | None:
    """Return an SAE's decoder directions (M, d_in), what a unit of a latent adds; or None.

    They come from decoding, so they hold for every linear decoder, whatever it does to latents
    first. An SAE that scales each sample, and scales its reconstruction back, has them on the scale
    of ``sample``.

    Args:
        sae: with ``encode`` and ``decode``.
        num_latents: M.
        sample: (1, d_in)
    """

    def decode(rows: slice, units: float) -> Tensor:
        """Decode so many units of each latent of ``rows``, and nothing else."""
        # SAELens's SAEs scale a reconstruction by what they noted of the samples that they encoded
        # last, and some forget it then.
        like = sae.encode(sample)
        latents = torch.zeros(rows.stop - rows.start, num_latents).to(like.device, like.dtype)
        latents[:, rows].fill_diagonal_(units)
        decoded: Tensor = sae.decode(latents)
        return decoded.float()

    try:
        bias = decode(slice(0, 1), 0.0)
        chunks = row_chunks(num_latents, num_latents, _ELEMENTS)
        return torch.cat([(decode(rows, _UNITS) - bias) / _UNITS for rows in chunks])
    except Exception:  # a decoder may know only the batch that was encoded before
        return None


def _added_up(activations: Tensor | Support, directions: Tensor) -> Tensor:
    """Return reconstructions without the decoder's bias, (B, d_in) float32."""
    if isinstance(activations, Support):
        return replace(activations, values=activations.values.float()).by_sample() @ directions
    return activations.float() @ directions

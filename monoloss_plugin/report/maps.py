"""The heat maps of a page: which there is room for, and what the page holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin.features import FeatureSet
from monoloss_plugin.gallery.covered import WHOLE, covered_part
from monoloss_plugin.gallery.grid import size_of
from monoloss_plugin.gallery.maps import NOT_HELD, view_patches
from monoloss_plugin.gallery.overlay import BRIGHT, DARK, OPAQUE, UNSEEN
from monoloss_plugin.gallery.samples import ActivatingSamples
from monoloss_plugin.gallery.show import preprocessing_of
from monoloss_plugin.report.packing import BASE64, pack_floats, pack_integers

STRONGEST = 4
"""So many latents of each place of an image are in the page."""
FULL, UNKNOWN = 254, 255
"""What stands for a latent's largest activation, and for one that is not known."""
_SHARE, _SHARE_OF_PLACES = 0.4, 0.2
"""Shares of the page's room that the maps of the bands, and the latents of places, may take."""
_PLANS = (("top", "middle", "bottom"), None), (("top",), None), (("top",), 4), (("top",), 1)
"""Bands that have maps, and for how many images of each latent; the best plan first."""


@dataclass(frozen=True)
class Plan:
    """Which heat maps a page has room for."""

    counts: Mapping[str, int]
    """How many images of each latent have a map, by band; bands without maps are left out."""
    size: int
    """Bytes that these maps take, about."""
    each: float
    """Bytes that the strongest latents of an image's places take, about."""
    reserved: int
    """Bytes that are kept for these."""


def plan_maps(saes: Sequence[ActivatingSamples], features: FeatureSet, room: int) -> Plan:
    """Choose the heat maps that fit into a share of so many bytes.

    Args:
        saes: what was found of each SAE.
        features: a patch set.
        room: bytes for maps and images together.
    """
    assert features.patches is not None
    places = float(features.patches.grids.double().prod(1).mean())
    for bands, most in _PLANS:
        counts = {name: most or saes[0].bands[name].rows.shape[1] for name in bands}
        maps = sum(
            int((one.bands[name].rows[:, :count] >= 0).sum())
            for one in saes
            for name, count in counts.items()
        )
        size = int(BASE64 * places * maps)
        if size <= _SHARE * room:
            break
    else:
        counts, size = {}, 0
    widest = max(one.evaluation.num_latents for one in saes)
    of_latent = 2 if widest - NOT_HELD <= 1 << 16 else 4
    each = BASE64 * places * STRONGEST * (of_latent + 1) * len(saes)
    rows = torch.cat([band.rows.flatten() for one in saes for band in one.bands.values()])
    wanted = each * len(rows.unique())
    return Plan(counts, size, each, int(min(wanted, _SHARE_OF_PLACES * room)))


@dataclass(frozen=True)
class LatentMaps:
    """The heat maps of an SAE.

    Activations are whole numbers: 254 is the latent's largest one, 1 the least above 0, and 255 one
    that is not known.
    """

    bands: Mapping[str, tuple[int, Tensor]]
    """By band: for how many images of each latent there is a map, and the maps (n,) uint8, one
    after another: latent by latent, for each image of the band that is in the page."""
    strongest: tuple[Tensor, Tensor]
    """Of the first images of the page, the four strongest latents at each place and their
    activations (n,) uint8: image by image, place by place. A latent is -1 where there is none, and
    :data:`NOT_HELD` where the set does not hold the patch; its activation is then not known."""

    def packed(self) -> dict[str, Any]:
        """Return what the page's script reads."""
        latents, codes = self.strongest
        return {
            "maps": {
                name: {"count": count, "codes": pack_integers(maps)}
                for name, (count, maps) in self.bands.items()
            },
            "strongest": [pack_integers(latents), pack_integers(codes)],
        }


@dataclass(frozen=True)
class Grids:
    """The grids of the I images of a page."""

    grids: Tensor
    """(I, 2) height and width, in patches."""
    sizes: Tensor
    """(I, 2) width and height of the thumbnail, in pixels; 0 if it cannot be read."""
    parts: Tensor
    """(I, 4) left, top, width and height of what a grid covers, in shares of the image's size."""
    num_seen: int
    """Of so many images, the first, the page has the latents at each place."""
    parts_known: bool
    """Whether the record says which part of an image the encoder sees."""

    def packed(self) -> dict[str, Any]:
        """Return what the page's script reads."""
        return {
            "grids": pack_integers(self.grids),
            "sizes": pack_integers(self.sizes),
            "parts": pack_floats(self.parts),
            "seen": self.num_seen,
            "strongest": STRONGEST,
            "notHeld": NOT_HELD,
            "dark": DARK,
            "bright": BRIGHT,
            "opaque": OPAQUE,
            "unseen": UNSEEN,
        }


def grids_of(
    features: FeatureSet, rows: Tensor, thumbnails: Sequence[bytes], num_seen: int
) -> Grids:
    """Return the grids of the images of a page.

    Args:
        features: a patch set.
        rows: (I,) the images' numbers.
        thumbnails: (I,) files, empty where an image cannot be read.
        num_seen: see :attr:`Grids.num_seen`.
    """
    assert features.patches is not None
    said = preprocessing_of(features)
    sizes = [size_of(one) if one else (0, 0) for one in thumbnails]
    parts = [covered_part(said, size) if min(size) else WHOLE for size in sizes]
    return Grids(
        features.patches.grids[rows].long(),
        torch.tensor(sizes).view(-1, 2),
        torch.tensor([part or WHOLE for part in parts]).view(-1, 4),
        num_seen,
        None not in parts,
    )


def latent_maps(
    found: ActivatingSamples,
    features: FeatureSet,
    plan: Plan,
    rows: Tensor,
    num_seen: int,
    *,
    progress: bool = False,
) -> LatentMaps:
    """Encode the images of a page, and return the heat maps that were planned.

    Args:
        found: what was found of the SAE, on the same patch set.
        features: the patch set.
        plan: which maps.
        rows: (I,) the numbers of the page's images.
        num_seen: of so many of them the strongest latents of each place.
        progress: show a progress bar.
    """
    assert found.sae is not None
    assert features.patches is not None
    pairs = {}
    for name, count in plan.counts.items():
        of_band = found.bands[name].rows[:, :count]
        latents, ranks = torch.isin(of_band, rows).nonzero().unbind(1)
        pairs[name] = latents, of_band[latents, ranks]
    none = torch.zeros(0, dtype=torch.int64)
    view = view_patches(
        *(found.sae, features),
        latents=torch.cat([none, *(latents for latents, _ in pairs.values())]),
        images=torch.cat([none, *(images for _, images in pairs.values())]),
        also=rows[:num_seen],
        count=STRONGEST,
        normalize=found.unit_norm,
        progress=progress,
    )
    largest = found.top.values[:, 0]
    maps = iter(view.maps)
    bands = {}
    for name, (latents, _) in pairs.items():
        codes = [
            activation_codes(next(maps).flatten(), largest[latent]) for latent in latents.tolist()
        ]
        bands[name] = plan.counts[name], _joined(codes)
    return LatentMaps(
        bands,
        (
            _joined([one.latents.flatten() for one in view.strongest]),
            _joined(
                [
                    activation_codes(one.values, largest[one.latents.clamp(min=0).long()]).flatten()
                    for one in view.strongest
                ]
            ),
        ),
    )


def activation_codes(activations: Tensor, largest: Tensor) -> Tensor:
    """Return activations as whole numbers, uint8; see :class:`LatentMaps`.

    Examples:
        >>> activation_codes(torch.tensor([2.0, 1.0, 1e-6, 0.0, torch.nan]), torch.tensor(2.0))
        tensor([254, 127,   1,   0, 255], dtype=torch.uint8)
    """
    shares = activations.double().clamp(min=0) / largest.double().clamp(min=1e-30)
    codes = (shares * FULL).round().clamp(max=FULL)
    return torch.where(shares > 0, codes.clamp(min=1), codes).nan_to_num(UNKNOWN).byte()


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)

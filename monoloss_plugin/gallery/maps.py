"""Where in an image a latent is active: its activation at each place of the grid of patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_rows, require_at_least, require_finite
from monoloss_plugin._progress import progress_bar
from monoloss_plugin._sae import SAE, device_of, require_width
from monoloss_plugin._samples import Samples, scaling_for
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.feature_set import require_set
from monoloss_plugin.other_saes import as_sae

NOT_HELD = -2
"""Stands for the latents of a patch that the set does not hold."""


class StrongestLatents(NamedTuple):
    """The latents that are strongest at each place of an image's grid, strongest first."""

    latents: Tensor
    """(h, w, k) int32; -1 where fewer are active, and :data:`NOT_HELD` where the set does not hold
    the patch."""
    values: Tensor
    """(h, w, k) float32: their activations; 0 where there is none, and NaN where the set does not
    hold the patch."""


class PatchView(NamedTuple):
    """What :func:`view_patches` found, on the CPU."""

    maps: list[Tensor]
    """One map (h, w) for each pair, as :func:`heat_maps` returns them."""
    strongest: list[StrongestLatents]
    """One for each image that was asked for."""


def heat_maps(
    sae: SAE,
    features: FeatureSet,
    latents: Sequence[int] | Tensor,
    images: Sequence[int] | Tensor,
    *,
    normalize: bool | None = None,
    batch_size: int = 2048,
    progress: bool = False,
) -> list[Tensor]:
    """Return the activations of latents over the grids of images. Only these images are encoded.

    Args:
        sae: as ``evaluate`` takes it.
        features: a patch set.
        latents: (P,) which latent, for each map.
        images: (P,) over which image, for each map: rows of ``features.images``.
        normalize: as in ``evaluate``.
        batch_size: patches that are encoded at once, about.
        progress: show a progress bar.

    Returns:
        P maps (h, w), float32, on the CPU. An activation is NaN where the set does not hold the
        patch. Class tokens are left out.

    Raises:
        TypeError: the SAE, the features or the numbers are of another kind.
        ValueError: the features are no patch set, the numbers of latents and images differ, or
            there is no such latent.
        IndexError: there is no such image.

    Examples:
        >>> features = FeatureSet.from_tensors(torch.eye(4).reshape(1, 4, 4))
        >>> class Identity:
        ...     encode = decode = staticmethod(torch.relu)
        >>> heat_maps(Identity(), features, [2], [0], normalize=False)
        [tensor([[0., 0.],
                [1., 0.]])]
    """
    found = view_patches(
        *(sae, features, latents, images),
        normalize=normalize,
        batch_size=batch_size,
        progress=progress,
    )
    return found.maps


@torch.no_grad()
def view_patches(
    sae: SAE,
    features: FeatureSet,
    latents: Sequence[int] | Tensor,
    images: Sequence[int] | Tensor,
    *,
    also: Sequence[int] | Tensor = (),
    count: int = 4,
    normalize: bool | None = None,
    batch_size: int = 2048,
    progress: bool = False,
) -> PatchView:
    """Return :func:`heat_maps`, and the strongest latents at each place, from one pass.

    Args:
        sae: as in :func:`heat_maps`.
        features: as in :func:`heat_maps`.
        latents: as in :func:`heat_maps`.
        images: as in :func:`heat_maps`.
        also: (I,) images whose strongest latents are wanted, each once.
        count: latents of each place.
        normalize: as in ``evaluate``.
        batch_size: as in :func:`heat_maps`.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError, IndexError: as :func:`heat_maps`.
    """
    sae = as_sae(sae)
    require_set(features, "features")
    require_at_least(1, count, "count")
    if features.patches is None:
        raise ValueError("features: expected a patch set, got a set of one vector for each image")
    columns, of = _numbers(latents, "latents"), _numbers(images, "images")
    if len(columns) != len(of):
        raise ValueError(
            f"images: expected {len(columns)}, one for each of the latents, got {len(of)}"
        )
    wanted = _numbers(also, "also")
    every = torch.cat((of, wanted)).unique()
    if (wrong := _first_beyond(features.num_images, every)) is not None:
        raise IndexError(f"images: expected 0 to {features.num_images - 1}, got {wrong}")
    maps: dict[int, Tensor] = {}
    strongest: dict[int, StrongestLatents] = {}
    its_pairs = dict(zip(of.unique().tolist(), _by_image(of), strict=True))
    none, asked = torch.zeros(0, dtype=torch.int64), set(wanted.tolist())
    scaled = scaling_for(sae, Samples.of(features, None, None, None, batch_size), normalize)
    with progress_bar("Drawing heat maps", len(every), progress and bool(len(every))) as advance:
        for image, place, activations in _encoded(sae, features, every, scaled, batch_size):
            grid = tuple(features.patches.grids[image].tolist())
            its = its_pairs.get(image, none)
            _require_latents(columns[its], activations.shape[1])
            chosen = activations[:, columns[its].to(activations.device)].float().cpu()
            drawn = _on_grid(chosen, place, grid, torch.nan).movedim(-1, 0).contiguous()
            maps.update(zip(its.tolist(), drawn.unbind(0), strict=True))
            if image in asked:
                best = activations.topk(min(count, activations.shape[1]), 1)
                fewer = (0, count - best.values.shape[1])  # of an SAE with fewer latents
                values = F.pad(best.values.float().cpu().clamp(min=0), fewer)
                latent = F.pad(best.indices.cpu().int(), fewer).masked_fill(values == 0, -1)
                strongest[image] = StrongestLatents(
                    _on_grid(latent, place, grid, NOT_HELD),
                    _on_grid(values, place, grid, torch.nan),
                )
            advance(1)
    return PatchView(
        [maps[pair] for pair in range(len(of))], [strongest[image] for image in wanted.tolist()]
    )


def _encoded(
    sae: SAE, features: FeatureSet, images: Tensor, scaled: bool, batch_size: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each image, the places (p,) of its patches and their activations (p, M)."""
    assert features.patches is not None
    starts, device = features.patches.starts, device_of(sae)
    counts = starts[images + 1] - starts[images]
    of_batch = (counts.cumsum(0) - counts).div(batch_size, rounding_mode="floor")
    for some in images.split(of_batch.unique_consecutive(return_counts=True)[1].tolist()):
        rows = features.patches.rows_of(some)
        given = features.take(rows)
        given = given.to(device, torch.promote_types(given.dtype, torch.float32))
        require_width(sae, given.shape)
        require_finite(given, "features")
        if scaled:
            given, _ = unit_rows(given, torch.float32)
        encoded = as_rows(sae.encode(given), "sae.encode(features)")
        places = features.patches.places[rows].long()
        sizes = (starts[some + 1] - starts[some]).tolist()
        for image, place, activations in zip(
            some.tolist(), places.split(sizes), encoded.split(sizes), strict=True
        ):
            kept = (place >= 0).nonzero().squeeze(1)
            yield image, place[kept], activations[kept.to(activations.device)]


def _by_image(images: Tensor) -> tuple[Tensor, ...]:
    """Return the numbers of the pairs of each image, in the order of the images (P,)."""
    counts = images.unique(return_counts=True)[1].tolist()
    return images.argsort(stable=True).split(counts) if counts else ()


def _on_grid(values: Tensor, place: Tensor, grid: tuple[int, ...], other: float) -> Tensor:
    """Return values (p, ...) at their places on a grid (h, w, ...)."""
    height, width = grid
    found = values.new_full((height * width, *values.shape[1:]), other)
    found[place] = values
    return found.view(height, width, *values.shape[1:])


def _numbers(given: Any, name: str) -> Tensor:
    numbers = as_labels(torch.zeros(0, dtype=torch.int64) if not len(given) else given, name)
    return numbers.flatten().long().cpu()


def _require_latents(latents: Tensor, num_latents: int) -> None:
    if (wrong := _first_beyond(num_latents, latents)) is not None:
        raise ValueError(f"latents: expected 0 to {num_latents - 1}, got {wrong}")


def _first_beyond(count: int, numbers: Tensor) -> int | None:
    """Return the first number that is not in [0, count); None if there is none."""
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    return int(wrong[0]) if len(wrong) else None

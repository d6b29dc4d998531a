"""Look at latents: which images activate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_list, require_at_least, require_choice, require_flag
from monoloss_plugin._places import kind_of
from monoloss_plugin._sae import SAE
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.feature_set import require_set
from monoloss_plugin.gallery.covered import WHOLE, Part, covered_part
from monoloss_plugin.gallery.grid import LatentGrid, ShownImage, ShownLatent, size_of
from monoloss_plugin.gallery.maps import heat_maps
from monoloss_plugin.gallery.overlay import Overlay
from monoloss_plugin.gallery.pictures import Pictures, open_pictures
from monoloss_plugin.gallery.samples import ActivatingSamples, activating_samples
from monoloss_plugin.gallery.thumbnails import is_pixelated, make_thumbnails
from monoloss_plugin.results import Evaluation, ImageMeasures

BANDS = ("top", "middle", "bottom", "near misses")
ORDERS = ("adjusted", "score", "purity", "purity_adjusted", "support", "largest")
"""What :func:`show_latents` can sort latents by: columns of ``Evaluation.latents()``."""
ORDERS_OF_PATCHES = ("images_max_adjusted", "images_mean_adjusted", "coherence", "extent")
"""What it can sort by too if the features are patches."""
UNKNOWN_PART = (
    "The record of the features does not say which part of an image the encoder sees, so the maps "
    "lie over whole images."
)

_SIZE = 96
"""Pixels of a thumbnail; a notebook shows it smaller, and sharp on screens of high density."""


class ActivatingImage(NamedTuple):
    """An image that activates a latent."""

    image_id: str
    """Its id in the feature set; its row number if the set has no ids."""
    activation: float
    row: int
    """Its row in the feature set; in ``features.images`` if these are patches."""


def top_images(
    sae: SAE | ActivatingSamples,
    features: FeatureSet,
    latents: Sequence[int] | None = None,
    *,
    count: int = 8,
    progress: bool = False,
) -> dict[int, list[ActivatingImage]]:
    """Return the images that activate latents most.

    Args:
        sae: an SAE; or what :func:`activating_samples` found of it, which saves the pass.
        features: the features of the images, or of their patches.
        latents: which latents; by default all that are active.
        count: images of each latent. What was found before may hold fewer.
        progress: show a progress bar.

    Returns:
        For each latent its images, strongest first.

    Raises:
        TypeError, ValueError: as :func:`~monoloss_plugin.evaluation.evaluate`; or there is no such
            latent.
    """
    found = _found(sae, features, count, progress)
    active = (found.evaluation.monoscore.support > 0).nonzero().flatten().tolist()
    features = features.images
    wanted = active if latents is None else _numbers(latents, found.evaluation)
    return {
        latent: [
            ActivatingImage(_image_id(features, row), value, row)
            for row, value in _members(found, "top", latent)[:count]
        ]
        for latent in wanted
    }


def show_latents(
    sae: SAE | ActivatingSamples,
    features: FeatureSet,
    images: Any = None,
    *,
    latents: Sequence[int] | None = None,
    top: int = 20,
    by: str = "adjusted",
    bands: Sequence[str] = BANDS,
    count: int = 8,
    progress: bool = False,
) -> LatentGrid:
    """Show the images that activate latents, in a notebook.

    If the features are patches, a heat map over each image shows where the latent is active.

    Args:
        sae: an SAE; or what :func:`activating_samples` found of it, which saves the pass.
        features: the features of the images, or of their patches.
        images: the images, as :func:`~monoloss_plugin.gallery.pictures.open_pictures` takes them;
            by default those that the features' record tells of.
        latents: which latents to show. By default the ``top`` ones of those that are above chance
            (``significant`` in ``Evaluation.latents()``); if none is, of those that have a score.
        top: how many latents to show.
        by: what they are sorted by, the largest first: :data:`ORDERS`; of patches also
            :data:`ORDERS_OF_PATCHES`.
        bands: which images to show of each latent: "top", "middle", "bottom" and "near misses".
            The last do not activate the latent, though they are similar to those that do.
        count: images in each band. What was found before may hold fewer.
        progress: show progress bars.

    Returns:
        What a notebook shows as a table of images. Its ``figure()`` draws it with matplotlib.

    Raises:
        TypeError, ValueError: as ``evaluate`` and ``open_pictures``; there is no such latent, band
            or order; or the features have no labels to sort by purity.
    """
    require_at_least(1, top, "top")
    require_set(features, "features")
    require_choice(by, "by", ORDERS if features.patches is None else ORDERS + ORDERS_OF_PATCHES)
    shown = as_list(bands, "bands")
    for band in shown:
        require_choice(band, "bands", BANDS)
    pictures = open_pictures(images, features)
    found = _found(sae, features, count, progress)
    evaluation = found.evaluation
    wanted = best_latents(evaluation, top, by) if latents is None else latents
    return latent_grid(
        *(found, pictures, _numbers(wanted, evaluation), shown, count, progress),
        features=features,
    )


def best_latents(evaluation: Evaluation, top: int, by: str = "adjusted") -> list[int]:
    """Return the latents that are largest in a measure, of those that are above chance.

    If none is above chance, these are the largest of those that have a score.

    Raises:
        ValueError: a purity, for samples without labels.
    """
    monoscore, purity, images = evaluation.monoscore, evaluation.purity, evaluation.images
    if images is None and by in ORDERS_OF_PATCHES:
        raise ValueError(f"by: {by!r} needs features of patches")
    if purity is None and by.startswith("purity"):
        raise ValueError(f"by: {by!r} needs features with labels")
    values = {
        "adjusted": monoscore.adjusted,
        "score": monoscore.scores,
        "support": monoscore.support,
        "largest": monoscore.largest,
        **({} if purity is None else {"purity": purity.binary}),
        **({} if purity is None else {"purity_adjusted": purity.adjusted}),
        **({} if images is None else _of_patches(images)),
    }[by].double()
    candidates = evaluation.tested.significant()
    candidates = candidates if bool(candidates.any()) else monoscore.defined
    values = values.nan_to_num(-torch.inf).masked_fill(~candidates, -torch.inf)
    number = min(top, int((values > -torch.inf).sum()))
    order: list[int] = values.argsort(descending=True, stable=True)[:number].tolist()
    return order


def _of_patches(images: ImageMeasures) -> dict[str, Tensor]:
    """Return what :data:`ORDERS_OF_PATCHES` names."""
    return {
        "images_max_adjusted": images.largest.adjusted,
        "images_mean_adjusted": images.mean.adjusted,
        "coherence": images.coherence,
        "extent": images.extent,
    }


def latent_grid(
    found: ActivatingSamples,
    pictures: Pictures,
    latents: Sequence[int],
    bands: Sequence[str] = BANDS,
    count: int = 8,
    progress: bool = False,
    titles: Sequence[str] | None = None,
    *,
    features: FeatureSet | None = None,
) -> LatentGrid:
    """Return latents with their images.

    Args:
        found: what was found of the SAE.
        pictures: of the rows of the features.
        latents: which latents.
        bands: which bands of images.
        count: images in each band, at most.
        progress: show a progress bar.
        titles: one for each latent; by default its number and its measures.
        features: with a patch set, heat maps lie over the images that activate a latent.
    """
    members = [
        {band: _members(found, band, latent)[:count] for band in bands} for latent in latents
    ]
    rows = {row for one in members for of in one.values() for row, _ in of}
    thumbnails = make_thumbnails(pictures, sorted(rows), _SIZE, progress=progress)
    maps: dict[tuple[int, int], Tensor] = {}
    if features is not None and features.patches is not None and found.sae is not None:
        maps = _maps_of(found, features, latents, members, progress)
    parts = {row: _part_of(features, one) for row, one in thumbnails.items() if one and maps}

    def image_of(latent: int, row: int, value: float) -> ShownImage:
        overlay = None
        if (latent, row) in maps and row in parts:
            overlay = Overlay(maps[latent, row], largest_of(found, latent), parts[row] or WHOLE)
        return ShownImage(pictures.name(row), value, thumbnails[row], overlay)

    shown = []
    for number, latent in enumerate(latents):
        title = _title(found.evaluation, latent) if titles is None else titles[number]
        images = {
            band: [image_of(latent, row, value) for row, value in of]
            for band, of in members[number].items()
        }
        shown.append(ShownLatent(title, images, largest_of(found, latent) if maps else None))
    notes = [UNKNOWN_PART] if None in parts.values() else []
    return LatentGrid(shown, is_pixelated(thumbnails.values()), notes)


def largest_of(found: ActivatingSamples, latent: int) -> float:
    """Return the largest activation of a latent; 0 if it is never active."""
    return float(found.top.values[latent, 0])


def _maps_of(
    found: ActivatingSamples,
    features: FeatureSet,
    latents: Sequence[int],
    members: Sequence[Mapping[str, Sequence[tuple[int, float]]]],
    progress: bool,
) -> dict[tuple[int, int], Tensor]:
    """Return the heat maps of latents over the images that activate them, by latent and row."""
    pairs = [
        (latent, row)
        for latent, bands in zip(latents, members, strict=True)
        for band, of in bands.items()
        if band != "near misses"
        for row, _ in of
    ]
    assert found.sae is not None
    maps = heat_maps(
        *(found.sae, features, [latent for latent, _ in pairs], [row for _, row in pairs]),
        normalize=found.unit_norm,
        progress=progress,
    )
    return dict(zip(pairs, maps, strict=True))


def _part_of(features: FeatureSet | None, thumbnail: bytes) -> Part | None:
    """Return the part of an image that its encoder sees; None if that is not known."""
    assert features is not None
    return covered_part(preprocessing_of(features), size_of(thumbnail))


def preprocessing_of(features: FeatureSet) -> Mapping[str, Any]:
    """Return what the record says of how images become inputs; empty if it does not say."""
    said = features.record.encoder.get("preprocessing")
    return said if isinstance(said, Mapping) else {}


def _found(sae: Any, features: FeatureSet, count: int, progress: bool) -> ActivatingSamples:
    require_at_least(1, count, "count")
    require_flag(progress, "progress")
    require_set(features, "features")
    if isinstance(sae, ActivatingSamples):
        return sae
    return activating_samples(sae, features, count=count, progress=progress)


def _numbers(latents: Any, evaluation: Evaluation) -> list[int]:
    numbers: list[int] = []
    for latent in as_list(latents, "latents"):
        if isinstance(latent, bool) or not hasattr(latent, "__index__"):
            raise TypeError(f"latents: expected integers, got {kind_of(latent)}")
        if not 0 <= latent < evaluation.num_latents:
            raise ValueError(f"latents: expected 0 to {evaluation.num_latents - 1}, got {latent}")
        numbers.append(latent.__index__())
    return numbers


def _members(found: ActivatingSamples, band: str, latent: int) -> list[tuple[int, float]]:
    """Return the rows and values of a latent in a band."""
    rows, values = (of[latent].tolist() for of in found.bands[band])
    return [(row, value) for row, value in zip(rows, values, strict=True) if row >= 0]


def _title(evaluation: Evaluation, latent: int) -> str:
    monoscore, purity, images = evaluation.monoscore, evaluation.purity, evaluation.images
    support = int(monoscore.support[latent])
    active = f"active on {support:,}"
    if images is not None:
        active += f" patches of {int(images.largest.support[latent]):,} images"
    if not bool(monoscore.defined[latent]):
        return f"Latent {latent}: {active}, no score"
    parts = [
        f"score {float(monoscore.scores[latent]):.2f}",
        f"above chance {float(monoscore.adjusted[latent]):.2f}",
        active,
    ]
    if purity is not None and support:
        name = evaluation.class_name(int(purity.dominant[latent]))
        parts.append(f"{float(purity.binary[latent]):.0%} of class {name}")
    return f"Latent {latent}: {', '.join(parts)}"


def _image_id(features: FeatureSet, row: int) -> str:
    ids = features.ids_of(torch.tensor([row]))
    return str(row) if ids is None else ids[0]

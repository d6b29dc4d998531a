"""Look at latents: which images activate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from monoloss_plugin._checks import as_list, require_at_least, require_choice, require_flag
from monoloss_plugin._places import kind_of
from monoloss_plugin._sae import SAE
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.feature_set import require_set
from monoloss_plugin.gallery.grid import LatentGrid, ShownImage, ShownLatent
from monoloss_plugin.gallery.pictures import Pictures, open_pictures
from monoloss_plugin.gallery.samples import ActivatingSamples, activating_samples
from monoloss_plugin.gallery.thumbnails import is_pixelated, make_thumbnails
from monoloss_plugin.results import Evaluation

BANDS = ("top", "middle", "bottom", "near misses")
ORDERS = ("adjusted", "score", "purity", "purity_adjusted", "support", "largest")
"""What :func:`show_latents` can sort latents by: columns of ``Evaluation.latents()``."""

_SIZE = 96
"""Pixels of a thumbnail; a notebook shows it smaller, and sharp on screens of high density."""


class ActivatingImage(NamedTuple):
    """An image that activates a latent."""

    image_id: str
    """Its id in the feature set; its row number if the set has no ids."""
    activation: float
    row: int
    """Its row in the feature set."""


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
        features: the features of the images.
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

    Args:
        sae: an SAE; or what :func:`activating_samples` found of it, which saves the pass.
        features: the features of the images.
        images: the images, as :func:`~monoloss_plugin.gallery.pictures.open_pictures` takes them;
            by default those that the features' record tells of.
        latents: which latents to show. By default the ``top`` ones of those that are above chance
            (``significant`` in ``Evaluation.latents()``); if none is, of those that have a score.
        top: how many latents to show.
        by: what they are sorted by, the largest first: :data:`ORDERS`.
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
    require_choice(by, "by", ORDERS)
    shown = as_list(bands, "bands")
    for band in shown:
        require_choice(band, "bands", BANDS)
    pictures = open_pictures(images, features)
    found = _found(sae, features, count, progress)
    evaluation = found.evaluation
    wanted = best_latents(evaluation, top, by) if latents is None else latents
    return latent_grid(found, pictures, _numbers(wanted, evaluation), shown, count, progress)


def best_latents(evaluation: Evaluation, top: int, by: str = "adjusted") -> list[int]:
    """Return the latents that are largest in a measure, of those that are above chance.

    If none is above chance, these are the largest of those that have a score.

    Raises:
        ValueError: a purity, for samples without labels.
    """
    monoscore, purity = evaluation.monoscore, evaluation.purity
    if purity is None and by.startswith("purity"):
        raise ValueError(f"by: {by!r} needs features with labels")
    values = {
        "adjusted": monoscore.adjusted,
        "score": monoscore.scores,
        "support": monoscore.support,
        "largest": monoscore.largest,
        **({} if purity is None else {"purity": purity.binary}),
        **({} if purity is None else {"purity_adjusted": purity.adjusted}),
    }[by].double()
    candidates = monoscore.significant()
    candidates = candidates if bool(candidates.any()) else monoscore.defined
    values = values.nan_to_num(-torch.inf).masked_fill(~candidates, -torch.inf)
    number = min(top, int((values > -torch.inf).sum()))
    order: list[int] = values.argsort(descending=True, stable=True)[:number].tolist()
    return order


def latent_grid(
    found: ActivatingSamples,
    pictures: Pictures,
    latents: Sequence[int],
    bands: Sequence[str] = BANDS,
    count: int = 8,
    progress: bool = False,
    titles: Sequence[str] | None = None,
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
    """
    members = [
        {band: _members(found, band, latent)[:count] for band in bands} for latent in latents
    ]
    rows = {row for one in members for of in one.values() for row, _ in of}
    thumbnails = make_thumbnails(pictures, sorted(rows), _SIZE, progress=progress)
    shown = []
    for number, latent in enumerate(latents):
        title = _title(found.evaluation, latent) if titles is None else titles[number]
        images = {
            band: [ShownImage(pictures.name(row), value, thumbnails[row]) for row, value in of]
            for band, of in members[number].items()
        }
        shown.append(ShownLatent(title, images))
    return LatentGrid(shown, is_pixelated(thumbnails.values()))


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
    monoscore, purity = evaluation.monoscore, evaluation.purity
    support = int(monoscore.support[latent])
    if not bool(monoscore.defined[latent]):
        return f"Latent {latent}: active on {support:,}, no score"
    parts = [
        f"score {float(monoscore.scores[latent]):.2f}",
        f"above chance {float(monoscore.adjusted[latent]):.2f}",
        f"active on {support:,}",
    ]
    if purity is not None and support:
        name = evaluation.class_name(int(purity.dominant[latent]))
        parts.append(f"{float(purity.binary[latent]):.0%} of class {name}")
    return f"Latent {latent}: {', '.join(parts)}"


def _image_id(features: FeatureSet, row: int) -> str:
    ids = features.ids_of(torch.tensor([row]))
    return str(row) if ids is None else ids[0]

"""From SAEs, features and images to the page that shows them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from monoloss_plugin import __version__
from monoloss_plugin._checks import as_list, require_at_least, require_flag
from monoloss_plugin._places import as_path, kind_of, require_file, require_folder
from monoloss_plugin._sae import SAE
from monoloss_plugin.comparison import Comparison, compare
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.feature_set import require_set
from monoloss_plugin.gallery.names import encode_texts
from monoloss_plugin.gallery.near_misses import CANDIDATES
from monoloss_plugin.gallery.pictures import open_pictures
from monoloss_plugin.gallery.samples import ActivatingSamples, KeepingScore
from monoloss_plugin.gallery.show import UNKNOWN_PART
from monoloss_plugin.report.choice import Shown, choose_images
from monoloss_plugin.report.latents import latent_table
from monoloss_plugin.report.maps import Grids, LatentMaps, grids_of, latent_maps
from monoloss_plugin.report.page import LatentTable, Page, write_page
from monoloss_plugin.saes.baselines import QUICK

_NOTES = (
    "R² is the mean over the dimensions of the features, each of which counts the same.",
    "A latent is defined if at least two images activate it. MonoScore above chance is 0 where "
    "activations are shuffled, and 1 where all images of a latent are alike.",
)
_NOTES_ON_PATCHES = (
    "R² is the mean over the dimensions of the features, each of which counts the same.",
    "Samples are patches: MonoScore compares those of different images, and a latent is defined if "
    "at least two patches activate it. Above chance is 0 where activations are shuffled, and 1 "
    "where all patches of a latent are alike.",
    "An image activates a latent if one of its patches does; its activation is the largest of "
    "them. What is significant is tested on images, with the mean of their patches.",
)
_RARE, _CORRELATED = 8, 0.5
"""Rare latents correlate by chance; above this correlation, two latents count as one finding."""


def write_report(
    saes: Mapping[str, SAE],
    features: FeatureSet,
    out: str | Path,
    *,
    images: Any = None,
    train: FeatureSet | None = None,
    texts: Sequence[str] = (),
    encoder: Any = None,
    count: int = 8,
    progress: bool = False,
) -> Path:
    """Write a page on the latents of one or more SAEs, as one HTML file that needs no network.

    The page has the measures of each SAE, its latents in a table to sort, search and filter, and
    for each latent the images that activate it most, in the middle and least, and near misses; two
    SAEs side by side; and for each image the latents that it activates.

    Args:
        saes: SAEs by name.
        features: held-out features, with the ids of their images. Of patches, the page has heat
            maps, and the latents at each place of an image.
        out: the file to write, such as ``report.html``. A file of that name is replaced.
        images: the images of the features, as
            :func:`~monoloss_plugin.gallery.pictures.open_pictures` takes them; by default those
            that the features' record tells of.
        train: training features. With them, SAEs that have learnt nothing stand beside yours.
        texts: names to choose from for every latent.
        encoder: what encodes the texts, as :func:`~monoloss_plugin.gallery.names.name_latents`
            takes it; by default the encoder of the features.
        count: images of each latent in each band.
        progress: show progress bars.

    Returns:
        The file. It has at most 50 MB: thumbnails are made as small as that asks for, and where
        that is not enough, the page says how many images it leaves out.

    Raises:
        TypeError: SAEs or features of another kind.
        ValueError: no SAEs; images or texts that do not fit the features.
        FileNotFoundError: the images cannot be found.
        IsADirectoryError, NotADirectoryError: ``out`` is a folder, or lies in a file.
        PermissionError: no file can be written there.
        ModuleNotFoundError: a library that is needed is not installed.
    """
    require_set(features, "features")
    require_at_least(1, count, "count")
    require_flag(progress, "progress")
    place = as_path(out, "out", "a file")
    _require_writable(place)
    pictures = open_pictures(images, features)  # before the long work, if it fails
    given = as_list(texts, "texts")
    named = encode_texts(given, encoder, features) if given else None
    if not isinstance(saes, Mapping):
        raise TypeError(f"saes: expected SAEs by name, got {kind_of(saes)}")
    score = KeepingScore(list(saes.values()), count, progress)
    comparison = compare(
        saes,
        features,
        train=train,
        baselines=() if train is None else QUICK,
        groups=(),
        score=score,
        progress=progress,
    )
    samples = {name: score.samples_of(sae) for name, sae in saes.items()}
    shown = choose_images(list(samples.values()), pictures, features, progress=progress)
    grids = None
    if shown.plan is not None:
        grids = grids_of(features, shown.rows, shown.thumbnails, shown.num_seen)
    tables = [
        latent_table(
            *(name, of, named, shown, list(samples.values())),
            maps=_maps_of(of, features, shown, progress),
        )
        for name, of in samples.items()
    ]
    page = Page(
        title=" and ".join(saes) if len(saes) < 3 else f"{len(saes)} SAEs",
        about=_about(samples, tables, features, shown, grids),
        **_table(comparison),
        notes=[*(_NOTES if grids is None else _NOTES_ON_PATCHES), *comparison.notes],
        classes=features.classes or [],
        num_rows=features.num_images,
        saes=tables,
        image_ids=[pictures.name(row) for row in shown.rows.tolist()],
        image_labels=(
            torch.full_like(shown.rows, -1)
            if features.images.labels is None
            else features.images.labels[shown.rows]
        ),
        thumbnails=shown.thumbnails,
        pixelated=shown.pixelated,
        grids=grids,
    )
    return write_page(page, place)


def _maps_of(
    found: ActivatingSamples, features: FeatureSet, shown: Shown, progress: bool
) -> LatentMaps | None:
    if shown.plan is None:
        return None
    return latent_maps(found, features, shown.plan, shown.rows, shown.num_seen, progress=progress)


def _require_writable(place: Path) -> None:
    """Raise an error if a file cannot be written: now, and not after the long work."""
    if place.exists():
        require_file(place, "out")
    folder = next(above for above in place.absolute().parents if above.exists())
    require_folder(folder, "out")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"out: no file can be written in {folder}")


def _about(
    samples: Mapping[str, ActivatingSamples],
    tables: Sequence[LatentTable],
    features: FeatureSet,
    shown: Shown,
    grids: Grids | None,
) -> list[tuple[str, str]]:
    """Return what the page says about where its content comes from."""
    record, source = features.record, features.record.source
    of = source.get("name") or "images without a name"
    split = f", {source['split']}" if source.get("split") else ""
    unread = sum(not one for one in shown.thumbnails)
    seen = len(shown.rows) - unread
    said = {
        "SAEs": "; ".join(
            f"{name}: {found.evaluation.num_latents:,} latents, L0 {found.evaluation.l0:.1f}"
            for name, found in samples.items()
        ),
        "Images": f"{features.num_images:,} of {of}{split}",
        "Patches": "" if grids is None else f"{len(features):,}",
        "Encoder": str(record.encoder.get("name") or "not known"),
        "Features": "; ".join(
            f"{name}: {'scaled to unit norm' if found.unit_norm else 'as they are'}"
            for name, found in samples.items()
        ),
        "Compared by": str(next(iter(samples.values())).evaluation.spaces),
        "Active together": "; ".join(map(_active_together, tables)),
        "Shown": f"{seen:,} images"
        + ("" if shown.pixelated else f", at most {shown.size} pixels wide and high"),
        "Left out": f"{shown.left_out:,} images, for which the file has no room"
        if shown.left_out
        else "",
        "Not readable": f"{unread:,} images" if unread else "",
        "Heat maps": "" if grids is None else _heat_maps(shown, grids),
        "Middle": "from a random sample of 64 activations of each latent",
        "Near misses": "from a random sample of 16,384 images"
        if features.num_images > CANDIDATES
        else "",
        "Made by": f"monoloss_plugin {__version__}",
    }
    return [(label, text) for label, text in said.items() if text]


def _heat_maps(shown: Shown, grids: Grids) -> str:
    """Return which heat maps there are, and where they lie."""
    assert shown.plan is not None
    counts = shown.plan.counts
    maps = ", ".join(f"{count} images of the {name} band" for name, count in counts.items())
    said = f"of each latent on {maps}" if counts else "none, since the file has no room"
    said += f"; the strongest latents of each place of {shown.num_seen:,} images"
    return said if grids.parts_known else f"{said}. {UNKNOWN_PART}"


def _active_together(table: LatentTable) -> str:
    """Return how many latents of an SAE are active on nearly the same images as another."""
    often = table.columns["support"] > _RARE
    correlated = table.together[1][:, 0] > _CORRELATED
    share = float((correlated & often).sum()) / max(1, int(often.sum()))
    return (
        f"{table.name}: {share:.0%} of the latents that are active on more than {_RARE} images "
        f"correlate above {_CORRELATED} with another"
    )


def _table(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as a table with a column for each SAE, and the points of its chart."""
    runs = [
        {
            "name": name,
            "baseline": name in comparison.baselines,
            "r2": run["r2"],
            "monoscore_adjusted": run["monoscore_adjusted"],
        }
        for name, of in comparison.runs.items()
        for run in of
    ]
    return {
        "header": ["on these images", *comparison.runs],
        "rows": comparison.cells(),
        "baselines": comparison.baselines,
        "runs": runs,
    }

"""What stands beside an SAE for people to look at: its curves, a few latents, and the report."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monoloss_plugin._places import as_path, require_file
from monoloss_plugin.hub.record import SAERecord
from monoloss_plugin.results import Evaluation

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet
    from monoloss_plugin.gallery.pictures import Pictures
    from monoloss_plugin.gallery.samples import ActivatingSamples

CURVES, LATENTS, REPORT = ILLUSTRATIONS = ("curves.png", "latents.png", "report.html")

IMAGES = 6
"""Images of each latent in the picture."""
_LATENTS = 6
_MOST_OF_PICTURE = 200_000
_DPI = (110, 80, 60)
"""Resolutions of the picture, the best first."""
_MOST_OF_REPORT = 60_000_000
_MADE_BY = re.compile(rb'<meta name="generator" content="monoloss_plugin [^"]*">')
_BEGINNING = 1024
"""Bytes of a report that hold its mark."""


def draw_curves(path: Path, record: SAERecord, evaluation: Evaluation, baseline: object) -> None:
    """Draw MonoScore of every latent, sorted, beside that of a baseline if it is an evaluation."""
    from monoloss_plugin.figures import plot_curves, save_figure

    added = " + ".join(str(term["name"]) for term in record.losses)
    curves = {f"with {added}" if added else "MonoScore": evaluation.monoscore.curve()}
    if isinstance(baseline, Evaluation):
        curves = {f"without {added or 'the losses'}": baseline.monoscore.curve(), **curves}
    save_figure(plot_curves(curves, chance=evaluation.monoscore.chance), path, dpi=110)


def find_pictures(images: Any, features: FeatureSet | None) -> Pictures:
    """Return the images of features, if they are not pictures already.

    Raises:
        ValueError: there are no features.
        Exception: as :func:`~monoloss_plugin.gallery.pictures.open_pictures`.
    """
    from monoloss_plugin.gallery.pictures import Pictures, open_pictures

    if features is None:
        raise ValueError("images: need features, whose rows they are the images of")
    return images if isinstance(images, Pictures) else open_pictures(images, features)


def draw_latents(
    path: Path, samples: ActivatingSamples, pictures: Pictures, features: FeatureSet | None = None
) -> dict[str, Any]:
    """Draw six latents with the images that activate them most.

    They are spread over the ranking by MonoScore above chance, so that a reader does not see only
    the best.

    Args:
        path: the PNG file to write. It has less than 200 kB.
        samples: what was found of the SAE.
        pictures: the images, one for each sample.
        features: with a patch set, heat maps lie over the images.

    Returns:
        What :attr:`~monoloss_plugin.hub.record.SAERecord.latents_shown` holds.

    Raises:
        ValueError: the images are not as many as the samples, or no latent has a score.
    """
    from monoloss_plugin.figures import save_figure
    from monoloss_plugin.gallery.show import best_latents, latent_grid

    evaluation = samples.evaluation
    if evaluation.tested.num_samples != len(pictures):
        raise ValueError(
            f"images: expected {evaluation.tested.num_samples}, one for each sample that was "
            f"measured, got {len(pictures)}"
        )
    ranking = best_latents(evaluation, evaluation.num_latents)
    if not ranking:
        raise ValueError("images: no latent has a score, so there is none to show")
    number = min(_LATENTS, len(ranking))
    places = torch.linspace(0, len(ranking) - 1, number).round().int().tolist()
    latents = [ranking[place] for place in places]
    grid = latent_grid(samples, pictures, latents, bands=("top",), count=IMAGES, features=features)
    figure = grid.figure(columns=2)
    for dpi in _DPI:
        save_figure(figure, path, dpi=dpi)
        if path.stat().st_size < _MOST_OF_PICTURE:
            break
    return {
        "latents": latents,
        "ranks": [place + 1 for place in places],
        "of": len(ranking),
        "above_chance": bool(evaluation.tested.significant().any()),
    }


def copy_picture(source: Path, target: Path) -> None:
    """Copy a PNG picture; raise ValueError for another file."""
    # The file may be a link to something that nobody means to publish.
    require_picture(source)
    shutil.copyfile(source, target)


def require_picture(path: Path) -> None:
    """Raise ValueError for a file that is not a PNG picture."""
    with path.open("rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"{path}: not a PNG picture")


def require_report(report: Any) -> Path:
    """Return the path of a report; raise an error unless ``monoloss report`` wrote it.

    Raises:
        TypeError: not a path.
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: a link, a file of more than 60 MB, or another file than a report.
    """
    path = as_path(report, "report", "the file of a report")
    if path.is_symlink():
        raise ValueError(f"report: {path} is a link; give the file itself")
    require_file(path, "report")
    size = path.stat().st_size
    if size > _MOST_OF_REPORT:
        most = f"{_MOST_OF_REPORT / 1e6:.0f} MB"
        raise ValueError(f"report: {path} has {size / 1e6:.1f} MB, expected at most {most}")
    with path.open("rb") as file:
        if not _MADE_BY.search(file.read(_BEGINNING)):
            raise ValueError(
                f"report: {path} is not a page that this version of `monoloss report` writes; "
                "write it again"
            )
    return path

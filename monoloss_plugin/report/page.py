"""The page: what it shows, and writing it."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from monoloss_plugin import __version__
from monoloss_plugin._checks import visible
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, kind_of
from monoloss_plugin.report.maps import Grids, LatentMaps
from monoloss_plugin.report.packing import (
    IMAGES_PER_PACK,
    image_packs,
    json_in_html,
    pack_column,
    pack_floats,
    pack_integers,
    packed_lengths,
)

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

SCRIPTS = (
    "data.js",
    "parts.js",
    "thumbnails.js",
    "charts.js",
    "maps.js",
    "order.js",
    "table.js",
    "latent.js",
    "places.js",
    "image.js",
    "pairs.js",
    "main.js",
)
"""The page's script, in the order in which its files follow one another."""


@dataclass(frozen=True)
class LatentTable:
    """The M latents of one SAE. Images are numbers of :attr:`Page.image_ids`."""

    name: str
    """How the page calls the SAE."""
    chance: float
    """MonoScore of shuffled activations."""
    columns: dict[str, Tensor]
    """(M,) each: score, adjusted, p, significant, support, frequency, largest, and with labels
    purity, purity_adjusted and class (-1 for none). NaN where a latent's value is undefined."""
    names: list[list[str]] | None
    """A few texts for each latent, the best first; None if the latents were not named."""
    bands: dict[str, tuple[Tensor, Tensor]]
    """Images of each latent, by the name of the band: "top", "middle", "bottom", "near misses".
    (M, K) images, -1 for none, and (M, K) values."""
    histogram: Tensor
    """(M, bins) counts of positive activations."""
    first_bin: int
    """Bin b holds activations in [2**((first_bin + b) / 4), 2**((first_bin + b + 1) / 4))."""
    breakdown: tuple[Tensor, Tensor] | None
    """(M, 5) classes of the samples that activate a latent, -1 for none, and (M, 5) counts."""
    nearest: tuple[Tensor, Tensor]
    """(M, 5) latents with the most similar decoder directions, -1 for none, and their cosines."""
    together: tuple[Tensor, Tensor]
    """(M, 5) latents that are active on the same images, -1 for none, and their correlations."""
    matches: list[tuple[Tensor, Tensor] | None]
    """For each SAE of the page, the (M,) latents that are active on the same images, and their
    correlations; None for the SAE itself, and for one that cannot be compared."""
    of_images: tuple[Tensor, Tensor]
    """(I, 12) latents that each image activates, strongest first, -1 for none, and (I, 12) their
    shares of the reconstruction, which may be negative."""
    maps: LatentMaps | None = None
    """Heat maps; None if the samples are no patches."""


@dataclass(frozen=True)
class Page:
    """A page on one or more SAEs and the images that activate their latents."""

    title: str
    about: list[tuple[str, str]]
    """What was measured: a label and a text each."""
    header: list[str]
    """Header of the comparison table: an empty cell, and the name of each SAE."""
    rows: list[list[str]]
    """Its rows: the name of a measure, and its value for each SAE."""
    baselines: list[str]
    """Names of the columns that are baselines."""
    notes: list[str]
    """What to know beside the table."""
    runs: list[dict[str, Any]]
    """Points of the trade-off chart: name, baseline, r2 and monoscore_adjusted of each."""
    classes: list[str]
    """Names of the classes; empty if there are none."""
    num_rows: int
    """Number of images that were measured, of which the page shows some."""
    saes: list[LatentTable]
    """One or more."""
    image_ids: list[str]
    """I ids."""
    image_labels: Tensor
    """(I,) classes, -1 for none."""
    thumbnails: list[bytes]
    """I files, WebP, PNG or JPEG; empty where an image could not be read."""
    pixelated: bool
    """Whether the images are of a few pixels, to be shown as such."""
    grids: Grids | None = None
    """The grids of the images' patches; None if the samples are no patches."""

    def __post_init__(self) -> None:
        """Check that the parts are of the same images and SAEs."""
        if not self.saes:
            raise ValueError("saes: expected one or more, got none")
        images = len(self.image_ids)
        for name in ("image_labels", "thumbnails"):
            if len(getattr(self, name)) != images:
                raise ValueError(
                    f"{name}: expected one for each of the {images} image_ids, got "
                    f"{len(getattr(self, name))}"
                )
        for sae in self.saes:
            if len(sae.of_images[0]) != images:
                raise ValueError(
                    f"of_images of {sae.name!r}: expected one row for each of the {images} "
                    f"image_ids, got {len(sae.of_images[0])}"
                )
            if len(sae.matches) != len(self.saes):
                raise ValueError(
                    f"matches of {sae.name!r}: expected one entry for each of the "
                    f"{len(self.saes)} saes, got {len(sae.matches)}"
                )


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write a page as one HTML file, and return its path.

    The file works without a network, opened from disk. It replaces a file of that name once all of
    it is written. Control characters in texts are shown as escapes.

    Args:
        page: what to show.
        path: where the file goes; its folder is made.

    Raises:
        TypeError: ``page`` is not a :class:`Page`.
        ModuleNotFoundError: the extra ``report`` is not installed.
    """
    if not isinstance(page, Page):
        raise TypeError(f"page: expected a Page, got {kind_of(page)}")
    path = as_path(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex}")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(_render(page))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _render(page: Page) -> Iterator[str]:
    """Yield the page's HTML in parts."""
    environment = Environment(
        loader=PackageLoader(str(__package__), "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    assert environment.loader is not None

    def source(name: str) -> str:
        return environment.loader.get_source(environment, name)[0]  # type: ignore[union-attr]

    template = environment.get_template("page.html.jinja")
    yield from template.generate(
        page=page,
        version=__version__,
        css=Markup(source("page.css")),
        data=Markup(json_in_html(_data(page))),
        packs=map(Markup, image_packs(page.thumbnails)),
        script=Markup("\n".join(map(source, SCRIPTS))),
    )


def _data(page: Page) -> dict[str, Any]:
    """Return what the page's script reads."""
    return {
        "classes": [visible(name) for name in page.classes],
        "numRows": page.num_rows,
        "pixelated": page.pixelated,
        "runs": [
            {key: _finite(visible(v) if isinstance(v, str) else v) for key, v in run.items()}
            for run in page.runs
        ],
        "imageIds": [visible(name) for name in page.image_ids],
        "imageLabels": pack_integers(page.image_labels),
        "imagesPerPack": IMAGES_PER_PACK,
        "imageLengths": pack_integers(packed_lengths(page.thumbnails)),
        "saes": [_latents(sae) for sae in page.saes],
        **({} if page.grids is None else {"maps": page.grids.packed()}),
    }


def _latents(sae: LatentTable) -> dict[str, Any]:
    """Return what the page's script reads of one SAE."""
    return {
        "name": visible(sae.name),
        "chance": _finite(float(sae.chance)),
        "columns": {name: pack_column(values) for name, values in sae.columns.items()},
        "names": sae.names and [[visible(name) for name in names] for names in sae.names],
        "bands": {name: _chosen(band) for name, band in sae.bands.items()},
        "histogram": pack_integers(sae.histogram),
        "firstBin": sae.first_bin,
        "breakdown": sae.breakdown and [pack_integers(part) for part in sae.breakdown],
        "nearest": _chosen(sae.nearest),
        "together": _chosen(sae.together),
        "matches": [match and _chosen(match) for match in sae.matches],
        "ofImages": _chosen(sae.of_images),
        **({} if sae.maps is None else sae.maps.packed()),
    }


def _chosen(pair: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """Pack numbers of images or latents, and the value of each."""
    return [pack_integers(pair[0]), pack_floats(pair[1], short=True)]


def _finite(value: Any) -> Any:
    """Return a number that JSON can hold: None for NaN and the infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Latents with the images that activate them: as HTML in a notebook, and as a figure."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from monoloss_plugin._checks import require_at_least
from monoloss_plugin._optional import missing_extra

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from PIL import Image
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_HEADING, _CELL, _LABEL = 0.36, 0.62, 0.95
"""Inches of a figure: the height of a title, an image with its margin, the names of the bands."""


class ShownImage(NamedTuple):
    """An image of a latent."""

    image_id: str
    value: float
    """The latent's activation; of a near miss, its similarity."""
    thumbnail: bytes
    """A WebP file; empty if the image cannot be read."""

    def source(self) -> str:
        """Return the thumbnail as the source of an HTML image."""
        return f"data:image/webp;base64,{b64encode(self.thumbnail).decode()}"


@dataclass(frozen=True)
class ShownLatent:
    """A latent and its images."""

    title: str
    bands: Mapping[str, Sequence[ShownImage]]
    """The images of each band, by its name."""


@dataclass(frozen=True)
class LatentGrid:
    """Latents to look at. A notebook shows their images; :meth:`figure` draws them."""

    latents: Sequence[ShownLatent]
    pixelated: bool = False
    """Whether the images have a few pixels only, and are to be shown pixel by pixel."""

    def __repr__(self) -> str:
        return f"LatentGrid of {len(self.latents)} latents"

    def _repr_html_(self) -> str:
        loader = PackageLoader("monoloss_plugin.gallery", "")
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        return environment.get_template("grid.html.jinja").render(grid=self)

    def figure(self, *, columns: int = 1, title: str = "") -> Figure:
        """Draw the latents with matplotlib, each with a row of images for each of its bands.

        Args:
            columns: how many latents stand side by side.
            title: title of the figure.

        Raises:
            TypeError: ``columns`` is not an integer.
            ValueError: there are no latents, or ``columns`` is below 1.
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise missing_extra(error, "report") from error
        from monoloss_plugin.figures.dressing import TEXT

        require_at_least(1, columns, "columns")
        require_at_least(1, len(self.latents), "latents")
        bands = max(len(one.bands) for one in self.latents)
        wide = max((len(of) for one in self.latents for of in one.bands.values()), default=0)
        rows, height = -(-len(self.latents) // columns), _HEADING + _CELL * bands
        top = _HEADING if title else 0.0
        width = columns * (_LABEL + _CELL * max(1, wide))
        figure = Figure(figsize=(width, top + rows * height), facecolor="none")
        halves = figure.subfigures(2, 1, height_ratios=(top or 1e-3, rows * height), squeeze=False)
        heading, body = halves[:, 0]
        heading.suptitle(title, fontsize=11, y=0.6, color=TEXT)
        panels = body.subfigures(rows, columns, squeeze=False)
        for panel, latent in zip(panels.flat, self.latents, strict=False):
            panel.suptitle(latent.title, fontsize=8, y=1 - 0.12 / height, va="top", color=TEXT)
            _draw_bands(panel, latent, bands, max(1, wide), self.pixelated)
        for panel in (heading, body, *panels.flat):
            panel.set_facecolor("none")
        return figure


def _draw_bands(
    panel: SubFigure, latent: ShownLatent, bands: int, wide: int, pixelated: bool
) -> None:
    from monoloss_plugin.figures.dressing import TEXT

    grid = panel.subplots(bands, wide, squeeze=False)
    inches = _LABEL + _CELL * wide, _HEADING + _CELL * bands
    panel.subplots_adjust(
        left=_LABEL / inches[0],
        right=1 - 0.08 / inches[0],
        top=1 - _HEADING / inches[1],
        bottom=0.04 / inches[1],
        wspace=0.06,
        hspace=0.06,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (name, images) in zip(grid, latent.bands.items(), strict=False):
        line[0].text(
            *(-0.15, 0.5, name),
            fontsize=7,
            ha="right",
            va="center",
            color=TEXT,
            transform=line[0].transAxes,
        )
        for axes, image in zip(line, images, strict=False):
            if image.thumbnail:
                picture = Image.open(io.BytesIO(image.thumbnail)).convert("RGB")
                axes.imshow(picture, interpolation="nearest" if pixelated else None)

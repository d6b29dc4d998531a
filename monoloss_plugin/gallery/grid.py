"""Latents with the images that activate them: as HTML in a notebook, and as a figure."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from monoloss_plugin._checks import require_at_least
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.gallery.overlay import DARK, UNSEEN, Overlay, css_gradient, heat_colours

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from PIL import Image
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_HEADING, _CELL, _LABEL = 0.36, 0.62, 0.95
"""Inches of a figure: the height of a title, an image with its margin, the names of the bands."""
_SCALE = 0.16
"""Inches: the height of a second line of the title, with the scale of the heat maps."""


class ShownImage(NamedTuple):
    """An image of a latent."""

    image_id: str
    value: float
    """The latent's activation; of a near miss, its similarity."""
    thumbnail: bytes
    """A WebP file; empty if the image cannot be read."""
    overlay: Overlay | None = None
    """Where in the image the latent is active; None if the features are no patches."""

    def source(self) -> str:
        """Return the thumbnail as the source of an HTML image."""
        return f"data:image/webp;base64,{b64encode(self.thumbnail).decode()}"

    def size(self) -> tuple[int, int]:
        """Return the thumbnail's width and height."""
        return size_of(self.thumbnail)


def size_of(thumbnail: bytes) -> tuple[int, int]:
    """Return the width and height of a thumbnail."""
    with Image.open(io.BytesIO(thumbnail)) as image:
        size: tuple[int, int] = image.size
        return size


@dataclass(frozen=True)
class ShownLatent:
    """A latent and its images."""

    title: str
    bands: Mapping[str, Sequence[ShownImage]]
    """The images of each band, by its name."""
    largest: float | None = None
    """The activation that has the brightest colour of its heat maps; None without heat maps."""


@dataclass(frozen=True)
class LatentGrid:
    """Latents to look at. A notebook shows their images; :meth:`figure` draws them."""

    latents: Sequence[ShownLatent]
    pixelated: bool = False
    """Whether the images have a few pixels only, and are to be shown pixel by pixel."""
    notes: Sequence[str] = ()
    """What to know of the heat maps."""

    @property
    def has_maps(self) -> bool:
        """Whether there are heat maps over the images."""
        return any(latent.largest is not None for latent in self.latents)

    def __repr__(self) -> str:
        return f"LatentGrid of {len(self.latents)} latents"

    def _repr_html_(self) -> str:
        loader = PackageLoader("monoloss_plugin.gallery", "")
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        template = environment.get_template("grid.html.jinja")
        return template.render(grid=self, gradient=css_gradient(), dark=DARK, unseen=UNSEEN)

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
        of_title = _HEADING + _SCALE * self.has_maps
        rows, height = -(-len(self.latents) // columns), of_title + _CELL * bands
        top = _HEADING if title or self.has_maps else 0.0
        width = columns * (_LABEL + _CELL * max(1, wide))
        figure = Figure(figsize=(width, top + rows * height), facecolor="none")
        halves = figure.subfigures(2, 1, height_ratios=(top or 1e-3, rows * height), squeeze=False)
        heading, body = halves[:, 0]
        heading.suptitle(title, fontsize=11, y=0.6, color=TEXT)
        if self.has_maps:
            _draw_scale(heading, width, top)
        panels = body.subfigures(rows, columns, squeeze=False)
        for panel, latent in zip(panels.flat, self.latents, strict=False):
            words = latent.title
            if latent.largest is not None:
                words += f"\nheat maps: from 0 to {latent.largest:.3g}"
            panel.suptitle(words, fontsize=8, y=1 - 0.12 / height, va="top", color=TEXT)
            _draw_bands(panel, latent, bands, max(1, wide), of_title, self.pixelated)
        for panel in (heading, body, *panels.flat):
            panel.set_facecolor("none")
        return figure


def _draw_bands(
    panel: SubFigure, latent: ShownLatent, bands: int, wide: int, of_title: float, pixelated: bool
) -> None:
    from monoloss_plugin.figures.dressing import TEXT

    grid = panel.subplots(bands, wide, squeeze=False)
    inches = _LABEL + _CELL * wide, of_title + _CELL * bands
    panel.subplots_adjust(
        left=_LABEL / inches[0],
        right=1 - 0.08 / inches[0],
        top=1 - of_title / inches[1],
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
                if image.overlay is not None:
                    _draw_overlay(axes, image.overlay, picture.size)


def _draw_overlay(axes: Axes, overlay: Overlay, size: tuple[int, int]) -> None:
    """Draw a heat map over a picture of a width and a height."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    (width, height), (rows, columns), part = size, overlay.grid, overlay.part
    left, top = part.left * width - 0.5, part.top * height - 0.5  # the middle of a pixel is whole
    wide, high = part.width * width / columns, part.height * height / rows
    for x, y, w, h in (
        (-0.5, -0.5, left + 0.5, height),
        (left + wide * columns, -0.5, width, height),
        (left, -0.5, wide * columns, top + 0.5),
        (left, top + high * rows, wide * columns, height),
    ):
        if w > 0 and h > 0:  # what the encoder does not see
            dark = [of / 255 for of in DARK]
            axes.add_patch(Rectangle((x, y), w, h, color=dark, alpha=UNSEEN, linewidth=0))
    axes.imshow(
        overlay.colours().numpy(),
        interpolation="nearest",
        extent=(left, left + wide * columns, top + high * rows, top),
    )
    stripes = [
        [(left + c * wide, top + (r + 1) * high), (left + (c + 1) * wide, top + r * high)]
        for r, c in overlay.unknown()
    ]
    axes.add_collection(LineCollection(stripes, colors="#808080", linewidths=0.5))
    if (place := overlay.strongest()) is not None:
        corner = left + place.column * wide, top + place.row * high
        for colour, line in (("black", 1.6), ("white", 0.7)):
            axes.add_patch(
                Rectangle(corner, wide, high, fill=False, edgecolor=colour, linewidth=line)
            )
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _draw_scale(heading: SubFigure, width: float, height: float) -> None:
    """Draw the colours of the heat maps, in the right half of a heading of so many inches."""
    from monoloss_plugin.figures.dressing import TEXT

    axes = heading.add_axes((1 - 0.75 / width, 0.3, 0.6 / width, 0.12 / height))
    strengths = torch.linspace(0, 1, 32).unsqueeze(0)
    axes.imshow(torch.full((1, 32, 3), 128, dtype=torch.uint8).numpy(), aspect="auto")
    axes.imshow(heat_colours(strengths).numpy(), aspect="auto")
    axes.set_axis_off()
    axes.text(
        *(-0.1, 0.5, "activation of a patch, from 0 to the latent's largest; framed: the largest"),
        fontsize=6,
        ha="right",
        va="center",
        color=TEXT,
        transform=axes.transAxes,
    )

"""A heat map over a photograph: light falls where a latent is active, and the rest is dimmed.

The colour of a strength s in [0, 1] is that of :data:`DARK` and :data:`BRIGHT`, mixed in the ratio
1 - s to s; its opacity is :data:`OPAQUE`, mixed in the same way. Over every photograph, more
strength is then more luminance, so that the map reads in grey and for colour-blind readers too; and
the photograph still shows, most where the latent is active.
"""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from monoloss_plugin.gallery.covered import Part

DARK, BRIGHT = (10, 12, 32), (255, 222, 70)
"""sRGB of the strengths 0 and 1."""
OPAQUE = (0.6, 0.5)
"""Opacity of the strengths 0 and 1."""
UNSEEN = 0.85
"""Opacity of the dark colour over what the encoder does not see."""


def heat_colours(strengths: Tensor) -> Tensor:
    """Return the colours (..., 4) of strengths (...) in [0, 1], as uint8.

    They are red, green, blue and opacity. What is not known, NaN, is transparent.
    """
    s = strengths.double().clamp(0, 1).unsqueeze(-1)
    ends = [torch.tensor([*rgb, 255 * a]) for rgb, a in zip((DARK, BRIGHT), OPAQUE, strict=True)]
    return ((1 - s) * ends[0] + s * ends[1]).nan_to_num(0.0).round().byte()


class Cell(NamedTuple):
    """A place of a grid, from 0."""

    row: int
    column: int


@dataclass(frozen=True)
class Overlay:
    """The map of a latent over an image."""

    values: Tensor
    """(h, w) activations; NaN where they are not known."""
    largest: float
    """The activation that has the brightest colour."""
    part: Part
    """The part of the image that the grid covers."""

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid."""
        return self.values.shape[0], self.values.shape[1]

    def colours(self) -> Tensor:
        """Return the colours (h, w, 4), uint8."""
        return heat_colours(self.values.clamp(min=0) / (self.largest or 1.0))

    def strongest(self) -> Cell | None:
        """Return the first place with the largest activation; None if no place is active."""
        values = self.values.nan_to_num(0.0)
        place = int(values.argmax())
        width = self.grid[1]
        return Cell(place // width, place % width) if float(values.flatten()[place]) > 0 else None

    def unknown(self) -> list[Cell]:
        """Return the places whose activation is not known."""
        return [Cell(*place) for place in self.values.isnan().nonzero().tolist()]

    def words(self, activation: float) -> str:
        """Say what the map shows of an image's activation."""
        height, width = self.grid
        place, of = self.strongest(), f"of {height} x {width}"
        if place is None:
            return f"activation {activation:.3g}, at no place {of}"
        at = f"row {place.row + 1}, column {place.column + 1} {of}"
        here = float(self.values[place])
        if activation > here * 1.001:  # of the class token, or of a patch that was not kept
            return f"activation {activation:.3g}; on the grid at most {here:.3g}, at {at}"
        return f"activation {activation:.3g}, strongest at {at}"

    def source(self) -> str:
        """Return the map as the source of an HTML image, with one pixel for each place."""
        return f"data:image/png;base64,{b64encode(_png(self.colours().numpy())).decode()}"


def _png(colours: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(colours, "RGBA").save(file, "PNG", optimize=True)
    return file.getvalue()


def css_gradient() -> str:
    """Return the scale as a CSS gradient, over a photograph of medium grey."""
    colours = heat_colours(torch.linspace(0, 1, 6)).double()
    opacity = colours[:, 3:] / 255
    seen = (colours[:, :3] * opacity + 128 * (1 - opacity)).round().int().tolist()
    return f"linear-gradient(90deg, {', '.join(f'rgb({r} {g} {b})' for r, g, b in seen)})"

"""The colours and the words of a heat map over a photograph."""

from __future__ import annotations

import io
from base64 import b64decode

import pytest
import torch
from PIL import Image
from torch import Tensor

from monoloss_plugin.gallery.covered import WHOLE
from monoloss_plugin.gallery.overlay import Overlay, heat_colours

SHADES = torch.cartesian_prod(*[torch.linspace(0, 1, 5)] * 3)
"""Colours of a photograph, from black to white."""


def luminance(rgb: Tensor) -> Tensor:
    """The relative luminance of sRGB colours (..., 3) in [0, 1], as WCAG defines it."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ torch.tensor([0.2126, 0.7152, 0.0722])


def over(strengths: Tensor, photograph: Tensor) -> Tensor:
    """The colours (S, P, 3) that are seen of a map over a photograph of P colours."""
    colours = heat_colours(strengths).float() / 255
    opacity = colours[:, None, 3:]
    return colours[:, None, :3] * opacity + photograph * (1 - opacity)


def test_more_activation_is_more_luminance_over_every_colour_of_a_photograph() -> None:
    seen = luminance(over(torch.linspace(0, 1, 21), SHADES))
    assert bool((seen.diff(dim=0) > 0).all())
    ratio = (seen[-1] + 0.05) / (seen[0] + 0.05)
    assert float(ratio.min()) > 2.9  # WCAG asks for 3 between parts of a picture


def test_a_photograph_shows_through_most_where_the_latent_is_active() -> None:
    seen = luminance(over(torch.tensor([0.0, 1.0]), torch.tensor([[0.0] * 3, [1.0] * 3])))
    assert float(seen[0, 1] - seen[0, 0]) > 0.1
    assert float(seen[1, 1] - seen[1, 0]) > 0.5


def test_what_is_not_known_is_transparent() -> None:
    assert heat_colours(torch.tensor([torch.nan, 0.0])).tolist()[0] == [0, 0, 0, 0]


def test_a_map_as_a_picture_of_one_pixel_for_each_place() -> None:
    values = torch.tensor([[0.0, 1.0, torch.nan], [-3.0, 2.0, 4.0]])
    overlay = Overlay(values, 4.0, WHOLE)
    kind, _, content = overlay.source().partition(";base64,")
    assert kind == "data:image/png"
    with Image.open(io.BytesIO(b64decode(content))) as image:
        pixels = torch.tensor(list(image.getdata())).view(2, 3, 4)
    expected = heat_colours(torch.tensor([[0.0, 0.25, torch.nan], [0.0, 0.5, 1.0]]))
    assert torch.equal(pixels, expected.long())
    assert overlay.unknown() == [(0, 2)]


@pytest.mark.parametrize(
    ("values", "activation", "said"),
    [
        ([[0, 1], [2, 1]], 2.0, "activation 2, strongest at row 2, column 1 of 2 x 2"),
        ([[2, 1, 2]], 2.0, "activation 2, strongest at row 1, column 1 of 1 x 3"),
        ([[0, -1]], 2.0, "activation 2, at no place of 1 x 2"),
        ([[0, torch.nan]], 0.0, "activation 0, at no place of 1 x 2"),
        ([[1, 0]], 2.5, "activation 2.5; on the grid at most 1, at row 1, column 1 of 1 x 2"),
    ],
)
def test_words(values: list[list[float]], activation: float, said: str) -> None:
    assert Overlay(torch.tensor(values).float(), 3.0, WHOLE).words(activation) == said


def test_a_latent_that_is_never_active_is_dark() -> None:
    overlay = Overlay(torch.zeros(2, 2), 0.0, WHOLE)
    assert overlay.strongest() is None
    assert torch.equal(overlay.colours(), heat_colours(torch.zeros(2, 2)))

"""The images that activate a latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from monoloss_plugin._checks import require_at_least
from monoloss_plugin._optional import missing_extra

try:
    from matplotlib.figure import Figure, SubFigure
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error


class ActivationBands(NamedTuple):
    """Samples that activate a latent, strongest first within each band."""

    top: Tensor
    middle: Tensor
    bottom: Tensor
    num_active: int
    """How many samples activate the latent at all."""


def activation_bands(activations: Tensor, count: int = 5) -> ActivationBands:
    """Return the samples that activate a latent most, in the middle, and least.

    Only positive activations count. If there are fewer than three times ``count``, the bands
    overlap. If there are fewer than ``count``, the bands are shorter.

    Args:
        activations: (N,) of one latent.
        count: samples in each band.

    Raises:
        ValueError: the activations are not of one latent, or ``count`` is below 1.

    Examples:
        >>> import torch
        >>> bands = activation_bands(torch.tensor([0.0, 3.0, 1.0, 2.0]), count=1)
        >>> bands.top.tolist(), bands.middle.tolist(), bands.bottom.tolist()
        ([1], [3], [2])

    Source: Nasiri-Sarvi et al. 2026, section 4.1, figures 3 and 5.
    """
    if activations.ndim != 1:
        raise ValueError(
            f"activations: expected (N,) of one latent, got shape {tuple(activations.shape)}"
        )
    require_at_least(1, count, "count")
    num_active = int((activations > 0).sum())
    order = activations.argsort(descending=True, stable=True)[:num_active]
    start = max(0, (num_active - count) // 2)
    bottom = order[max(0, num_active - count) :]
    return ActivationBands(order[:count], order[start : start + count], bottom, num_active)


@dataclass(frozen=True)
class LatentRow:
    """One latent to show."""

    title: str
    activations: Tensor
    """(N,) over the images."""


def activating_images_figure(
    pairs: Sequence[tuple[LatentRow, LatentRow]], images: Tensor, *, count: int = 5, title: str = ""
) -> Figure:
    """Draw pairs of latents side by side, with their top, middle and bottom activating images.

    Args:
        pairs: pairs of latents of the same images, such as one without and one with MonoLoss.
        images: (N, H, W) grey or (N, H, W, 3) colour.
        count: images in each band.
        title: title of the figure.

    Raises:
        ValueError: there are no pairs.

    Source: Nasiri-Sarvi et al. 2026, figures 3 and 5.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one pair of latents, got none")
    heading, height = 0.35, 2.35  # inches
    figure = Figure(figsize=(2 * (0.62 * count + 0.9), heading + height * len(pairs)))
    halves = figure.subfigures(2, 1, height_ratios=(heading, height * len(pairs)), squeeze=False)
    top, body = halves[:, 0]
    top.suptitle(title, fontsize=11, y=0.7)
    panels = body.subfigures(len(pairs), 2, squeeze=False)
    for panel_row, pair in zip(panels, pairs, strict=True):
        for panel, row in zip(panel_row, pair, strict=True):
            _draw_bands(panel, row, images, count)
    return figure


def _draw_bands(panel: SubFigure, row: LatentRow, images: Tensor, count: int) -> None:
    bands = activation_bands(row.activations, count)
    panel.suptitle(f"{row.title}, active on {bands.num_active}", fontsize=8, y=0.93)
    grid = panel.subplots(3, count, squeeze=False)
    panel.subplots_adjust(left=0.16, right=0.98, top=0.82, bottom=0.03, wspace=0.06, hspace=0.06)
    for axes_row, name, members in zip(grid, ("top", "middle", "bottom"), bands[:3], strict=True):
        axes_row[0].text(
            -0.15, 0.5, name, fontsize=7, ha="right", va="center", transform=axes_row[0].transAxes
        )
        for i, axes in enumerate(axes_row):
            axes.set_axis_off()
            if i < len(members):
                axes.imshow(images[members[i]].cpu().numpy(), cmap="gray")

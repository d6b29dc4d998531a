"""The papers' pictures of an SAE: MonoScore curves, and the images that activate a latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_list, as_tensor, require_at_least, require_choice
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of

try:
    import numpy as np
    from matplotlib.figure import Figure, SubFigure
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

if TYPE_CHECKING:
    from monoloss_plugin.comparison import Comparison
    from monoloss_plugin.results import Evaluation

__all__ = [
    "ActivationBands",
    "LatentRow",
    "activating_images_figure",
    "activation_bands",
    "curves_figure",
    "density_figure",
    "trade_off_figure",
]

_COLOURS = ("#7f7f7f", "#d1495b", "#00798c", "#edae49", "#5c4d7d", "#6a994e", "#bc6c25")
_MARKERS = "osD^vP*"


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


def curves_figure(
    curves: Mapping[str, Sequence[Tensor]],
    *,
    ylabel: str = "MonoScore",
    title: str = "",
    chance: float | None = None,
) -> Figure:
    """Draw MonoScore curves: the scores in decreasing order, against the latent's rank in [0, 1].

    Args:
        curves: for each name the (M,) curve of each run (:meth:`MonoScoreResult.curve`): every
            run as a thin line, their mean as a thick one.
        ylabel: label of the vertical axis.
        title: title of the figure.
        chance: the score of shuffled activations, drawn as a dashed line.

    Raises:
        TypeError: the curves are not lists by name.
        ValueError: a name has no curves, or curves have different lengths.

    Source: Nasiri-Sarvi et al. 2026, appendix D, figures 26 to 28.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves: expected lists of curves by name, got {kind_of(curves)}")
    for i, (name, given) in enumerate(curves.items()):
        runs = [as_tensor(run, "curves") for run in as_list(given, "curves")]
        if not runs:
            raise ValueError(f"curves: expected at least one run of {name!r}, got none")
        colour = _COLOURS[i % len(_COLOURS)]
        stacked = torch.stack([run.detach().cpu().double() for run in runs]).numpy()
        index = np.linspace(0, 1, stacked.shape[1])
        for run in stacked:
            axes.plot(index, run, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(index, stacked.mean(0), color=colour, linewidth=2.2, label=name)
    if chance is not None:
        axes.axhline(chance, color="black", linewidth=0.8, linestyle="--", label="chance")
    axes.set_xlabel("latent index, normalized (sorted by score)")
    axes.set_ylabel(ylabel)
    axes.set_xlim(0, 1)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def trade_off_figure(
    comparison: Comparison, x: str = "r2", y: str = "monoscore_adjusted", *, title: str = ""
) -> Figure:
    """Draw one measure of each SAE against another: a point for each seed, baselines hollow.

    An SAE is better than another if it is above it at the same place, or at the right of it at the
    same height.

    Args:
        comparison: of the SAEs.
        x: name of a measure, as in :meth:`Comparison.measures`.
        y: name of another.
        title: title of the figure.

    Raises:
        ValueError: the comparison has no such measure.

    Source: after Nasiri-Sarvi et al. 2026, figure 4.
    """
    from monoloss_plugin.comparison import label_of  # it needs more libraries than a figure does

    for name, measure in (("x", x), ("y", y)):
        require_choice(measure, name, tuple(comparison.measures()))
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, runs) in enumerate(comparison.runs.items()):
        colour, hollow = _COLOURS[i % len(_COLOURS)], name in comparison.baselines
        points = [(run[x], run[y]) for run in runs if x in run and y in run]
        axes.scatter(
            *zip(*points, strict=True),
            label=name,
            marker=_MARKERS[i % len(_MARKERS)],
            facecolors="none" if hollow else colour,
            edgecolors=colour,
        )
    axes.set_xlabel(label_of(x))
    axes.set_ylabel(label_of(y))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def density_figure(evaluations: Mapping[str, Evaluation], *, title: str = "") -> Figure:
    """Draw how often latents are active: a histogram of log10 of their frequency for each SAE.

    Dead latents are counted in the legend.

    Args:
        evaluations: of SAEs, by name.
        title: title of the figure.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, found) in enumerate(evaluations.items()):
        alive = found.frequency[found.frequency > 0].double().log10().numpy()
        axes.hist(
            alive,
            bins=np.linspace(-6, 0, 49).tolist(),
            histtype="step",
            color=_COLOURS[i % len(_COLOURS)],
            label=f"{name}: {found.num_dead} of {found.num_latents} dead",
        )
    axes.set_xlabel("log10 of the share of samples on which a latent is active")
    axes.set_ylabel("latents")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


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

"""SAEs side by side: MonoScore curves, and one measure against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_tensor, require_choice, require_number
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of
from monoloss_plugin.figures.dressing import (
    COLOURS,
    MARKERS,
    axes_for,
    by_name,
    draw_chance,
    dress,
    line_style,
    require_title,
    runs_of,
)

try:
    import numpy as np
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from monoloss_plugin.comparison import Comparison


def plot_curves(
    curves: Mapping[str, Tensor | Sequence[Tensor]],
    *,
    chance: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot MonoScore curves: the scores in decreasing order, against the latent's rank in [0, 1].

    Args:
        curves: for each name the (M,) curve of an SAE, from
            :meth:`~monoloss_plugin.metrics.MonoScoreResult.curve`; or a list of the curves of
            several runs: each is a thin line, and their mean a thick one.
        chance: the score of shuffled activations, drawn as a dotted line.
        title: title of the axes.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        TypeError: the curves are not tensors by name, or an argument of another kind.
        ValueError: no curves, curves of other shapes than (M,), or of one name with different
            lengths.

    Source: Nasiri-Sarvi et al. 2026, appendix D, figures 26 to 28.
    """
    require_title(title)
    if chance is not None:
        require_number(chance, "chance")
    stacked = {name: _stacked(name, runs) for name, runs in by_name(curves, "curves").items()}
    ax = axes_for(ax)
    for i, (name, runs) in enumerate(stacked.items()):
        style = line_style(i)
        rank = np.linspace(0, 1, runs.shape[1])
        for run in runs if len(runs) > 1 else ():
            ax.plot(rank, run, color=style["color"], linewidth=0.6)
        ax.plot(rank, runs.mean(0), label=runs_of(name, len(runs)), linewidth=2.2, **style)
    if chance is not None:
        draw_chance(ax, chance)
    ax.set_xlim(0, 1)
    return dress(ax, "latents, sorted by score (share of all)", "MonoScore", title)


def plot_trade_off(
    comparison: Comparison,
    x: str = "r2",
    y: str = "monoscore_adjusted",
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot one measure of each SAE against another: a point for each seed, baselines hollow.

    An SAE is better than another if it is above it at the same place, or at the right of it at the
    same height.

    Args:
        comparison: of the SAEs.
        x: name of a measure, as in :meth:`~monoloss_plugin.comparison.Comparison.measures`.
        y: name of another.
        title: title of the axes.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        TypeError: not a comparison, or an argument of another kind.
        ValueError: the comparison has no such measure.

    Source: after Nasiri-Sarvi et al. 2026, figure 4.
    """
    from monoloss_plugin.comparison import (  # it needs more libraries than a figure does
        Comparison,
        label_of,
    )

    if not isinstance(comparison, Comparison):
        raise TypeError(f"comparison: expected a Comparison, got {kind_of(comparison)}")
    require_title(title)
    for argument, measure in (("x", x), ("y", y)):
        require_choice(measure, argument, tuple(comparison.measures()))
    ax = axes_for(ax)
    for i, (name, runs) in enumerate(comparison.runs.items()):
        points = [(run[x], run[y]) for run in runs if x in run and y in run]
        colour = COLOURS[i % len(COLOURS)]
        ax.scatter(
            [point[0] for point in points],
            [point[1] for point in points],
            s=50,
            label=name,
            marker=MARKERS[i % len(MARKERS)],
            facecolors="none" if name in comparison.baselines else colour,
            edgecolors=colour,
        )
    hollow = "hollow: baselines" if comparison.baselines else None
    return dress(ax, label_of(x), label_of(y), title, hollow)


def _stacked(name: str, runs: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Return the curves of a name as one array (runs, M)."""
    curves = [as_tensor(run, "curves") for run in runs]
    for curve in curves:
        if curve.ndim != 1 or curve.layout != torch.strided or curve.is_complex():
            raise ValueError(
                f"curves: expected (M,) real numbers for {name!r}, got {curve.dtype} of shape "
                f"{tuple(curve.shape)}"
            )
    if len({len(curve) for curve in curves}) > 1:
        lengths = ", ".join(str(len(curve)) for curve in curves)
        raise ValueError(f"curves: expected one length for all runs of {name!r}, got {lengths}")
    return torch.stack([curve.detach().cpu().double() for curve in curves]).numpy()

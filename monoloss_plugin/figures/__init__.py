"""The papers' pictures of SAEs, drawn with matplotlib.

Each ``plot_`` function draws on the axes that you give, or makes a figure of its own, and returns
the axes. ``save_figure`` writes either, with its description in words.
"""

from __future__ import annotations

from monoloss_plugin.figures.distributions import (
    plot_density,
    plot_purity,
    plot_scores,
    plot_support,
)
from monoloss_plugin.figures.saving import describe, save_figure
from monoloss_plugin.figures.side_by_side import plot_curves, plot_trade_off

__all__ = [
    "describe",
    "plot_curves",
    "plot_density",
    "plot_purity",
    "plot_scores",
    "plot_support",
    "plot_trade_off",
    "save_figure",
]

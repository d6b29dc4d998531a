"""What all figures share: their axes, their colours, and how they take several runs of a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monoloss_plugin._checks import require_text
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of
from monoloss_plugin.results import Evaluation

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

TEXT = "#7d7d7d"
"""Of text and lines. The background is transparent, so that a page may be light or dark. No colour
has a contrast of 4.5 with both white and #1e1e1e; this grey has 4.1 with the one and 4.0 with the
other."""

COLOURS = ("#0072b2", "#d55e00", "#00a388", "#9326ff", "#e0004b", "#2693ff", "#1b99b2")
"""Of series. Each has a contrast of at least 3 with white and with #1e1e1e, and colour-blind people
can tell any two apart."""

DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))
MARKERS = "osD^vPX*"


def axes_for(ax: Axes | None) -> Axes:
    """Return the axes to draw on: those given, or else the axes of a new figure.

    Raises:
        TypeError: neither None nor axes of matplotlib.
    """
    if isinstance(ax, Axes):
        return ax
    if ax is not None:
        raise TypeError(f"ax: expected axes of matplotlib, got {kind_of(ax)}")
    made = Figure(figsize=(7.2, 4.0), layout="constrained", facecolor="none").subplots()
    made.set_facecolor("none")
    made.tick_params(which="both", colors=TEXT)
    made.spines[:].set_color(TEXT)
    for text in (made.title, made.xaxis.label, made.yaxis.label):
        text.set_color(TEXT)
    return made


def dress(ax: Axes, x: str, y: str, title: str | None, legend_title: str | None = None) -> Axes:
    """Label the axes, add a grid and a legend beside them, and return the axes."""
    ax.set(xlabel=x, ylabel=y)
    if title is not None:
        ax.set_title(title)
    ax.grid(alpha=0.3, color=TEXT)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    colour = ax.xaxis.label.get_color()
    # Beside the axes, where it covers nothing.
    legend = ax.legend(
        title=legend_title,
        labelcolor=colour,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        alignment="left",
    )
    legend.get_title().set_color(colour)
    return ax


def line_style(i: int) -> dict[str, Any]:
    """Return the colour and dashes of the line of a series."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def draw_chance(ax: Axes, score: float, *, upright: bool = False) -> None:
    """Draw a thin line at the score of shuffled activations."""
    line = ax.axvline if upright else ax.axhline
    line(score, color=TEXT, linewidth=1.2, linestyle=":", label="chance")


def require_title(title: Any) -> None:
    """Raise an error if a title is neither None nor a text."""
    require_text(title, "title")


def by_name(given: Any, argument: str) -> dict[str, list[Any]]:
    """Return the runs of each name; a run that is not in a list is the only one.

    Raises:
        TypeError: not by name.
        ValueError: no names, or a name without runs.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected a dict by name, got {kind_of(given)}")
    runs = {
        str(name): list(of) if isinstance(of, (list, tuple)) else [of] for name, of in given.items()
    }
    if not runs:
        raise ValueError(f"{argument}: expected at least one, got none")
    for name, of in runs.items():
        if not of:
            raise ValueError(f"{argument}: expected at least one run of {name!r}, got none")
    return runs


def evaluations_by_name(given: Any) -> dict[str, list[Evaluation]]:
    """Return the evaluations of each name.

    Raises:
        TypeError, ValueError: as :func:`by_name`, or something else than an evaluation.
    """
    runs = by_name(given, "evaluations")
    for name, of in runs.items():
        for one in of:
            if not isinstance(one, Evaluation):
                raise TypeError(
                    f"evaluations: expected an Evaluation for {name!r}, got {kind_of(one)}"
                )
    return runs


def runs_of(name: str, runs: int, *more: str) -> str:
    """Return the label of a name in a legend, with what else there is to say on lines below."""
    return "\n".join([name, *([f"mean of {runs} runs"] if runs > 1 else []), *more])

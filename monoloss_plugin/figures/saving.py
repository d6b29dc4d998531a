"""Figures as files, and in words for those who cannot see them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from monoloss_plugin._checks import require_at_least
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, kind_of

try:
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.lines import Line2D
    from matplotlib.patches import StepPatch
except ModuleNotFoundError as error:
    raise missing_extra(error, "report") from error

_FEW = 3
"""So many points are named one by one."""


def describe(figure: Axes | Figure) -> str:
    """Return in words what a figure or its axes show: the alternative text of a picture.

    It has the title, both axes, and each series of the legend: where a line starts, passes the
    middle and ends; where the values of a histogram lie; where points lie.

    Args:
        figure: axes that a function of this module has drawn, or a figure of them.

    Raises:
        TypeError: neither axes nor a figure.

    Examples:
        >>> import torch
        >>> from monoloss_plugin.figures import plot_curves
        >>> ax = plot_curves({"mine": torch.tensor([0.9, 0.5, 0.1])}, title="Digits", chance=0.2)
        >>> describe(ax).split(". ")[-2:]
        ['mine: 0.9 at 0, 0.5 at 0.5, 0.1 at 1', 'chance: a line at 0.2.']
    """
    if isinstance(figure, Axes):
        return _of_axes(figure)
    if not isinstance(figure, Figure):
        raise TypeError(f"figure: expected axes or a figure of matplotlib, got {kind_of(figure)}")
    said = [text for part in _parts(figure) if (text := part.get_suptitle())]
    said += [_of_axes(ax) for ax in figure.axes if ax.get_legend_handles_labels()[1]]
    if pictures := sum(len(ax.images) for ax in figure.axes):
        said.append(f"{pictures} pictures")
    return _sentences(said)


def save_figure(figure: Axes | Figure, path: str | os.PathLike[str], dpi: int = 150) -> Path:
    """Write a figure as PNG or SVG, with its description as alternative text.

    The same data, drawn anew, make the same file: it holds neither time nor software versions.

    Args:
        figure: axes or a figure.
        path: a file that ends in .png or .svg; its folder is made if it does not exist.
        dpi: pixels per inch, for PNG.

    Returns:
        The file.

    Raises:
        TypeError: neither axes nor a figure, or another argument of another kind.
        ValueError: another ending, or ``dpi`` below 1.
    """
    place = as_path(path, "path", "a file")
    kind = place.suffix.lower()
    if kind not in (".png", ".svg"):
        raise ValueError(f"path: expected a file that ends in .png or .svg, got {place.name!r}")
    require_at_least(1, dpi, "dpi")
    words = describe(figure)
    whole: Any = figure.figure  # of axes in a part of a figure, this is the part
    whole = whole.figure
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".png":
        metadata = {"Description": words, "Software": None}
        whole.savefig(place, format="png", dpi=dpi, metadata=metadata)
        return place
    drawn = BytesIO()
    metadata = {"Description": words, "Creator": None, "Date": None}
    with rc_context({"svg.hashsalt": "monoloss"}):  # or ids would be random
        whole.savefig(drawn, format="svg", dpi=dpi, metadata=metadata)
    named = f'<svg role="img" aria-label={quoteattr(words)} '  # what screen readers read
    place.write_text(drawn.getvalue().decode().replace("<svg ", named, 1), encoding="utf-8")
    return place


def _parts(figure: FigureBase) -> Iterator[Any]:
    """Yield a figure and its parts."""
    yield figure
    for part in figure.subfigs:
        yield from _parts(part)


def _of_axes(ax: Axes) -> str:
    said = [ax.get_title()]
    for where, label, limits, scale in (
        ("Horizontal", ax.get_xlabel(), ax.get_xlim(), ax.get_xscale()),
        ("Vertical", ax.get_ylabel(), ax.get_ylim(), ax.get_yscale()),
    ):
        low, high = map(_number, limits)
        logarithmic = ", logarithmic" if scale == "log" else ""
        said.append(f"{where} axis: {label}, from {low} to {high}{logarithmic}")
    if (legend := ax.get_legend()) is not None:
        said.append(legend.get_title().get_text().capitalize())
    for artist, label in zip(*ax.get_legend_handles_labels(), strict=True):
        said.append(f"{', '.join(str(label).splitlines())}: {_in_words(artist)}")
    return _sentences(said)


def _in_words(artist: Any) -> str:
    """Return what a series shows."""
    if isinstance(artist, StepPatch):
        return _of_histogram(*artist.get_data()[:2])
    if isinstance(artist, PathCollection):
        return _of_points(np.ma.filled(artist.get_offsets(), np.nan))
    if isinstance(artist, Line2D):
        return _of_line(np.asarray(artist.get_xydata()))
    return "drawn"


def _of_line(points: np.ndarray[Any, Any]) -> str:
    for axis in (0, 1):
        if len(points) == 2 and points[0, axis] == points[1, axis]:
            return f"a line at {_number(points[0, axis])}"
    if not len(points):
        return "nothing"
    chosen = points[sorted({0, len(points) // 2, len(points) - 1})]
    return ", ".join(f"{_number(y)} at {_number(x)}" for x, y in chosen)


def _of_histogram(counts: np.ndarray[Any, Any], edges: np.ndarray[Any, Any]) -> str:
    total = counts.sum()
    if not total:
        return "nothing"
    filled = np.flatnonzero(counts)
    half = edges[1 + np.searchsorted(counts.cumsum(), total / 2)]
    most = int(counts.argmax())
    low, high = _number(edges[filled[0]]), _number(edges[filled[-1] + 1])
    between = f"between {_number(edges[most])} and {_number(edges[most + 1])}"
    return (
        f"{_number(total)} from {low} to {high}, half of them below {_number(half)}, most "
        f"({_number(counts[most])}) {between}"
    )


def _of_points(points: np.ndarray[Any, Any]) -> str:
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return "nothing"
    if len(points) <= _FEW:
        return " and ".join(f"({_number(x)}, {_number(y)})" for x, y in points)
    (left, low), (right, high) = points.min(0), points.max(0)
    x, y = np.median(points, axis=0)
    return (
        f"{len(points)} points, horizontally from {_number(left)} to {_number(right)} (median "
        f"{_number(x)}), vertically from {_number(low)} to {_number(high)} (median {_number(y)})"
    )


def _sentences(said: list[str]) -> str:
    return " ".join(text if text.endswith(".") else f"{text}." for text in said if text)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

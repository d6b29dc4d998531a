"""Time against N, log-log, in the form of the MonoLoss paper's figure 2."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def growth_figure(found: dict[str, Any], machine: str) -> Figure:
    """Draw what the growth case found."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour, label in (
        ("pairwise", "#7f7f7f", "pairwise definition (Algorithm 1)"),
        ("linear", "#00798c", "MonoScore, one pass"),
    ):
        points = found[name]
        samples = [point["samples"] for point in points]
        axes.plot(samples, [p["median"] for p in points], "o-", color=colour, label=label)
    last = found["pairwise"][-1]
    reached = found["pairwise at 65,536, extrapolated"]
    axes.plot(
        [last["samples"], 65_536],
        [last["median"], reached],
        "--",
        color="#7f7f7f",
        label="extrapolated, N²",
    )
    axes.annotate(
        f"{found['times faster at 65,536']:,.0f} times",
        xy=(65_536, reached),
        ha="right",
        va="bottom",
        color="#00798c",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("samples N")
    axes.set_ylabel("seconds")
    axes.set_title(machine, fontsize="medium")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    return figure

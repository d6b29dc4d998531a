"""How scores, purity and activity are distributed over the latents of an SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from monoloss_plugin._checks import require_choice
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.figures.dressing import (
    COLOURS,
    MARKERS,
    axes_for,
    draw_chance,
    dress,
    evaluations_by_name,
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

    from monoloss_plugin.results import Evaluation

_PER_DECADE = 8
_BINS = 40


def plot_scores(
    evaluations: Mapping[str, Evaluation | Sequence[Evaluation]],
    score: Literal["adjusted", "plain"] = "adjusted",
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot how many latents have which MonoScore: a histogram for each SAE, and chance.

    Latents without a score are left out. The legend has the means.

    Args:
        evaluations: for each name an evaluation, or a list of the evaluations of several runs: each
            is a thin line, and their mean a thick one.
        score: "adjusted" for the score above chance, in which chance is 0; "plain" for MonoScore
            itself.
        title: title of the axes.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        TypeError: not evaluations by name, or an argument of another kind.
        ValueError: no evaluations, or an unknown score.
    """
    require_choice(score, "score", ("adjusted", "plain"))
    found = evaluations_by_name(evaluations)
    plain = score == "plain"
    values = {
        name: [
            (one.monoscore.scores if plain else one.monoscore.adjusted)[one.monoscore.defined]
            for one in of
        ]
        for name, of in found.items()
    }
    # SAEs that were scored on the same features share one chance level.
    levels = {round(one.monoscore.chance, 6) for of in found.values() for one in of}
    label = "MonoScore" if plain else "MonoScore above chance"
    return _plot_values(values, label, sorted(levels) if plain else [0.0], title, ax)


def plot_purity(
    evaluations: Mapping[str, Evaluation | Sequence[Evaluation]],
    purity: Literal["adjusted", "binary", "weighted"] = "adjusted",
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot how many latents have which class purity: a histogram for each SAE.

    Latents without a purity are left out. The legend has the means.

    Args:
        evaluations: as for :func:`plot_scores`.
        purity: a field of :class:`~monoloss_plugin.purity.Purity`: "adjusted" for the purity above
            chance, with a line at chance, which is 0; or "binary" or "weighted".
        title: title of the axes.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        TypeError: not evaluations by name, or an argument of another kind.
        ValueError: no evaluations, an evaluation without labels, or an unknown purity.
    """
    require_choice(purity, "purity", ("adjusted", "binary", "weighted"))
    values: dict[str, list[Tensor]] = {}
    for name, of in evaluations_by_name(evaluations).items():
        values[name] = []
        for one in of:
            if one.purity is None:
                raise ValueError(
                    f"evaluations: expected class purities, but {name!r} was evaluated without "
                    "labels"
                )
            each: Tensor = getattr(one.purity, purity)
            values[name].append(each[each.isfinite()])
    label = {"adjusted": "class purity above chance"}.get(purity, f"class purity, {purity}")
    return _plot_values(values, label, [0.0] if purity == "adjusted" else [], title, ax)


def plot_density(
    evaluations: Mapping[str, Evaluation | Sequence[Evaluation]],
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot how often latents are active: a histogram of log10 of their frequency for each SAE.

    Dead latents are counted in the legend.

    Args:
        evaluations: as for :func:`plot_scores`.
        title: title of the axes.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        TypeError: not evaluations by name, or an argument of another kind.
        ValueError: no evaluations.
    """
    require_title(title)
    found = evaluations_by_name(evaluations)
    values = {name: [_log_frequency(one) for one in of] for name, of in found.items()}
    every = torch.cat([run for runs in values.values() for run in runs])
    decades = max(1, -int(every.min().floor())) if len(every) else 1
    labels = {}
    for name, of in found.items():
        dead = sum(one.num_dead for one in of) / len(of)
        labels[name] = runs_of(name, len(of), f"{dead:.4g} of {of[0].num_latents} dead")
    ax = axes_for(ax)
    _draw_histograms(ax, values, labels, np.linspace(-decades, 0, _PER_DECADE * decades + 1))
    x = "log10 of the share of samples on which a latent is active"
    return dress(ax, x, "latents", title)


def plot_support(
    evaluations: Mapping[str, Evaluation | Sequence[Evaluation]],
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the MonoScore above chance of each latent against the number of its active samples.

    Rare latents score high by chance: two samples may be alike for no reason. So a latent is filled
    only if its score is significant (:meth:`~monoloss_plugin.metrics.MonoScoreResult.significant`
    at 0.01), and hollow otherwise. Latents without a score are left out. If samples are patches,
    the scores are those of images by the mean of their patches, which are tested.

    Args:
        evaluations: as for :func:`plot_scores`; the latents of several runs are drawn together.
        title: title of the axes.
        ax: axes to draw on; by default those of a new figure.

    Raises:
        TypeError: not evaluations by name, or an argument of another kind.
        ValueError: no evaluations.
    """
    require_title(title)
    found = evaluations_by_name(evaluations)
    ax = axes_for(ax)
    most = max(sum(one.num_latents for one in of) for of in found.values())
    for i, (name, of) in enumerate(found.items()):
        results = [one.tested for one in of]
        above = torch.cat([one.significant()[one.defined] for one in results])
        order = above.argsort(descending=True, stable=True)  # a legend shows the first
        colour = COLOURS[i % len(COLOURS)]
        latents = sum(one.num_latents for one in of)
        ax.scatter(
            torch.cat([one.support[one.defined] for one in results])[order].numpy(),
            torch.cat([one.adjusted[one.defined] for one in results])[order].numpy(),
            s=min(16.0, max(3.0, 6e3 / most)),
            label=f"{name}\n{int(above.sum())} of {latents} above chance",
            marker=MARKERS[i % len(MARKERS)],
            facecolors=[colour if filled else "none" for filled in above[order].tolist()],
            edgecolors=colour,
            linewidths=0.7,
            rasterized=True,  # or an SVG of a wide SAE would hold every latent
        )
    draw_chance(ax, 0.0)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    x, y = "samples on which the latent is active", "MonoScore above chance"
    return dress(ax, x, y, title, "hollow: may be chance")


def _log_frequency(found: Evaluation) -> Tensor:
    """Return log10 of the frequency of each latent that is not dead."""
    support = found.monoscore.support.double()
    return (support[support > 0] / found.monoscore.num_samples).log10()


def _plot_values(
    values: dict[str, list[Tensor]],
    label: str,
    chance: list[float],
    title: str | None,
    ax: Axes | None,
) -> Axes:
    """Plot a histogram of the values of latents for each name, with lines at chance."""
    require_title(title)
    every = torch.cat([*(run for runs in values.values() for run in runs), torch.tensor(chance)])
    edges = np.histogram_bin_edges(every.numpy(), bins=_BINS)
    labels = {}
    for name, runs in values.items():
        means = [float(run.mean()) for run in runs if len(run)]
        mean = f"mean {sum(means) / len(means):.2f}" if means else "no latents"
        labels[name] = runs_of(name, len(runs), mean)
    ax = axes_for(ax)
    _draw_histograms(ax, values, labels, edges)
    for level in chance:
        draw_chance(ax, level, upright=True)
    return dress(ax, label, "latents", title)


def _draw_histograms(
    ax: Axes, values: dict[str, list[Tensor]], labels: dict[str, str], edges: np.ndarray[Any, Any]
) -> None:
    for i, (name, runs) in enumerate(values.items()):
        style = line_style(i)
        counts = np.stack([np.histogram(run.numpy(), edges)[0] for run in runs])
        for count in counts if len(runs) > 1 else ():
            ax.stairs(count, edges, color=style["color"], linewidth=0.6)
        ax.stairs(
            counts.mean(0),
            edges,
            label=labels[name],
            fill=True,
            facecolor=(style["color"], 0.15),
            edgecolor=style["color"],
            linestyle=style["linestyle"],
            linewidth=1.8,
        )

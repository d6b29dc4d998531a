"""Figures that say what they show."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.comparison import Comparison
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.figures import (
    describe,
    plot_curves,
    plot_density,
    plot_purity,
    plot_scores,
    plot_support,
    plot_trade_off,
    save_figure,
)
from monoloss_plugin.figures.dressing import COLOURS, TEXT
from monoloss_plugin.metrics import MonoScoreResult
from monoloss_plugin.purity import Purity
from monoloss_plugin.results import Evaluation, Spaces


def evaluation(scores: list[float], support: list[int], **more: Any) -> Evaluation:
    """An evaluation of latents with these scores, over 100 samples with a chance level of 0.2."""
    scored, active = torch.tensor(scores, dtype=torch.float64), torch.tensor(support)
    p = more.pop("p", [0.5] * len(scores))
    found = MonoScoreResult(
        scored, active > 1, active, scored, scored, torch.tensor(p).double(), 0.2, 100
    )
    return Evaluation(found, more.pop("purity", None), 0.9, Spaces("the features"))


FOUND = evaluation([0.9, 0.6, 0.1, 0.0, 0.0], [2, 10, 50, 1, 0], p=[0.5, 1e-6, 0.9, 0.5, 0.5])
"""The last two latents have no score, and the last is dead."""
ADJUSTED = [(0.9 - 0.2) / 0.8, (0.6 - 0.2) / 0.8, (0.1 - 0.2) / 0.8]


def labels_of(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def counts_between(shape: StepPatch, low: float, high: float) -> float:
    """The height of the bins of a histogram that overlap with a range."""
    counts, edges, _ = shape.get_data()
    return float(counts[(edges[:-1] <= high) & (edges[1:] >= low)].sum())


def test_curves_show_every_run_and_their_mean() -> None:
    runs = [torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.7, 0.5, 0.3])]
    ax = plot_curves({"with": runs, "without": torch.tensor([0.4, 0.3])})
    drawn = [line.get_ydata().tolist() for line in ax.lines]
    assert drawn == [
        pytest.approx([0.9, 0.5, 0.1]),
        pytest.approx([0.7, 0.5, 0.3]),
        pytest.approx([0.8, 0.5, 0.2]),
        pytest.approx([0.4, 0.3]),
    ]
    assert [line.get_xdata().tolist() for line in ax.lines[2:]] == [[0, 0.5, 1], [0, 1]]
    assert labels_of(ax) == ["with\nmean of 2 runs", "without"]
    assert describe(ax).endswith("without: 0.4 at 0, 0.3 at 1.")


def test_chance_is_a_line_across_the_curves() -> None:
    ax = plot_curves({"with": torch.tensor([0.9, 0.5])}, chance=0.3, title="Some")
    assert ax.lines[-1].get_ydata() == [0.3, 0.3]
    assert labels_of(ax)[-1] == "chance"
    assert ax.get_title() == "Some"


@pytest.mark.parametrize(
    ("curves", "error", "said"),
    [
        ([torch.rand(3)], TypeError, "curves: expected a dict by name, got list"),
        ({}, ValueError, "curves: expected at least one, got none"),
        ({"with": []}, ValueError, "curves: expected at least one run of 'with'"),
        ({"with": [0.5]}, TypeError, "curves: expected a tensor"),
        (
            {"with": torch.rand(3, 2)},
            ValueError,
            r"curves: expected \(M,\) real",
        ),
        (
            {"with": [torch.rand(3), torch.rand(2)]},
            ValueError,
            "curves: expected one length for all runs of 'with', got 3, 2",
        ),
    ],
)
def test_wrong_curves_are_refused(curves: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plot_curves(curves)


def test_trade_offs_show_every_seed_and_baselines_hollow() -> None:
    runs = {
        "mine": [{"r2": 0.9, "monoscore_adjusted": 0.2}, {"r2": 0.8, "monoscore_adjusted": 0.3}],
        "PCA": [{"r2": 0.95, "monoscore_adjusted": 0.1}],
    }
    found = Comparison(runs, {}, ["PCA"], [])
    ax = plot_trade_off(found)
    mine, pca = ax.collections
    assert mine.get_offsets().tolist() == [[0.9, 0.2], [0.8, 0.3]]
    assert (len(mine.get_facecolors()), len(pca.get_facecolors())) == (1, 0)
    assert ax.get_legend().get_title().get_text() == "hollow: baselines"
    assert ax.get_ylabel() == "MonoScore above chance, defined latents"
    assert "mine: (0.9, 0.2) and (0.8, 0.3). PCA: (0.95, 0.1)." in describe(ax)
    with pytest.raises(ValueError, match=r"y: expected one of \['r2', .*'\], got 'purity'"):
        plot_trade_off(found, y="purity")
    with pytest.raises(TypeError, match="comparison: expected a Comparison, got dict"):
        plot_trade_off(runs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("score", "chance"), [("adjusted", 0.0), ("plain", 0.2)])
def test_scores_count_defined_latents_and_show_chance(score: Any, chance: float) -> None:
    values = ADJUSTED if score == "adjusted" else [0.9, 0.6, 0.1]
    ax = plot_scores({"mine": FOUND}, score)
    (shape,) = ax.patches
    assert shape.get_data().values.sum() == 3
    assert [counts_between(shape, value, value) for value in values] == [1, 1, 1]
    assert ax.lines[-1].get_xdata() == [chance, chance]
    assert labels_of(ax) == [f"mine\nmean {sum(values) / 3:.2f}", "chance"]


def test_histograms_of_several_runs_show_each_and_the_mean() -> None:
    other, dead = evaluation([0.9, 0.9], [5, 5]), evaluation([0.0], [0])
    ax = plot_scores({"mine": [FOUND, other], "none": dead})
    first, second, mean, none = (shape.get_data().values for shape in ax.patches)
    assert (first.sum(), second.sum(), none.sum()) == (3, 2, 0)
    assert mean.tolist() == ((first + second) / 2).tolist()
    expected = (sum(ADJUSTED) / 3 + ADJUSTED[0]) / 2
    assert labels_of(ax)[:2] == [f"mine\nmean of 2 runs\nmean {expected:.2f}", "none\nno latents"]


def test_purity_counts_latents_that_have_one_and_needs_labels() -> None:
    binary = torch.tensor([1.0, 0.5, 0.5, torch.nan]).double()
    adjusted = torch.tensor([0.9, -0.1, torch.nan, torch.nan]).double()
    purity = Purity(binary, binary, adjusted, torch.zeros(4, dtype=torch.int64))
    with_labels = evaluation([0.5] * 4, [9] * 4, purity=purity)
    (shape,) = plot_purity({"mine": with_labels}, "binary").patches
    assert [counts_between(shape, value, value) for value in (1.0, 0.5)] == [1, 2]
    ax = plot_purity({"mine": with_labels})
    assert ax.patches[0].get_data().values.sum() == 2
    assert ax.lines[-1].get_xdata() == [0, 0]
    assert labels_of(ax) == ["mine\nmean 0.40", "chance"]
    with pytest.raises(ValueError, match=r"evaluations: .* 'mine' was evaluated without labels"):
        plot_purity({"mine": FOUND})


def test_density_counts_each_living_latent_once() -> None:
    found = evaluate(load_pretrained("digits").sae, load_features("digits", "held_out"))
    ax = plot_density({"digits": found})
    (shape,) = ax.patches
    assert shape.get_data().values.sum() == 256 - found.num_dead
    assert labels_of(ax) == [f"digits\n{found.num_dead} of 256 dead"]


def test_density_reaches_latents_that_are_active_on_one_sample_of_millions() -> None:
    rare = evaluation([0.5, 0.5], [1, 10**8])
    rare = replace(rare, monoscore=replace(rare.monoscore, num_samples=10**8))
    (shape,) = plot_density({"mine": rare}).patches
    counts, edges, _ = shape.get_data()
    assert (edges[0], counts[0], counts[-1]) == (-8, 1, 1)


def test_support_shows_each_scored_latent_hollow_unless_significant() -> None:
    ax = plot_support({"mine": FOUND})
    (points,) = ax.collections
    drawn = torch.tensor(points.get_offsets().tolist())
    assert drawn[:, 0].tolist() == [10, 2, 50]
    assert drawn[:, 1].tolist() == pytest.approx([ADJUSTED[1], ADJUSTED[0], ADJUSTED[2]])
    assert points.get_facecolors()[:, 3].tolist() == [1, 0, 0]
    assert ax.get_xscale() == "log"
    assert ax.lines[-1].get_ydata() == [0, 0]
    assert labels_of(ax) == ["mine\n1 of 5 above chance", "chance"]


@pytest.mark.parametrize("plot", [plot_scores, plot_purity, plot_density, plot_support])
def test_evaluations_of_another_kind_are_refused(plot: Any) -> None:
    with pytest.raises(TypeError, match="evaluations: expected a dict by name, got Evaluation"):
        plot(FOUND)
    with pytest.raises(TypeError, match="evaluations: expected an Evaluation for 'mine', got int"):
        plot({"mine": [FOUND, 3]})
    with pytest.raises(TypeError, match="ax: expected axes of matplotlib, got Figure"):
        plot({"mine": replace(FOUND, purity=Purity(*torch.rand(4, 5)))}, ax=Figure())
    with pytest.raises(ValueError, match="score: expected one of"):
        plot_scores({"mine": FOUND}, "raw")  # type: ignore[arg-type]


def test_plots_draw_on_the_axes_that_they_are_given() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_scores({"mine": FOUND}, ax=left) is left
    assert plot_support({"mine": FOUND}, ax=right) is right
    assert len(figure.axes) == 2
    assert describe(figure) == f"{describe(left)} {describe(right)}"


def test_descriptions_hold_the_title_the_axes_and_every_series() -> None:
    curve = torch.tensor([0.9, 0.5, 0.1])
    ax = plot_curves({"with": [curve, curve]}, chance=0.25, title="Digits")
    assert describe(ax) == (
        "Digits. Horizontal axis: latents, sorted by score (share of all), from 0 to 1. Vertical "
        "axis: MonoScore, from 0.06 to 0.94. with, mean of 2 runs: 0.9 at 0, 0.5 at 0.5, 0.1 at 1. "
        "chance: a line at 0.25."
    )
    many = evaluation([0.2] * 30 + [1.0] * 10, [*range(2, 32), *[90] * 10])
    said = describe(plot_density({"mine": many}))
    # Of 40 frequencies, 10 are 0.9; the two in the middle are 0.21 and 0.22.
    assert "mine, 0 of 40 dead: 40 from -1.75 to 0, half of them below -0.625, most (10) " in said
    assert "between -0.125 and 0." in said
    said = describe(plot_support({"mine": many}))
    assert "from 1.65 to 109, logarithmic" in said
    assert "40 points, horizontally from 2 to 90 (median 21.5), vertically from 0 to 1 " in said
    with pytest.raises(TypeError, match="figure: expected axes or a figure of matplotlib, got str"):
        describe("some")  # type: ignore[arg-type]


def test_saved_pictures_hold_their_description_and_nothing_that_changes(tmp_path) -> None:
    found = {"R² & <mine>": FOUND}
    words = describe(plot_scores(found))
    for kind in ("png", "svg"):
        first = save_figure(plot_scores(found), tmp_path / "new" / f"first.{kind}")
        second = save_figure(plot_scores(found).figure, str(tmp_path / f"second.{kind}"))
        assert first.read_bytes() == second.read_bytes()
        assert version("matplotlib").encode() not in first.read_bytes()
    with Image.open(tmp_path / "new" / "first.png") as picture:
        assert picture.info["Description"] == words
        assert "Software" not in picture.info
        assert picture.size == (1080, 600)
        assert picture.getpixel((2, 2))[3] == 0  # transparent
    root = ElementTree.parse(tmp_path / "new" / "first.svg").getroot()
    assert (root.get("role"), root.get("aria-label")) == ("img", words)


def test_wrong_places_of_pictures_are_refused(tmp_path) -> None:
    ax = plot_scores({"mine": FOUND})
    with pytest.raises(ValueError, match=r"path: expected a file that ends in .png or .svg, got"):
        save_figure(ax, tmp_path / "scores.pdf")
    with pytest.raises(ValueError, match="dpi: expected at least 1, got 0"):
        save_figure(ax, tmp_path / "scores.png", dpi=0)
    with pytest.raises(TypeError, match="figure: expected axes or a figure"):
        save_figure([ax], tmp_path / "scores.png")  # type: ignore[arg-type]


def linear(colour: str) -> np.ndarray:
    """A colour as linear light."""
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


VISION = {
    "all": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
"""From linear light to what people see: Machado, Oliveira & Fernandes 2009, severity 1."""


def lab(light: np.ndarray) -> np.ndarray:
    """Linear light in CIELAB, where a distance of 2.3 is just noticeable."""
    matrix = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    x, y, z = np.cbrt(matrix @ light.clip(0.01, 1) / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", ["#ffffff", "#1e1e1e"])
def test_figures_can_be_read_on_light_and_dark_pages(page: str) -> None:
    assert min(contrast(colour, page) for colour in COLOURS) >= 3
    # 4.5 is wanted; with both pages, at most 4.08 is possible.
    assert contrast(TEXT, page) >= 4
    ax = plot_scores({"mine": FOUND}, title="Some")
    texts = [ax.title, ax.xaxis.label, *ax.get_xticklabels(), *ax.get_legend().get_texts()]
    assert {to_hex(text.get_color()) for text in texts} == {TEXT}


@pytest.mark.parametrize("eyes", VISION)
def test_colours_differ_for_colour_blind_people(eyes: str) -> None:
    seen = [lab(VISION[eyes] @ linear(colour)) for colour in COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15

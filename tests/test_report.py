"""Bands of activating images, and figures that say what they show."""

from __future__ import annotations

import pytest
import torch

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.comparison import Comparison
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.report import (
    LatentRow,
    activating_images_figure,
    activation_bands,
    curves_figure,
    density_figure,
    trade_off_figure,
)


def test_bands_are_the_strongest_the_middle_and_the_weakest_positive_activations() -> None:
    activations = torch.zeros(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:21]
    activations[order] = torch.arange(21, 0, -1).float()
    bands = activation_bands(activations, count=5)
    assert bands.num_active == 21
    assert bands.top.tolist() == order[:5].tolist()
    assert bands.middle.tolist() == order[8:13].tolist()
    assert bands.bottom.tolist() == order[16:].tolist()


def test_few_active_samples_make_short_bands_and_none_make_empty_ones() -> None:
    bands = activation_bands(torch.tensor([0.0, 2.0, 1.0]), count=5)
    assert bands.top.tolist() == bands.middle.tolist() == bands.bottom.tolist() == [1, 2]
    assert activation_bands(torch.tensor([-1.0, 0.0]), count=5).top.tolist() == []
    with pytest.raises(ValueError, match=r"activations: expected \(N,\) of one latent"):
        activation_bands(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="count: expected at least 1"):
        activation_bands(torch.zeros(3), count=0)


def test_curves_show_every_run_and_their_mean() -> None:
    runs = [torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.7, 0.5, 0.3])]
    (axes,) = curves_figure({"with": runs}).axes
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    assert drawn == [
        pytest.approx([0.9, 0.5, 0.1]),
        pytest.approx([0.7, 0.5, 0.3]),
        pytest.approx([0.8, 0.5, 0.2]),
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["with"]
    with pytest.raises(ValueError, match="curves: expected at least one run of 'with'"):
        curves_figure({"with": []})


def test_chance_is_a_line_across_the_curves() -> None:
    (axes,) = curves_figure({"with": [torch.tensor([0.9, 0.5])]}, chance=0.3).axes
    assert axes.lines[-1].get_ydata() == [0.3, 0.3]
    assert axes.get_legend().get_texts()[-1].get_text() == "chance"


def test_trade_offs_show_every_seed_and_baselines_hollow() -> None:
    runs = {
        "mine": [{"r2": 0.9, "monoscore_adjusted": 0.2}, {"r2": 0.8, "monoscore_adjusted": 0.3}],
        "PCA": [{"r2": 0.95, "monoscore_adjusted": 0.1}],
    }
    found = Comparison(runs, {}, ["PCA"], [])
    (axes,) = trade_off_figure(found).axes
    mine, pca = axes.collections
    assert mine.get_offsets().tolist() == [[0.9, 0.2], [0.8, 0.3]]
    assert (len(mine.get_facecolors()), len(pca.get_facecolors())) == (1, 0)
    assert axes.get_ylabel() == "MonoScore above chance, defined latents"
    with pytest.raises(ValueError, match=r"y: expected one of \['r2', .*'\], got 'purity'"):
        trade_off_figure(found, y="purity")


def test_density_counts_each_living_latent_once() -> None:
    found = evaluate(load_pretrained("digits").sae, load_features("digits", "held_out"))
    (axes,) = density_figure({"digits": found}).axes
    (shape,) = axes.patches
    heights = shape.get_xy()[1:-1:2, 1]
    assert heights.sum() == 256 - found.num_dead
    assert axes.get_legend().get_texts()[0].get_text() == f"digits: {found.num_dead} of 256 dead"


def test_grids_place_each_image_where_its_band_is(tmp_path) -> None:
    images = torch.arange(8.0).reshape(8, 1, 1).expand(8, 4, 4)
    latent = LatentRow("rank 3", torch.arange(8.0))  # image n activates it by n
    figure = activating_images_figure([(latent, latent)], images, count=2, title="digits")
    shown = [float(axes.images[0].get_array()[0, 0]) for axes in figure.axes if axes.images]
    assert shown == [7, 6, 5, 4, 2, 1] * 2
    figure.savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        activating_images_figure([], images)

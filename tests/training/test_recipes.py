"""Recipes: the papers' settings, and numbers that suit the features."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from monoloss_plugin import L1L2Ratio, MonoLoss, OffSupportL1, load_features
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.encoders import SHORT_NAMES
from monoloss_plugin.losses import lam_factor
from monoloss_plugin.training import PAPER_LAMS, RECIPES, Recipe, get_recipe, paper_lam
from monoloss_plugin.training.recipes import Architecture


def features_of(encoder: dict, width: int = 768, **source) -> FeatureSet:
    record = {"encoder": encoder, "source": source}
    return FeatureSet.from_tensors(torch.randn(4, width), record=record)


CLIP = {"library": "transformers", "name": "openai/clip-vit-large-patch14"}


@pytest.fixture(scope="module")
def digits() -> FeatureSet:
    return load_features("digits", "train")


def test_what_is_none_is_chosen_for_the_features() -> None:
    small, large = Recipe().fitted_to(1198, 64), Recipe().fitted_to(1_281_167, 768)
    assert (small.num_latents, small.k, small.batch_size, small.epochs) == (256, 8, 256, 375)
    assert (large.num_latents, large.k, large.batch_size, large.epochs) == (8192, 64, 2048, 50)
    assert Recipe(num_latents=100, k=3, epochs=0.5, batch_size=7).fitted_to(1198, 64) == Recipe(
        num_latents=100, k=3, epochs=0.5, batch_size=7
    )
    tiny = Recipe().fitted_to(3, 2)
    assert (tiny.num_latents, tiny.k, tiny.batch_size) == (1, 1, 3)
    assert Recipe("standard").fitted_to(1198, 64).k is None


def test_the_paper_has_a_weight_for_each_encoder_data_set_and_architecture() -> None:
    assert len({one[:3] for one in PAPER_LAMS}) == len(PAPER_LAMS) == 24
    of_the_hub = {name for name, one in SHORT_NAMES.items() if one.package is None}
    assert {one.encoder for one in PAPER_LAMS} == of_the_hub
    # Added up by hand from appendix B.
    nmse = sorted(one.lam for one in PAPER_LAMS if one.architecture == "topk")
    mse = sorted(one.lam for one in PAPER_LAMS if one.architecture != "topk")
    assert (nmse[0], nmse[-1], sum(nmse)) == (0.09, 0.9, pytest.approx(2.02))
    assert (mse[0], mse[-1], sum(mse)) == (3e-5, 7e-4, pytest.approx(50.5e-4))


def test_the_papers_weight_is_found_by_encoder_and_source() -> None:
    photos = features_of(CLIP, kind="open-images")
    assert paper_lam(photos, "batchtopk").lam == 5e-4
    assert paper_lam(features_of(CLIP), "batchtopk").lam == 3e-4
    vit = {"library": "timm", "name": "vit_large_patch16_224.augreg_in21k_ft_in1k"}
    assert paper_lam(features_of(vit), "jumprelu").lam == 7e-4


def test_an_encoder_that_the_paper_does_not_have_gets_the_same_trade_off() -> None:
    found = paper_lam(features_of({}, width=64), "batchtopk")

    def weight_in_host(lam: float, width: int) -> float:
        return lam * lam_factor("mse", width=width, mean_square_norm=1.0, reduction="sum")

    assert weight_in_host(found.lam, 64) == pytest.approx(weight_in_host(3e-4, 768))
    assert paper_lam(features_of({}, width=64), "topk").lam == 0.09


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_changes_and_nothing_else(name, digits) -> None:
    assert get_recipe(name, digits, seed=3, num_latents=32, k=4).seed == 3
    assert get_recipe(name, digits, k=None) == get_recipe(name, digits)
    with pytest.raises(TypeError, match="recipe: no such field: latents"):
        get_recipe(name, digits, latents=8)


def test_recipes_say_what_they_do(digits) -> None:
    plain, ours = get_recipe("plain", digits), get_recipe("recommended", digits)
    assert not plain.terms
    assert ours == replace(plain, terms=ours.terms, from_data=True, refit=True)
    (term,) = ours.terms
    assert isinstance(term, MonoLoss)
    assert term.lam_units == "nmse"  # one value for every width
    (budget,) = get_recipe("hard-budget", digits).terms
    assert isinstance(budget, OffSupportL1)
    paper = get_recipe("monoloss-paper", features_of(CLIP))
    assert (paper.num_latents, paper.k, paper.batch_size, paper.epochs) == (8192, 64, 2048, 50)
    assert (paper.learning_rate, paper.adam_epsilon) == (1e-4, 6.25e-10)
    assert paper.unit_norm_decoder
    assert not paper.from_data


def test_the_weight_can_be_changed(digits) -> None:
    two = Recipe(terms=(MonoLoss(lam=0.5), L1L2Ratio(lam=0.1)))
    assert [term.lam for term in two.with_lam(0.2).terms] == [0.2, 0.2]
    (term,) = get_recipe("recommended", digits, lam=0.01).terms
    assert term.lam == 0.01
    with pytest.raises(ValueError, match="lam: this recipe has no loss term"):
        get_recipe("plain", digits, lam=0.01)


def test_the_command_knows_every_recipe_and_architecture() -> None:
    from monoloss_plugin.cli.train import _ARCHITECTURES, _NAMES

    assert tuple(RECIPES) == _NAMES
    assert get_args(Architecture) == _ARCHITECTURES


def test_bad_recipes_are_named(digits) -> None:
    with pytest.raises(ValueError, match=r"recipe: expected one of .*recommended"):
        get_recipe("best", digits)
    with pytest.raises(ValueError, match="architecture: expected one of"):
        Recipe("relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k: standard has no k"):
        Recipe("standard", k=8)
    with pytest.raises(ValueError, match="epochs: expected a finite number above 0, got 0"):
        Recipe(epochs=0)
    with pytest.raises(ValueError, match="warm_up: expected 0 to 1, got 2"):
        Recipe(warm_up=2)
    with pytest.raises(TypeError, match="terms: expected loss terms"):
        Recipe(terms=(0.1,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="architecture: expected one of"):
        get_recipe("monoloss-paper", digits, architecture="gated")


def test_more_active_latents_than_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="k: expected at most the number of latents, 8, got 9"):
        Recipe(num_latents=8, k=9)
    with pytest.raises(ValueError, match="k: expected at most the number of latents"):
        Recipe(k=1000).fitted_to(1000, 4)

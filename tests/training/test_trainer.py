"""SAELens's trainer as a recipe sets it up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sklearn.datasets import load_digits

from monoloss_plugin import functional, load_features
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.training import Recipe, batches_for, get_recipe, make_trainer
from monoloss_plugin.training.trainer import as_others_load_it
from tests.adapters.test_sae_lens import step_input

SMALL = {"num_latents": 32, "k": 4, "batch_size": 256, "epochs": 5}


@pytest.fixture(scope="module")
def digits() -> FeatureSet:
    return load_features("digits", "train")


def fitted(features: FeatureSet, recipe: Recipe):
    recipe = recipe.fitted_to(len(features), features.width)
    return make_trainer(batches_for(features, recipe), recipe).fit()


def test_a_plain_recipe_is_saelens_s_own_training(digits) -> None:
    ours = fitted(digits, Recipe(**SMALL))
    torch.manual_seed(0)
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=64, d_sae=32, k=4))
    cfg = SAETrainerConfig(
        total_training_samples=20 * 256,
        train_batch_size_samples=256,
        lr=1e-3,
        lr_end=1e-3,
        lr_decay_steps=4,
        dead_feature_window=4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = FeatureBatches(digits, batch_size=256)
    theirs = SAETrainer(cfg=cfg, sae=sae, data_provider=batches.tensors()).fit()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(
    "architecture",
    ["batchtopk", "topk", "matryoshka_batchtopk", "jumprelu", "standard", "gated"],
)
def test_every_architecture_trains_with_the_recommended_recipe(architecture, digits) -> None:
    sizes = {**SMALL, "k": 4 if architecture not in ("standard", "gated") else None}
    sae = fitted(digits, get_recipe("recommended", digits, architecture=architecture, **sizes))
    assert isinstance(sae, get_sae_training_class(architecture)[0])
    assert "monoloss" in sae.cfg.metadata.monoloss["terms"]
    loaded = as_others_load_it(sae)
    assert isinstance(loaded, SAE)
    assert loaded.encode(torch.randn(3, 64)).shape == (3, 32)


def test_data_point_initialisation_comes_before_the_first_step(digits) -> None:
    recipe = Recipe(**SMALL, from_data=True).fitted_to(len(digits), 64)
    sae = make_trainer(batches_for(digits, recipe), recipe).sae
    unit = torch.nn.functional.normalize(digits.tensor().float())
    assert torch.allclose(sae.b_dec, unit.mean(0), atol=1e-5)


def test_the_papers_decoder_keeps_unit_norms_and_loses_the_gradient_along_them(digits) -> None:
    recipe = get_recipe("monoloss-paper", digits, **SMALL)
    trainer = make_trainer(batches_for(digits, recipe), recipe)
    sae = trainer.sae
    assert trainer.optimizer.param_groups[0]["eps"] == 6.25e-10
    batch = next(trainer.data_provider)

    before = sae.W_dec.detach().clone()
    assert torch.allclose(before.norm(dim=1), torch.ones(32))
    seen: list[torch.Tensor] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(sae.W_dec.grad.clone()))
    trainer.step(batch)
    assert torch.allclose((seen[0] * before).sum(1), torch.zeros(32), atol=1e-6)
    assert seen[0].norm() > 0
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-6)
    assert not torch.allclose(sae.W_dec, before)


def test_unit_norms_can_be_let_go(digits) -> None:
    from monoloss_plugin.training import unit_norm_decoder

    recipe = Recipe(**SMALL)
    trainer = make_trainer(batches_for(digits, recipe), recipe)
    unit_norm_decoder(trainer).remove()
    trainer.step(next(trainer.data_provider))
    assert not torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)


def test_a_loss_starts_when_the_recipe_says(digits) -> None:
    recipe = get_recipe("recommended", digits, **SMALL, start=0.5, warm_up=0.0)
    trainer = make_trainer(batches_for(digits, recipe), recipe)
    weights = []
    for _ in range(12):
        weights.append(trainer.coefficient_schedulers["monoloss"].value)
        trainer.step(next(trainer.data_provider))
    assert weights == [0.0] * 10 + [recipe.terms[0].lam] * 2


def test_jumprelu_aims_at_k(digits) -> None:
    sae = fitted(digits, Recipe("jumprelu", num_latents=64, k=8, batch_size=256, epochs=100))
    x = torch.nn.functional.normalize(digits.tensor().float())
    assert float((sae.encode(x) > 0).float().sum(1).mean()) == pytest.approx(8, rel=0.25)


def test_settings_reach_the_sae(digits) -> None:
    recipe = Recipe(**SMALL, settings={"aux_loss_coefficient": 0.25})
    assert make_trainer(batches_for(digits, recipe), recipe).sae.cfg.aux_loss_coefficient == 0.25


def test_a_recipe_that_cannot_be_trained_is_refused(digits) -> None:
    twice = Recipe(**SMALL, settings={"normalize_activations": "layer_norm"})
    with pytest.raises(ValueError, match=r"settings: normalize_activations: .* unit norm already"):
        make_trainer(batches_for(digits, twice), twice)
    with pytest.raises(ValueError, match="batch_size: expected at most 1198, the rows"):
        Recipe(batch_size=2048).fitted_to(len(digits), 64)
    with pytest.raises(ValueError, match="recipe: some of it is None; call its fitted_to first"):
        batches_for(digits, Recipe())


@pytest.fixture(scope="module")
def patches() -> FeatureSet:
    """Quarters of a digit's pixels, of 2 x 2 patches each."""
    digits = load_digits()
    x = torch.tensor(digits.images).float().view(-1, 2, 4, 2, 4).permute(0, 1, 3, 2, 4)
    return FeatureSet.from_tensors(x.reshape(-1, 4, 16), digits.target)


@pytest.mark.parametrize("kind", ["image", "own", "active"])
def test_patches_are_compared_with_those_of_other_images(patches, kind) -> None:
    recipe = get_recipe("recommended", patches, patches=kind, **{**SMALL, "epochs": 1})
    recipe = replace(recipe, warm_up=0.0).fitted_to(len(patches), 16, patches.num_images)
    batches = FeatureBatches(patches, batch_size=256, shuffle="images")  # for many such pairs
    trainer = make_trainer(batches, recipe)
    features = next(trainer.data_provider)
    batch = batches.samples_of(features)
    output = trainer.sae.training_forward_pass(step_input(features, trainer.sae))
    compared = batch.embeddings if kind == "image" else features
    term = recipe.terms[0]
    expected = term(output.feature_acts, compared, images=batch.images) / term.lam
    assert output.metrics["monoscore"].item() == pytest.approx(1 - expected.item(), abs=1e-5)
    every_pair = functional.monoloss(output.feature_acts, compared).item()
    assert abs(every_pair - expected.item()) > 1e-4
    said = trainer.sae.cfg.metadata.monoloss["terms"]["monoloss"]
    assert said["patches"] == kind
    assert ("mean over the patches of each image" in said["compared_by"]) == (kind == "image")


def test_whole_images_have_no_patches_to_compare(digits) -> None:
    with pytest.raises(ValueError, match="patches: these are features of whole images"):
        get_recipe("recommended", digits, patches="own")


def test_a_recipe_without_monoloss_compares_no_patches(patches) -> None:
    with pytest.raises(ValueError, match="patches: this recipe has no MonoLoss"):
        get_recipe("hard-budget", patches, patches="own")


def test_a_run_on_patches_has_as_many_steps_as_one_on_images(patches) -> None:
    sizes = Recipe().fitted_to(1_281_167 * 196, 768, 1_281_167)
    assert (sizes.num_latents, sizes.batch_size) == (8192, 2048)
    assert sizes.epochs == pytest.approx(50 / 196, abs=1e-3)
    few = Recipe().fitted_to(len(patches), 16, patches.num_images)
    assert few.epochs * (len(patches) // few.batch_size) == pytest.approx(1500, rel=1e-3)

"""SAELens's own trainer, set up by a recipe. What it lacks is attached from outside."""

from __future__ import annotations

import tempfile
from typing import Any, TypeVar

import torch

from monoloss_plugin.adapters.sae_lens import add_loss
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.losses import LossHandle
from monoloss_plugin.saes.initialise import init_from_data
from monoloss_plugin.training.recipes import WITH_K, Recipe

# After the adapter, whose import error names the extra to install.
from sae_lens import SAE, SAETrainer  # isort: skip
from sae_lens.config import LoggingConfig, SAETrainerConfig  # isort: skip
from sae_lens.registry import get_sae_training_class  # isort: skip

Number = TypeVar("Number", int, float)

_DEAD_FEATURE_WINDOW = 1000  # SAELens's default, which is longer than a short run
_TOWARDS_K = 0.01
"""JumpReLU's weight of the squared distance to k, for inputs of unit norm."""
_L1 = 0.05
"""The L1 weight of "standard" and "gated", for inputs of unit norm."""


def make_trainer(
    batches: FeatureBatches, recipe: Recipe, *, logger: LoggingConfig | None = None
) -> SAETrainer[Any, Any]:
    """Return SAELens's ``SAETrainer`` for a recipe and batches. Call its ``fit()``.

    The recipe's seed decides the weights. It seeds torch's global generator, from which SAELens
    draws them.

    Args:
        batches: of training features, as :func:`batches_for` makes them.
        recipe: without None, as :meth:`Recipe.fitted_to` returns it.
        logger: SAELens's own; by default none.

    Raises:
        ValueError: fewer rows than latents, with data-point initialisation; or a loss term or
            setting that the architecture does not take.
    """
    features, device = batches.features, batches.device
    sae = _new_sae(features.width, recipe, device)
    if recipe.from_data:
        init_from_data(sae, features, seed=recipe.seed)
    steps = max(1, round(_set(recipe.epochs) * len(batches)))
    trainer: SAETrainer[Any, Any] = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * batches.batch_size,
            train_batch_size_samples=batches.batch_size,
            lr=recipe.learning_rate,
            lr_end=recipe.learning_rate,
            lr_decay_steps=int(recipe.learning_rate_decay * steps),
            dead_feature_window=min(_DEAD_FEATURE_WINDOW, max(1, steps // 5)),
            device=str(device),
            logger=logger or LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches.tensors(),
    )
    for group in trainer.optimizer.param_groups:  # SAELens's config has no field for it
        group["eps"] = recipe.adam_epsilon
    if recipe.unit_norm_decoder:
        unit_norm_decoder(trainer)
    embeddings = None if features.patches is None else batches.samples_of
    for term in recipe.terms:
        add_loss(
            trainer,
            term,
            start=round(recipe.start * steps),
            warm_up_steps=int(recipe.warm_up * steps),
            embeddings=embeddings,
        )
    return trainer


def batches_for(
    features: FeatureSet, recipe: Recipe, device: torch.device | str = "cpu"
) -> FeatureBatches:
    """Return the batches that a recipe trains on, of unit norm, in an order that its seed decides.

    Raises:
        ValueError: there are fewer rows than a batch needs.
    """
    return FeatureBatches(
        features, batch_size=_set(recipe.batch_size), seed=recipe.seed, device=device
    )


def unit_norm_decoder(trainer: SAETrainer[Any, Any]) -> LossHandle:
    """Keep the decoder's rows at unit norm in a SAELens trainer, as the MonoLoss paper does.

    Before each step of the optimizer, the gradient of ``W_dec`` loses its part along the rows.
    After the step, the rows are scaled to unit norm again.

    Args:
        trainer: an ``SAETrainer``, before training.

    Returns:
        A handle; call its ``remove()`` to let the norms go.

    Source: Nasiri-Sarvi et al. 2026, appendix B; Bricken et al. 2023.
    """
    decoder = trainer.sae.W_dec

    @torch.no_grad()
    def project(*_: Any) -> None:
        if decoder.grad is not None:
            along = (decoder.grad * decoder).sum(dim=1, keepdim=True)
            decoder.grad.sub_(along * decoder)

    @torch.no_grad()
    def scale(*_: Any) -> None:
        decoder.div_(decoder.norm(dim=1, keepdim=True))

    scale()
    handles = (
        trainer.optimizer.register_step_pre_hook(project),
        trainer.optimizer.register_step_post_hook(scale),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return LossHandle("unit_norm_decoder", remove)


def as_others_load_it(sae: Any) -> SAE[Any]:
    """Return a trained SAE as SAELens saves it for inference and loads it again."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=str(sae.device))


def _new_sae(width: int, recipe: Recipe, device: torch.device) -> Any:
    if recipe.settings.get("normalize_activations", "none") != "none":
        raise ValueError("settings: normalize_activations: the inputs have unit norm already")
    torch.manual_seed(recipe.seed)
    sae_class, config_class = get_sae_training_class(recipe.architecture)
    num_latents, k = _set(recipe.num_latents), recipe.k
    settings: dict[str, Any] = {"d_in": width, "d_sae": num_latents, "device": str(device)}
    if recipe.architecture not in WITH_K:
        settings["l1_coefficient"] = _L1
    elif recipe.architecture != "jumprelu":
        settings["k"] = k
    else:
        settings |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": k}
        settings["l0_coefficient"] = _TOWARDS_K
    if recipe.architecture == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = sorted({max(1, num_latents // 4), num_latents})
    return sae_class(config_class(**settings | dict(recipe.settings)))


def _set(number: Number | None) -> Number:
    if number is None:
        raise ValueError("recipe: some of it is None; call its fitted_to first")
    return number

"""The SAEs of the experiments: how each is trained, and that none is trained twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from monoloss_plugin.functional import Units
from monoloss_plugin.losses import L1L2Ratio, MonoLoss, OffSupportL1, StepTensors, TermValue
from monoloss_plugin.reproduce.experiment import Features, Setting
from monoloss_plugin.saes.selection import with_l0
from monoloss_plugin.training import Recipe, get_recipe, train
from monoloss_plugin.training.recipes import WITH_K, Architecture
from monoloss_plugin.training.run import EVALUATION

from sae_lens import SAE  # isort: skip  # after the training, whose error names the extra

logger = logging.getLogger(__name__)

ARCHITECTURES: tuple[Architecture, ...] = ("batchtopk", "topk", "jumprelu", "standard")
"""Those of the MonoLoss paper."""

PLAIN, MONOLOSS, RECOMMENDED, SHUFFLED = "plain", "MonoLoss", "recommended", "shuffled"
UNREWARDED = "recommended without MonoLoss"
REGULARIZERS: Mapping[str, tuple[type[OffSupportL1] | type[L1L2Ratio], Units]] = {
    "OffSupportL1": (OffSupportL1, "batch_active"),
    "OffSupportL1, all units": (OffSupportL1, "all"),
    "L1L2Ratio": (L1L2Ratio, "batch_active"),
    "L1L2Ratio, all units": (L1L2Ratio, "all"),
}
"""The Hard Budget paper's terms, by the units that they act on."""
BOTH = "MonoLoss and L1L2Ratio"

_MOST = {"num_latents": 2048, "k": 32, "batch_size": 512}
"""Sizes of the small scale: two CPU cores train such an SAE on 50,000 images in a minute."""
_EPOCHS, _STEPS = 4.0, 350
"""Passes over the rows at the small scale; or more, for so many steps."""
_REGULARIZER_LAM = {OffSupportL1: 3e-3, L1L2Ratio: 3e-3}
"""In the units "nmse". The paper's weights are not known, and these were not tuned."""


@dataclass(frozen=True)
class ShuffledMonoLoss(MonoLoss):
    """The control: MonoLoss that compares each sample by the embedding of another one."""

    def compute_loss(self, step: StepTensors) -> TermValue:
        """Return the loss, for embeddings that are moved on by one sample."""
        return super().compute_loss(step._replace(embeddings=step.embeddings.roll(1, 0)))


def k_of(setting: Setting, features: Features) -> int:
    """Return the k of the experiments that have one k."""
    return int(_sizes(setting, features)["k"])


def ks_of(setting: Setting, features: Features) -> tuple[int, int, int]:
    """Return the k of the experiments over several k."""
    k = k_of(setting, features)
    return k // 2, k, 2 * k


def _sizes(setting: Setting, features: Features) -> dict[str, Any]:
    if setting.full:
        return {"num_latents": 8192, "k": 64, "batch_size": 2048, "epochs": 50}
    rows = len(features.train) * 9 // 10  # without the tenth that train() holds out
    fitted = get_recipe("plain", features.train).fitted_to(rows, features.train.width)
    sizes = {name: min(most, getattr(fitted, name)) for name, most in _MOST.items()}
    return {**sizes, "epochs": max(_EPOCHS, math.ceil(_STEPS * sizes["batch_size"] / rows))}


def recipes(
    setting: Setting, features: Features, architecture: Architecture, k: int | None = None
) -> dict[str, Recipe]:
    """Return the recipes of an architecture by name, without a seed.

    At the full scale these are the MonoLoss paper's settings. At the small one, they are the plain
    recipe's with the weights of the recommended one, since the paper's learning rate needs its
    number of steps.

    Args:
        setting: the scale.
        features: what they are for.
        architecture: SAELens's name.
        k: another k than that of :func:`k_of`. Architectures without a k have none.
    """
    sizes = _sizes(setting, features)
    sizes["k"] = (k or sizes["k"]) if architecture in WITH_K else None
    strong = (MonoLoss(lam=0.8, lam_units="nmse"),)
    name = "monoloss-paper" if setting.full else "plain"
    base = get_recipe(name, features.train, architecture=architecture, **sizes)
    terms = base.terms or strong
    plain = replace(base, terms=())
    made = {
        PLAIN: plain,
        MONOLOSS: replace(base, terms=terms),
        RECOMMENDED: replace(base, terms=strong, from_data=True, refit=True),
        UNREWARDED: replace(base, terms=(), from_data=True, refit=True),
        SHUFFLED: replace(base, terms=tuple(ShuffledMonoLoss(**vars(term)) for term in terms)),
    }
    if architecture == "topk":
        for name, (term, units) in REGULARIZERS.items():
            made[name] = replace(base, terms=(term(lam=_REGULARIZER_LAM[term], units=units),))
        ratio = L1L2Ratio(lam=_REGULARIZER_LAM[L1L2Ratio])
        made[BOTH] = replace(base, terms=(*terms, ratio))
    return made


def spaces_of(setting: Setting, encoder: str) -> str:
    """Return a name for the encoders that an encoder's SAEs are also scored by, for a run's key."""
    others = [name for name in setting.features if name != encoder]
    return "by " + (" and ".join(others) or "itself")


def trained(setting: Setting, encoder: str, name: str, recipe: Recipe, seed: int) -> SAE[Any]:
    """Return an SAE, trained now or before. A tenth of the training rows is held out from it.

    So no row that experiments measure on decides anything, such as whether a refitted decoder is
    kept.
    """
    recipe = replace(recipe, seed=seed)
    size = f"{recipe.architecture}-{recipe.num_latents}" + (f"-k{recipe.k}" if recipe.k else "")
    folder = setting.out / "saes" / encoder / size / name.replace(" ", "-") / f"seed-{seed}"
    features = setting.features[encoder].train
    if not (folder / EVALUATION).exists():
        logger.info("%s: %s, %s, seed %d", encoder, size, name, seed)
        with _fast_products(setting):
            train(features, recipe, out=folder, device=setting.device, baselines=())
    return SAE.load_from_disk(folder, device=setting.device)


def at_l0(sae: SAE[Any], features: Features, l0: float) -> Any:
    """Return the SAE with one threshold for an L0, which training rows decide.

    A TopK SAE has its k of each sample already.

    Raises:
        ValueError: the SAE has too few positive pre-activations for this L0.
    """
    return sae if sae.cfg.architecture() == "topk" else with_l0(sae, features.train, l0)


def near_l0(sae: SAE[Any], features: Features, l0: float) -> Any:
    """Return the SAE with an L0, or as it is if it cannot have that."""
    try:
        return at_l0(sae, features, l0)
    except ValueError:
        return sae


@contextmanager
def _fast_products(setting: Setting) -> Iterator[None]:
    """Let matrix products take TF32 on a GPU, and bfloat16 on a CPU that has units for it.

    Sums stay in float32. It is for training; experiments measure in full precision.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if setting.full else "medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

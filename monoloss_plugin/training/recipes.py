"""How to train an SAE: the papers' settings, and what we recommend instead.

:func:`get_recipe` returns one of four recipes by name. A recipe is a frozen dataclass, so you can
change it with ``dataclasses.replace(recipe, k=32)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from monoloss_plugin._checks import (
    require_at_least,
    require_choice,
    require_flag,
    require_number,
)
from monoloss_plugin.losses import LamUnits, LossTerm, MonoLoss, OffSupportL1, PatchSimilarity
from monoloss_plugin.training.paper import paper_lam

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

Architecture = Literal["batchtopk", "topk", "matryoshka_batchtopk", "jumprelu", "standard", "gated"]

WITH_K = ("batchtopk", "topk", "matryoshka_batchtopk", "jumprelu")
"""The architectures with a number of active latents to aim at."""

_STEPS = 1500
"""A run has at least so many steps by default."""
_RECOMMENDED_LAM = 0.8
"""In the units "nmse"; docs/recipe.md and docs/patches.md show what others give."""
_HARD_BUDGET_LAM = 2e-3
"""In the units "nmse". The paper's weights are not known."""


@dataclass(frozen=True)
class Recipe:
    """How to train an SAE. What is None is chosen for the features: see :meth:`fitted_to`.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of its range, more ``k`` than latents, or a ``k`` for an
            architecture without one.
    """

    architecture: Architecture = "batchtopk"
    """SAELens's name of the architecture."""
    num_latents: int | None = None
    """M."""
    k: int | None = None
    """Active latents per sample: of each sample for "topk", on average for the others."""
    terms: tuple[LossTerm, ...] = ()
    """The loss terms to add to SAELens's own loss."""
    start: float = 0.0
    """The share of the run before the terms."""
    warm_up: float = 0.05
    """The share of the run over which the terms' weights grow from 0."""
    from_data: bool = False
    """Start the latents as training samples (:func:`monoloss_plugin.init_from_data`)."""
    refit: bool = False
    """Refit the decoder after training (:func:`monoloss_plugin.refit_decoder`)."""
    epochs: float | None = None
    """Passes over the training features; a part of one is possible."""
    batch_size: int | None = None
    """B."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    learning_rate_decay: float = 0.2
    """The last share of the run, over which the learning rate falls to 0."""
    adam_epsilon: float = 1e-8
    """Adam's ε."""
    unit_norm_decoder: bool = False
    """Keep the decoder's rows at unit norm (:func:`.unit_norm_decoder`)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the SAELens config of this architecture."""
    seed: int = 0
    """Of the weights, the samples and the order of batches."""

    def __post_init__(self) -> None:
        require_choice(self.architecture, "architecture", get_args(Architecture))
        for name in ("num_latents", "k", "batch_size"):
            if (number := getattr(self, name)) is not None:
                require_at_least(1, number, name)
        if self.epochs is not None:
            require_number(self.epochs, "epochs")
            if not 0 < self.epochs < float("inf"):
                raise ValueError(f"epochs: expected a finite number above 0, got {self.epochs}")
        require_at_least(0, self.seed, "seed")
        for name in ("from_data", "refit", "unit_norm_decoder"):
            require_flag(getattr(self, name), name)
        for name in ("start", "warm_up", "learning_rate_decay", "learning_rate", "adam_epsilon"):
            require_number(getattr(self, name), name)
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if not all(isinstance(term, LossTerm) for term in self.terms):
            raise TypeError(f"terms: expected loss terms, got {self.terms!r}")
        if self.k is not None and self.architecture not in WITH_K:
            raise ValueError(
                f"k: {self.architecture} has no k; give settings={{'l1_coefficient': ...}}"
            )
        if self.k is not None and self.num_latents is not None and self.k > self.num_latents:
            raise ValueError(
                f"k: expected at most the number of latents, {self.num_latents}, got {self.k}"
            )

    def with_lam(self, lam: float) -> Recipe:
        """Return the recipe with another weight of its loss terms.

        Raises:
            ValueError: it has no loss term.
        """
        if not self.terms:
            raise ValueError("lam: this recipe has no loss term")
        return replace(self, terms=tuple(replace(term, lam=lam) for term in self.terms))

    def comparing(self, patches: PatchSimilarity) -> Recipe:
        """Return the recipe with its MonoLoss comparing patches in another way.

        Raises:
            ValueError: it has no MonoLoss, or this is not one of MonoLoss's ways.
        """
        if not any(isinstance(term, MonoLoss) for term in self.terms):
            raise ValueError("patches: this recipe has no MonoLoss, which would compare patches")
        terms = (
            replace(term, patches=patches) if isinstance(term, MonoLoss) else term
            for term in self.terms
        )
        return replace(self, terms=tuple(terms))

    def fitted_to(self, num_rows: int, width: int, num_images: int | None = None) -> Recipe:
        """Return the recipe with a number in place of each None.

        ========== ====================================================================
        latents    a power of two: at most 8,192, 16 times the width, a quarter of the rows
        k          a 32nd of the latents, but at least 8 and at most 64
        batch_size a power of two: a 16th of the rows, but at least 256 and at most 2,048
        epochs     50 as in the MonoLoss paper, or more, for 1,500 steps; for P patches of
                   each image 50 / P, or more, for 1,500 steps
        ========== ====================================================================

        Args:
            num_rows: N, the number of training rows.
            width: d.
            num_images: of how many images the rows are, if they are patches.

        Raises:
            ValueError: ``batch_size`` is above the number of rows.
        """
        if (self.batch_size or 0) > num_rows:
            raise ValueError(
                f"batch_size: expected at most {num_rows}, the rows of the features, got "
                f"{self.batch_size}"
            )
        num_latents = self.num_latents or _power_of_two(min(8192, 16 * width, num_rows // 4))
        batch_size = self.batch_size or min(
            num_rows, _power_of_two(min(2048, max(256, num_rows // 16)))
        )
        k = self.k
        if k is None and self.architecture in WITH_K:
            k = min(num_latents, min(64, max(8, num_latents // 32)))
        steps_of_epoch = max(1, num_rows // batch_size)
        epochs: float = max(50, -(-_STEPS // steps_of_epoch))
        if num_images is not None and num_images < num_rows:
            epochs = round(max(50 * num_images / num_rows, _STEPS / steps_of_epoch), 3)
        epochs = self.epochs or epochs
        return replace(self, num_latents=num_latents, k=k, batch_size=batch_size, epochs=epochs)


def _power_of_two(most: float) -> int:
    """Return the largest power of two that is at most this, and at least 1."""
    return 1 << max(0, int(most).bit_length() - 1)


def get_recipe(
    name: str,
    features: FeatureSet,
    *,
    architecture: Architecture | None = None,
    lam: float | None = None,
    patches: PatchSimilarity | None = None,
    **changes: Any,
) -> Recipe:
    """Return one of :data:`RECIPES` for some features.

    Args:
        name: "recommended", "plain", "monoloss-paper" or "hard-budget".
        features: what to train on. "monoloss-paper" reads the encoder and the width.
        architecture: by default "batchtopk", and "topk" for "hard-budget".
        lam: another weight of the loss term, in the term's own units.
        patches: what MonoLoss compares patches by, if the features are those of patches: "image"
            (the default), "own" or "active" (see :class:`~monoloss_plugin.MonoLoss`).
        changes: other fields of :class:`Recipe`, such as ``k=32``.

    Raises:
        TypeError: a field that :class:`Recipe` does not have.
        ValueError: an unknown name, an architecture that the recipe does not have, ``lam`` for
            "plain", or ``patches`` for features of whole images.
    """
    require_choice(name, "recipe", tuple(RECIPES))
    recipe = RECIPES[name](features, architecture)
    if lam is not None:
        recipe = recipe.with_lam(lam)
    if patches is not None:
        if features.patches is None:
            raise ValueError("patches: these are features of whole images")
        recipe = recipe.comparing(patches)
    unknown = set(changes) - {one.name for one in fields(Recipe)}
    if unknown:
        raise TypeError(f"recipe: no such field: {', '.join(sorted(unknown))}")
    return replace(recipe, **{key: value for key, value in changes.items() if value is not None})


def _plain(features: FeatureSet, architecture: Architecture | None) -> Recipe:
    return Recipe(architecture or "batchtopk")


def _recommended(features: FeatureSet, architecture: Architecture | None) -> Recipe:
    term = MonoLoss(lam=_RECOMMENDED_LAM, lam_units="nmse")
    return Recipe(architecture or "batchtopk", terms=(term,), from_data=True, refit=True)


def _hard_budget(features: FeatureSet, architecture: Architecture | None) -> Recipe:
    return Recipe(architecture or "topk", terms=(OffSupportL1(lam=_HARD_BUDGET_LAM),))


def _monoloss_paper(features: FeatureSet, architecture: Architecture | None) -> Recipe:
    architecture = architecture or "batchtopk"
    lam = paper_lam(features, architecture).lam
    units: LamUnits = "nmse" if architecture == "topk" else "mse"
    settings: dict[str, Any] = {"decoder_init_norm": 1.0}
    if architecture == "jumprelu":
        settings |= {"jumprelu_sparsity_loss_mode": "step", "jumprelu_bandwidth": 1e-3}
        settings |= {"l0_coefficient": 1e-3 * features.width}
    if architecture == "standard":
        settings |= {"l1_coefficient": 1e-4 * features.width}
    return Recipe(
        architecture,
        num_latents=8192,
        k=64 if architecture in WITH_K else None,
        terms=(MonoLoss(lam=lam, lam_units=units),),
        warm_up=0.0,
        epochs=50,
        batch_size=2048,
        learning_rate=1e-4,
        learning_rate_decay=0.0,
        adam_epsilon=6.25e-10,
        unit_norm_decoder=True,
        settings=settings,
        seed=42,
    )


RECIPES: Mapping[str, Callable[[FeatureSet, Architecture | None], Recipe]] = MappingProxyType(
    {
        "recommended": _recommended,
        "plain": _plain,
        "monoloss-paper": _monoloss_paper,
        "hard-budget": _hard_budget,
    }
)
"""Every recipe by its name: a function of the features and the architecture, None for its own."""

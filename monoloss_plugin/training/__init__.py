"""Train SAEs on feature sets with SAELens's trainer and a recipe.

Needs the extras ``sae-lens``, ``vision`` and ``referee``.
"""

from __future__ import annotations

from monoloss_plugin.training.paper import PAPER_LAMS, PaperLam, paper_lam
from monoloss_plugin.training.recipes import RECIPES, Recipe, get_recipe
from monoloss_plugin.training.run import Trained, train
from monoloss_plugin.training.sweep import Run, Sweep, sweep
from monoloss_plugin.training.trainer import batches_for, make_trainer, unit_norm_decoder

__all__ = [
    "PAPER_LAMS",
    "RECIPES",
    "PaperLam",
    "Recipe",
    "Run",
    "Sweep",
    "Trained",
    "batches_for",
    "get_recipe",
    "make_trainer",
    "paper_lam",
    "sweep",
    "train",
    "unit_norm_decoder",
]

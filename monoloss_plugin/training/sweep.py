"""``sweep``: short runs over the weight of the loss, to choose it by measurement."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monoloss_plugin._checks import as_list, device_or_gpu, require_number
from monoloss_plugin._places import as_path
from monoloss_plugin.comparison import Comparison, compare
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.figures import plot_trade_off
from monoloss_plugin.saes.baselines import QUICK
from monoloss_plugin.saes.selection import with_l0
from monoloss_plugin.training.recipes import WITH_K, Recipe
from monoloss_plugin.training.run import require_sets, split
from monoloss_plugin.training.trainer import as_others_load_it, batches_for, make_trainer

from tqdm.auto import tqdm  # isort: skip  # after the module whose error names the extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

_MULTIPLES = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""The weights to try, as multiples of the recipe's."""
_SHARE_OF_TRAINING = 0.8
"""The share of the time that goes into training; the rest is for baselines and measures."""
_TIMED = 5
_FEWEST_STEPS = 100


@dataclass(frozen=True)
class Run:
    """One of the runs of a sweep."""

    name: str
    lam: float
    k: int | None


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found."""

    comparison: Comparison
    """Every run and the baselines, each at its k, on held-out features."""
    runs: list[Run]
    """Every run, by its name in the comparison."""
    steps: int
    """Length of a run, in optimizer steps."""
    cost: float
    """The share of R² that a weight may cost."""

    def suggested(self, k: int | None = None) -> float:
        """Return the largest weight that costs at most the allowed share of R².

        Compared with the run of the smallest weight, at the same k; by default at the first k.
        """
        of_k = [run for run in self.runs if run.k == (self.runs[0].k if k is None else k)]
        r2 = {run.lam: self.comparison.runs[run.name][0]["r2"] for run in of_k}
        lowest = min(r2)
        least = r2[lowest] - self.cost * abs(r2[lowest])
        return max((lam for lam, value in r2.items() if value >= least), default=lowest)

    def front(self) -> list[str]:
        """Return the names on the Pareto front of R² and adjusted MonoScore, best R² first.

        A run or baseline is on the front if no other has both more R² and a higher MonoScore.
        Those that reconstruct no better than the mean (R² of 0) are left out: their scores are
        means over the few latents that are left.
        """
        points = {
            name: (of[0]["r2"], of[0]["monoscore_adjusted"])
            for name, of in self.comparison.runs.items()
            if of[0]["r2"] > 0
        }
        best, names = -math.inf, []
        for name, (_, score) in sorted(points.items(), key=lambda one: one[1], reverse=True):
            if score > best:
                best = score
                names.append(name)
        return names

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Plot R² against adjusted MonoScore, with the baselines; by default in a new figure."""
        title = f"{self.steps} steps, held-out features"
        return plot_trade_off(self.comparison, title=title, ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON can hold it."""
        return {
            **self.comparison.to_dict(),
            "sweep": [vars(run) for run in self.runs],
            "steps": self.steps,
            "cost": self.cost,
            "suggested": {str(k): self.suggested(k) for k in {run.k: None for run in self.runs}},
            "front": self.front(),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as JSON."""
        place = as_path(path, "path", "a file")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return place


def sweep(
    features: FeatureSet,
    recipe: Recipe,
    *,
    lams: Sequence[float] | None = None,
    ks: Sequence[int] | None = None,
    seconds: float = 600.0,
    cost: float = 0.01,
    held_out: FeatureSet | None = None,
    device: torch.device | str | None = None,
    baselines: Sequence[str] = QUICK,
) -> Sweep:
    """Train short runs that differ in the weight of the loss, and compare them.

    Every run has the same seed, the same number of steps and, if it has a k, one threshold for
    an L0 of k. A weight that suits a short run also suits a longer one, or is a little low: longer
    training makes a weight cheaper.

    Args:
        features: training features.
        recipe: what to train; it has at least one loss term.
        lams: weights to try, in the term's own units. By default 0, and 1/8, 1/4, 1/2, 1 and 2
            times the recipe's.
        ks: numbers of active latents to try them at; by default the recipe's.
        seconds: about how long the whole may take. It decides how many steps a run has: at least
            100, and at most what the recipe says.
        cost: the share of R² that the suggested weight may cost.
        held_out: features to measure on; by default a random tenth of ``features``.
        device: where to train; by default a GPU if there is one.
        baselines: SAEs that have learnt nothing, to compare with.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no weights, a weight or a k twice, a recipe without a loss term, ``ks`` for an
            architecture without k, or numbers out of range.
    """
    require_sets(features, held_out, recipe)
    for name, number in (("seconds", seconds), ("cost", cost)):
        require_number(number, name)
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {number}")
    if held_out is None:
        features, held_out = split(features, recipe.seed)
    recipe = recipe.fitted_to(len(features), features.width, features.num_images)
    if not recipe.terms:
        raise ValueError("recipe: expected one with a loss term, whose weight is to be chosen")
    weights = (
        [recipe.terms[0].lam * m for m in _MULTIPLES] if lams is None else as_list(lams, "lams")
    )
    if not weights or len({f"{lam:.3g}" for lam in weights}) < len(weights):
        raise ValueError(f"lams: expected weights that differ in three digits, got {weights}")
    budgets: Sequence[int | None] = [recipe.k]
    if ks is not None:
        if recipe.architecture not in WITH_K:
            raise ValueError(f"ks: {recipe.architecture} has no k")
        budgets = as_list(ks, "ks")
        if not budgets or len(set(budgets)) < len(budgets):
            raise ValueError(f"ks: expected different numbers, got {budgets}")
    runs = [
        Run(f"lam {lam:.3g}" + (f", k {k}" if len(budgets) > 1 else ""), lam, k)
        for k in budgets
        for lam in sorted(weights)
    ]
    # All of them before the first run: a bad number is found at once.
    each = [replace(recipe.with_lam(run.lam), k=run.k) for run in runs]
    batches = batches_for(features, recipe, device_or_gpu(device))
    steps = _steps_that_fit(batches, recipe, _SHARE_OF_TRAINING * seconds / len(runs))
    saes = {}
    for run, one in zip(tqdm(runs, desc="Sweep", unit="run"), each, strict=True):
        batches.set_epoch(0)
        short = replace(one, epochs=steps / len(batches))
        sae = as_others_load_it(make_trainer(batches, short).fit())
        saes[run.name] = sae if run.k is None else _at_k(sae, features, run)
    comparison = compare(saes, held_out, train=features, baselines=baselines, groups=())
    return Sweep(comparison, runs, steps, cost)


def _at_k(sae: Any, features: FeatureSet, run: Run) -> Any:
    """Return the SAE with an L0 of k, or as it is if it has collapsed too far for that."""
    assert run.k is not None
    try:
        return with_l0(sae, features, run.k)
    except ValueError as error:
        logger.warning("%s: measured at its own L0, not at k %d: %s", run.name, run.k, error)
        return sae


def _steps_that_fit(batches: FeatureBatches, recipe: Recipe, seconds: float) -> int:
    """Return how many steps of a recipe take so many seconds, measured on its first ones."""
    trainer = make_trainer(batches, recipe)
    started = 0.0
    for number in range(2 * _TIMED):
        if number == _TIMED:  # the first steps also set things up
            started = time.perf_counter()
        loss = trainer.step(next(trainer.data_provider)).loss
    loss.item()  # waits for the device
    per_step = (time.perf_counter() - started) / _TIMED
    fitting = int(seconds / per_step)
    if fitting < _FEWEST_STEPS:
        logger.warning(
            "A step takes %.2g s, so runs of %d steps will take longer than you allowed",
            per_step,
            _FEWEST_STEPS,
        )
    assert recipe.epochs is not None  # it is fitted
    return min(round(recipe.epochs * len(batches)), max(_FEWEST_STEPS, fitting))

"""Train SAEs without and with the loss terms, compare them on held-out images, and draw them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoloss_plugin._places import require_folder, without
from monoloss_plugin.comparison import Comparison, compare
from monoloss_plugin.demo.architectures import ARCHITECTURES, NUM_LATENTS
from monoloss_plugin.demo.digits import DigitFeatures, digit_features
from monoloss_plugin.demo.pictures import (
    BAND,
    draw_pairs,
    pairs_of_the_same_latent,
    pairs_of_the_same_rank,
)
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.figures import plot_curves, plot_trade_off, save_figure
from monoloss_plugin.gallery.pictures import open_pictures
from monoloss_plugin.gallery.samples import ActivatingSamples, KeepingScore
from monoloss_plugin.losses import LossTerm
from monoloss_plugin.report import write_report
from monoloss_plugin.saes.baselines import QUICK
from monoloss_plugin.training import Recipe, batches_for, make_trainer

# After the modules above, whose import errors name the extra to install.
from sae_lens import SAE  # isort: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STEPS = 1500
_BATCH = 256
_LEARNING_RATE = 1e-3

RUNS = ("without", "with")


@dataclass(frozen=True)
class DemoResult:
    """What a demo measured on held-out images."""

    architecture: str
    terms: list[dict[str, object]]
    seeds: list[int]
    encoder_accuracy: float
    comparison: Comparison
    """Of "without", "with" and the baselines."""
    seconds: dict[str, list[float]]
    """How long training took, for "without" and "with", with each seed."""

    def to_dict(self) -> dict[str, object]:
        """Return all numbers, as JSON can hold them."""
        fields = {name: value for name, value in vars(self).items() if name != "comparison"}
        return {**fields, **self.comparison.to_dict()}


def run_demo(
    architecture: str, terms: Sequence[LossTerm], seeds: Sequence[int], out: Path
) -> tuple[DemoResult, dict[str, Path]]:
    """Run the demo and write its SAEs, figures, page of latents and results to a folder.

    Args:
        architecture: a key of :data:`~monoloss_plugin.demo.architectures.ARCHITECTURES`.
        terms: the loss terms of the "with" runs.
        seeds: train one pair of SAEs for each.
        out: the folder; it is made if it does not exist.

    Returns:
        What was measured, and the files of the figures, the page and the results, by name.
    """
    if out.exists():
        require_folder(out, "out")
    out.mkdir(parents=True, exist_ok=True)
    data = digit_features(out)
    trained: dict[str, list[SAE[Any]]] = {run: [] for run in RUNS}
    seconds: dict[str, list[float]] = {run: [] for run in RUNS}
    for seed in seeds:
        without(sae_folder(out, seed, RUNS[0]).parent)
        for run in RUNS:
            print(f"{architecture}, seed {seed}, {run} {' + '.join(t.name for t in terms)}")
            folder, of_run = sae_folder(out, seed, run), terms if run == "with" else ()
            seconds[run].append(
                train_sae(data.train, architecture, of_run, seed=seed, folder=folder)
            )
            trained[run].append(SAE.load_from_disk(folder))
    shown = {run: trained[run][0] for run in RUNS}
    score = KeepingScore(list(shown.values()), BAND)
    comparison = compare(
        trained,
        data.held_out,
        train=data.train,
        baselines=QUICK,
        groups=(),
        score=score,
        progress=True,
    )
    described = [{"term": type(term).__name__, **asdict(term)} for term in terms]
    result = DemoResult(architecture, described, list(seeds), data.accuracy, comparison, seconds)
    results = without(out / "results.json")
    results.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    samples = (score.samples_of(shown["without"]), score.samples_of(shown["with"]))
    figures = _draw(result, data, samples, out)
    page = write_report(
        shown,
        data.held_out,
        without(out / "report.html"),
        images=data.held_out_images,
        train=data.train,
    )
    return result, {**figures, "results": results, "report": page}


def train_sae(
    features: FeatureSet, architecture: str, terms: Sequence[LossTerm], *, seed: int, folder: Path
) -> float:
    """Train an SAE, save it for inference, and return the seconds that training took.

    The seed decides the weights and the order of batches, the same with and without terms.
    """
    recipe = recipe_of(architecture, terms, seed)
    batches = batches_for(features, recipe)
    recipe = replace(recipe, epochs=_STEPS / len(batches))
    trainer = make_trainer(batches, recipe)
    started = time.perf_counter()
    sae = trainer.fit()
    seconds = time.perf_counter() - started
    sae.save_inference_model(folder)
    return seconds


def recipe_of(architecture: str, terms: Sequence[LossTerm], seed: int) -> Recipe:
    """Return the demo's recipe, as SAELens trains without advice of ours."""
    return Recipe(
        architecture,  # type: ignore[arg-type]  # it is checked there
        num_latents=NUM_LATENTS,
        terms=tuple(terms),
        warm_up=0.0,
        batch_size=_BATCH,
        learning_rate=_LEARNING_RATE,
        learning_rate_decay=0.0,
        settings=ARCHITECTURES[architecture],
        seed=seed,
    )


def sae_folder(out: Path, seed: int, run: str) -> Path:
    """Return where a run's SAE is saved, for ``SAE.load_from_disk``."""
    return out / f"seed-{seed}" / run


def _draw(
    result: DemoResult,
    data: DigitFeatures,
    samples: tuple[ActivatingSamples, ActivatingSamples],
    out: Path,
) -> dict[str, Path]:
    """Write the figures, and return their files."""
    name = " + ".join(str(term["name"]) for term in result.terms)
    evaluations = result.comparison.evaluations
    curves = {f"{run} {name}": [e.monoscore.curve() for e in evaluations[run]] for run in RUNS}
    title = f"{result.architecture} SAE, held-out digits"
    first, second = (one.evaluation.monoscore for one in samples)
    figures: dict[str, Axes | Figure] = {
        "curves": plot_curves(curves, chance=first.chance, title=title),
        "trade-off": plot_trade_off(result.comparison, title=title),
    }
    pictures = open_pictures(data.held_out_images, data.held_out)
    for what, pairs, title in (
        (
            "same rank",
            pairs_of_the_same_rank(first, second),
            "latents of the same rank by MonoScore",
        ),
        ("same latent", pairs_of_the_same_latent(first, second), "the same latent in both SAEs"),
    ):
        if pairs:  # two SAEs may share no latent that has a score
            figures[what] = draw_pairs(pairs, samples, RUNS, pictures, title=f"{name}: {title}")
    return {
        what: save_figure(figure, without(out / f"{what.replace(' ', '_')}.png"))
        for what, figure in figures.items()
    }

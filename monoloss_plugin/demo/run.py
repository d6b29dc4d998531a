"""Train SAEs without and with the loss terms, compare them on held-out images, and draw."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from monoloss_plugin._places import require_folder, without
from monoloss_plugin.demo.digits import digit_features
from monoloss_plugin.demo.pictures import (
    BAND,
    Scored,
    pairs_of_the_same_latent,
    pairs_of_the_same_rank,
)
from monoloss_plugin.demo.saes import NUM_LATENTS, train_sae
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.evaluation import MEASURES as EVALUATED
from monoloss_plugin.evaluation import Evaluation, evaluate
from monoloss_plugin.losses import LossTerm
from monoloss_plugin.report import activating_images_figure, curves_figure

from sae_lens import SAE  # isort: skip  # after the adapter, whose error names the extra

RUNS = ("without", "with")

MEASURES: dict[str, str] = {
    **EVALUATED,
    "dead_latents": f"dead latents of {NUM_LATENTS}",
    "seconds": "training, seconds",
}
"""What the demo reports, and how it calls it."""


@dataclass(frozen=True)
class DemoResult:
    """What a demo measured on held-out images."""

    architecture: str
    terms: list[dict[str, object]]
    seeds: list[int]
    encoder_accuracy: float
    summaries: dict[str, list[dict[str, float]]]
    """For "without" and "with", the measures of each seed."""
    files: dict[str, Path] = field(default_factory=dict)

    def mean_and_spread(self, run: str, measure: str) -> tuple[float, float]:
        """Return the mean over seeds and its standard deviation (0 for one seed)."""
        values = [summary[measure] for summary in self.summaries[run]]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def run_demo(
    architecture: str, terms: Sequence[LossTerm], seeds: Sequence[int], out: Path
) -> DemoResult:
    """Run the demo and write its SAEs, figures and results to a folder.

    Args:
        architecture: a key of :data:`monoloss_plugin.demo.saes.ARCHITECTURES`.
        terms: the loss terms of the "with" runs.
        seeds: one pair of SAEs for each.
        out: a folder, made if it is not there.
    """
    if out.exists():
        require_folder(out, "out")
    out.mkdir(parents=True, exist_ok=True)
    data = digit_features(out)
    evaluations: dict[str, list[Evaluation]] = {run: [] for run in RUNS}
    summaries: dict[str, list[dict[str, float]]] = {run: [] for run in RUNS}
    for seed in seeds:
        without(sae_folder(out, seed, RUNS[0]).parent)
        for run in RUNS:
            print(f"{architecture}, seed {seed}, {run} {' + '.join(t.name for t in terms)}")
            folder = sae_folder(out, seed, run)
            seconds = train_sae(
                data.train,
                architecture,
                terms if run == "with" else (),
                seed=seed,
                folder=folder,
            )
            evaluation = evaluate(SAE.load_from_disk(folder), data.held_out, progress=True)
            evaluations[run].append(evaluation)
            summaries[run].append({**evaluation.summary(), "seconds": seconds})

    result = DemoResult(
        architecture=architecture,
        terms=[{"term": type(term).__name__, **asdict(term)} for term in terms],
        seeds=list(seeds),
        encoder_accuracy=data.accuracy,
        summaries=summaries,
        files={
            "curves": out / "curves.png",
            "same rank": out / "same_rank.png",
            "same latent": out / "same_latent.png",
            "results": out / "results.json",
        },
    )
    features, _ = unit_rows(data.held_out.tensor(), torch.float32)
    _draw(result, data.held_out_images, features, evaluations, out)
    serialisable = {k: v for k, v in asdict(result).items() if k != "files"}
    without(result.files["results"]).write_text(json.dumps(serialisable, indent=2) + "\n")
    return result


def sae_folder(out: Path, seed: int, run: str) -> Path:
    """Where a run's SAE is saved, for ``SAE.load_from_disk``."""
    return out / f"seed-{seed}" / run


def _draw(
    result: DemoResult,
    images: Tensor,
    features: Tensor,
    evaluations: dict[str, list[Evaluation]],
    out: Path,
) -> None:
    """Write the figures; where there is nothing to draw, take the file off the result."""
    name = " + ".join(str(term["name"]) for term in result.terms)
    curves = {f"{run} {name}": [e.monoscore.curve() for e in evaluations[run]] for run in RUNS}
    figure = curves_figure(curves, title=f"{result.architecture} SAE, held-out digits")
    figure.savefig(without(result.files["curves"]), dpi=150)

    scored = []
    for run in RUNS:
        sae = SAE.load_from_disk(sae_folder(out, result.seeds[0], run))
        with torch.no_grad():
            activations = sae.encode(features)
        scored.append(Scored(run, evaluations[run][0].monoscore, activations))
    for file, pairs, title in (
        ("same rank", pairs_of_the_same_rank(*scored), "latents of the same rank by MonoScore"),
        ("same latent", pairs_of_the_same_latent(*scored), "the same latent in both SAEs"),
    ):
        if not pairs:
            result.files.pop(file)
            continue
        figure = activating_images_figure(pairs, images, count=BAND, title=f"{name}: {title}")
        figure.savefig(without(result.files[file]), dpi=150)

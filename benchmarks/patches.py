"""SAEs on patches of photographs: with and without MonoLoss, and do their latents point?

python -m benchmarks.patches mosaics IMAGES:SPLIT ./mosaics --count 1000
python -m benchmarks.patches table ./train ./test --mosaics ./mosaic-features --out runs \\
    --results benchmarks/results/patches.json

The first command lays four photographs of different classes side by side, as a dataset to extract
patches from, with the encoder of the others at twice the image size. The second trains, measures on
held-out photographs at one L0, and prints the table of docs/patches.md. Every SAE is saved in the
folder and not trained twice.

Pointing: a latent has a class, the most frequent one of the held-out photographs that activate it.
On mosaics with one photograph of that class, is its strongest patch there? One in four is by
chance. (The pointing game of Zhang et al. 2016, with photographs for boxes.)
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from PIL.Image import new as new_image
from torch import Tensor

from benchmarks.over_seeds import spread
from benchmarks.recipes import add_options, plain_recipe, trained
from monoloss_plugin import MonoLoss
from monoloss_plugin.cli.evaluate import load_features
from monoloss_plugin.comparison import compare
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet, Source, open_source
from monoloss_plugin.features.images import decode
from monoloss_plugin.reproduce.saes import ShuffledMonoLoss
from monoloss_plugin.results import Evaluation
from monoloss_plugin.saes.baselines import QUICK
from monoloss_plugin.saes.refit import refit_decoder
from monoloss_plugin.saes.rows import Rows
from monoloss_plugin.training import Recipe

LAM, WEAKER = 0.8, 0.2
"""In the units "nmse": the recommended recipe's, and a smaller one."""
MEASURES = {
    "r2": "R²",
    "monoscore_adjusted": "patches, above chance",
    "images_max_adjusted": "images by largest, above chance",
    "images_mean_adjusted": "images by mean, above chance",
    "purity_adjusted": "purity above chance",
    "pointing": "pointing",
    "pointing_latents": "latents tested",
    "coherence": "coherence",
    "extent": "extent",
    "dead_latents": "dead",
}
_DIGITS = {"dead_latents": 0, "pointing_latents": 0}
_FEWEST = 5
"""A latent is tested on at least so many mosaics."""


def recipes(sizes: Recipe) -> dict[str, Recipe]:
    """Return the recipes to compare by name, all of one size and with one optimizer."""

    def losses(lam: float = LAM, **options: Any) -> tuple[MonoLoss, ...]:
        return (MonoLoss(lam=lam, lam_units="nmse", **options),)

    start = replace(sizes, from_data=True, refit=True)
    shuffled = (ShuffledMonoLoss(lam=LAM, lam_units="nmse"),)
    return {
        "plain": sizes,
        "MonoLoss, image": replace(sizes, terms=losses()),
        "MonoLoss, own": replace(sizes, terms=losses(patches="own")),
        "MonoLoss, active": replace(sizes, terms=losses(patches="active")),
        "MonoLoss, own, also within images": replace(
            sizes, terms=losses(patches="own", within_images=True)
        ),
        "shuffled MonoLoss": replace(sizes, terms=shuffled),
        "recommended": replace(start, terms=losses()),
        f"recommended, lam {WEAKER}": replace(start, terms=losses(WEAKER)),
        "recommended without MonoLoss": start,
    }


def mosaics(source: Source, count: int, seed: int = 0) -> Dataset:
    """Return mosaics of two by two photographs of four classes; ids have their row numbers."""
    labels = torch.tensor([source[row].label for row in range(source.num_images or 0)])
    generator = torch.Generator().manual_seed(seed)
    ids: list[str] = []
    pictures = []
    while len(ids) < count:
        rows = torch.randint(len(labels), (4,), generator=generator).tolist()
        if len(set(labels[rows].tolist())) < 4:
            continue
        tiles = [decode(source[row], "RGB") for row in rows]
        width, height = tiles[0].size
        picture = new_image("RGB", (2 * width, 2 * height))
        for place, tile in enumerate(tiles):
            at = (place % 2 * width, place // 2 * height)
            picture.paste(tile.resize((width, height)), at)
        pictures.append(picture)
        ids.append(" ".join(f"{row}:{int(labels[row])}" for row in rows))
    columns = {"image": Image(), "image_id": Value("string")}
    return Dataset.from_dict({"image": pictures, "image_id": ids}, features=Features(columns))


@torch.no_grad()
def pointing(sae: Any, features: FeatureSet, found: Evaluation) -> dict[str, float]:
    """Return how often a latent's strongest patch is in the photograph of its class.

    Args:
        sae: an SAE.
        features: patches of mosaics.
        found: its evaluation on photographs, whose classes are those of the mosaics.

    Returns:
        The mean over latents that are significant on photographs and are tested on five mosaics or
        more; and how many there are.
    """
    patches = features.patches
    assert patches is not None
    assert found.purity is not None
    ids = features.images.ids_of(torch.arange(features.num_images))
    assert ids is not None
    classes = torch.tensor([[int(one.partition(":")[2]) for one in name.split()] for name in ids])
    hits = tests = torch.zeros(found.num_latents)
    rows, dominant = Rows.for_sae(sae, features, None), found.purity.dominant
    for images in torch.arange(features.num_images).split(32):
        numbers = patches.rows_of(images)
        latents = sae.encode(rows.take(numbers))
        latents = latents.to_dense() if latents.layout != torch.strided else latents
        height, width = patches.grids[images[0]].tolist()
        maps = latents.view(len(images), height, width, -1)
        # Of each quarter, the largest activation: (images, 2, 2, latents).
        quarters = _quarters(maps).flatten(1, 2)
        strongest, place = quarters.max(1)
        is_there = classes[images].unsqueeze(2) == dominant  # (images, 4, latents)
        tested = is_there.any(1) & (strongest > 0)
        hit = is_there.gather(1, place.unsqueeze(1)).squeeze(1) & tested
        tests, hits = tests + tested.sum(0), hits + hit.sum(0)
    kept = (tests >= _FEWEST) & found.tested.significant()
    share = hits[kept] / tests[kept]
    return {
        "pointing": float(share.mean()) if len(share) else math.nan,
        "pointing_latents": float(kept.sum()),
    }


def _quarters(maps: Tensor) -> Tensor:
    """Return the largest activation of each quarter: (n, h, w, M) as (n, 2, 2, M)."""
    height, width = maps.shape[1] // 2, maps.shape[2] // 2
    rows = (maps[:, :height].amax(1), maps[:, height:].amax(1))
    return torch.stack(
        [torch.stack((row[:, :width].amax(1), row[:, width:].amax(1)), 1) for row in rows], 1
    )


@dataclass(frozen=True)
class Pointing:
    """Scores SAEs as ``evaluate`` does, and lets them point: ``compare(..., score=)``."""

    mosaics: FeatureSet
    found: list[dict[str, float]] = field(default_factory=list)
    """Of each SAE, in the order in which they were scored."""

    def __call__(self, sae: Any, features: FeatureSet) -> Evaluation:
        evaluation = evaluate(sae, features)
        self.found.append(pointing(sae, self.mosaics, evaluation))
        return evaluation


def markdown(results: dict[str, Any]) -> str:
    """Return results as the table of docs/patches.md: mean ± deviation over seeds."""
    lines = [
        f"| {results['title']} | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for name, runs in results["runs"].items():
        cells = [
            spread([run[measure] for run in runs], _DIGITS.get(measure, 3)) for measure in MEASURES
        ]
        lines.append(f"| {name} ({len(runs)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, and measure everything."""
    train, held_out = load_features(given.train), load_features(given.held_out)
    sizes = plain_recipe(given, train)
    chosen = recipes(sizes)
    saes: dict[str, list[Any]] = {}
    for seed in given.seeds:
        for name in given.runs or chosen:
            recipe = replace(chosen[name], seed=seed)
            place = given.out / given.arch / re.sub(r"\W+", "-", name) / str(seed)
            with_fast_products = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            sae = trained(train, name, recipe, place)
            torch.set_float32_matmul_precision(with_fast_products)
            if recipe.refit and not given.train_only:
                refit_decoder(sae, train)
            saes.setdefault(name, []).append(sae)
    if given.train_only:
        return {}
    score = Pointing(load_features(given.mosaics))
    found = compare(
        saes,
        held_out,
        train=train,
        baselines=QUICK,
        match=None if given.arch == "topk" else "l0",
        groups=(),
        score=score,
        progress=True,
    ).to_dict()
    pointed = iter(score.found)
    for runs in found["runs"].values():
        for run in runs:
            run |= next(pointed)
    shown = {name: getattr(sizes, name) for name in ("num_latents", "k", "batch_size", "epochs")}
    return {
        **found,
        "title": given.arch,
        "recipe": shown,
        "patches": {"train": len(train), "held_out": len(held_out), **train.record.patches},
        "images": {"train": train.num_images, "held_out": held_out.num_images},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.patches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    lay = commands.add_parser("mosaics", help="lay photographs side by side")
    lay.add_argument("source", help="PLACE:SPLIT of labelled photographs of one size")
    lay.add_argument("out", type=Path)
    lay.add_argument("--count", type=int, default=1000)
    of = commands.add_parser("table", help="train and measure")
    add_options(of)
    of.add_argument("--mosaics", required=True, help="patches of mosaics")
    given = parser.parse_args()
    if given.command == "mosaics":
        place, _, split = given.source.rpartition(":")
        mosaics(open_source(place, split=split), given.count).save_to_disk(given.out)
        return
    results = measure(given)
    if given.results and results:
        given.results.write_text(json.dumps(results, indent=1) + "\n")
    if results:
        print(markdown(results))


if __name__ == "__main__":
    main()

"""Recipes against each other and against SAEs that have learnt nothing, at equal L0, over seeds.

python -m benchmarks.recipes digits:train digits:held_out --name digits --out runs
python -m benchmarks.recipes ./train ./test --name photos --space lite2=./lite2 --out runs

Every SAE is saved in the folder and not trained twice, so you can stop and start again, and add
runs. At the end it measures all of them on held-out features, each with one threshold for an L0 of
k, and prints a table of docs/recipe.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens import SAE

from benchmarks.over_seeds import spread
from monoloss_plugin import MonoLoss, refit_decoder
from monoloss_plugin.adapters.sae_lens import add_loss
from monoloss_plugin.cli.evaluate import load_features
from monoloss_plugin.comparison import compare
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.figures import plot_trade_off, save_figure
from monoloss_plugin.saes.baselines import QUICK
from monoloss_plugin.saes.selection import with_l0
from monoloss_plugin.training import Recipe, batches_for, get_recipe, make_trainer

LAMS = (0.1, 0.2, 0.4, 0.8)
MEASURES = {
    "r2": "R²",
    "monoscore_adjusted": "above chance",
    "monoscore_per_firing": "per firing",
    "purity_binary": "purity",
    "dead_latents": "dead",
}


SIZES = ("num_latents", "k", "batch_size", "epochs")
SHUFFLED = "from data, shuffled MonoLoss 0.4"
"""The control: MonoLoss compares each sample by the embedding of another one."""


def recipes(sizes: Recipe) -> dict[str, Recipe]:
    """Return the recipes to compare by name, all of one size and with one optimizer."""

    def losses(lam: float) -> tuple[MonoLoss, ...]:
        return (MonoLoss(lam=lam, lam_units="nmse"),)

    start = replace(sizes, from_data=True)
    return {
        "plain": sizes,
        "from data": start,
        **{f"MonoLoss {lam}": replace(sizes, terms=losses(lam)) for lam in LAMS},
        **{
            f"from data, MonoLoss {lam}": replace(start, terms=losses(lam), refit=True)
            for lam in LAMS
        },
        SHUFFLED: replace(start, terms=losses(0.4), refit=True),
    }


def trained(features: FeatureSet, name: str, recipe: Recipe, folder: Path) -> SAE[Any]:
    """Return the SAE of a recipe, from the folder if it is there already."""
    if not (folder / "cfg.json").exists():
        shuffled = recipe.terms if name == SHUFFLED else ()
        recipe = replace(recipe, terms=()) if shuffled else recipe
        trainer = make_trainer(batches_for(features, recipe), recipe)
        for term in shuffled:
            add_loss(trainer, term, embeddings=lambda x: x.roll(1, 0))
        trainer.fit().save_inference_model(folder)
    return SAE.load_from_disk(folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every comparison of recipes asks for."""
    parser.add_argument("train", help="training features")
    parser.add_argument("held_out", help="held-out features")
    parser.add_argument("--arch", default="batchtopk")
    parser.add_argument("--runs", nargs="+", help="names of recipes; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for size in ("latents", "k", "batch-size"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--out", type=Path, required=True, help="folder for the SAEs")
    parser.add_argument("--results", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--train-only", action="store_true", help="do not measure")


def plain_recipe(given: argparse.Namespace, train: FeatureSet) -> Recipe:
    """Return the plain recipe of the sizes that were given."""
    return get_recipe(
        "plain",
        train,
        architecture=given.arch,
        num_latents=given.latents,
        k=given.k,
        batch_size=given.batch_size,
        epochs=given.epochs,
    ).fitted_to(len(train), train.width, train.num_images)


def refitted(sae: SAE[Any], train: FeatureSet, held_out: FeatureSet) -> SAE[Any]:
    """Return the SAE with its decoder refitted."""
    refit_decoder(sae, train, held_out=held_out)
    return sae


def markdown(results: dict[str, Any]) -> str:
    """Return results as the table of docs/recipe.md: mean ± deviation over seeds."""
    columns = MEASURES | {f"adjusted/{name}": f"by {name}" for name in results["spaces"]}
    lines = [
        f"| {results['title']} | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, runs in results["runs"].items():
        cells = [
            spread([run[measure] for run in runs], 0 if measure == "dead_latents" else 3)
            for measure in columns
        ]
        lines.append(f"| {name} ({len(runs)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--space", action="append", default=[], metavar="NAME=FEATURES")
    parser.add_argument("--name", required=True, help="of the features")
    parser.add_argument("--figure", type=Path, help="file for R² against MonoScore")
    given = parser.parse_args()

    train, held_out = load_features(given.train), load_features(given.held_out)
    sizes = plain_recipe(given, train)
    assert sizes.k is not None
    chosen = recipes(sizes)
    folder = given.out / given.name / given.arch
    saes: dict[str, list[Any]] = {}
    for seed in given.seeds:
        for name in given.runs or chosen:
            recipe = replace(chosen[name], seed=seed)
            place = folder / name.replace(" ", "-") / f"seed-{seed}"
            sae = trained(train, name, recipe, place)
            if not given.train_only:
                sae = refitted(sae, train, held_out) if recipe.refit else sae
                # TopK has k active latents of each sample already.
                matched = sae if given.arch == "topk" else with_l0(sae, held_out, sizes.k)
                saes.setdefault(name, []).append(matched)
    if given.train_only:
        return
    spaces = {
        name: load_features(place) for name, _, place in (s.partition("=") for s in given.space)
    }
    found = compare(
        saes,
        held_out,
        train=train,
        spaces=spaces,
        baselines=QUICK,
        groups=("spaces",),
        progress=True,
    )
    results = {
        **found.to_dict(),
        "title": f"{given.name}, {given.arch}",
        "spaces": list(spaces),
        "recipe": {
            name: getattr(sizes, name) for name in ("num_latents", "k", "batch_size", "epochs")
        },
    }
    if given.results:
        given.results.write_text(json.dumps(results, indent=1) + "\n")
    if given.figure:
        save_figure(plot_trade_off(found, title=results["title"]), given.figure, dpi=110)
    print(markdown(results))


if __name__ == "__main__":
    main()

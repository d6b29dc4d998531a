"""``monoloss train`` and ``monoloss sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from monoloss_plugin._places import require_folder
from monoloss_plugin.cli.evaluate import load_features
from monoloss_plugin.cli.output import Output, one_of, table

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet
    from monoloss_plugin.training import Recipe

# Written out, because importing them would make --help slow. A test keeps them right.
_NAMES = ("recommended", "plain", "monoloss-paper", "hard-budget")
_ARCHITECTURES = ("batchtopk", "topk", "matryoshka_batchtopk", "jumprelu", "standard", "gated")

_Features = Annotated[
    str,
    typer.Argument(
        help="Training features: a folder such as ./features, or REPOSITORY:SPLIT on the Hub."
    ),
]


def recipe_options(
    recipe: Annotated[
        str, typer.Option(help=f"One of {', '.join(_NAMES)}.", callback=one_of(*_NAMES))
    ] = "recommended",
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            help=f"One of {', '.join(_ARCHITECTURES)}; by default the recipe's.",
            callback=one_of(*_ARCHITECTURES),
        ),
    ] = None,
    latents: Annotated[int | None, typer.Option(min=1, help="Number of latents.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the features, such as 50 or 0.5.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a batch.")] = None,
    patches: Annotated[
        str | None,
        typer.Option(
            help="What MonoLoss compares patches by: image (the default: the embedding of their "
            "image), own (their own features) or active (the mean of the active patches).",
            callback=one_of("image", "own", "active"),
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights and batches.")] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Features to measure on; by default a random tenth of the others."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1; by default a GPU if there is one.")
    ] = None,
) -> None:
    """Show typer the options of both commands."""


def train(
    features: _Features,
    out: Annotated[Path, typer.Option(help="Folder for the SAE and its measures.")],
    k: Annotated[
        int | None,
        typer.Option(min=1, help="Active latents per sample; standard and gated have no k."),
    ] = None,
    lam: Annotated[
        float | None, typer.Option(min=0, help="Weight of the loss; by default the recipe's.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Log to this wandb project.")
    ] = None,
    **options: Any,
) -> Output:
    """Train an SAE on features, save it and measure it against baselines.

    If you stop it with Ctrl-C, start it again with the same options, and it goes on.
    """
    from monoloss_plugin.training import train as train_recipe
    from monoloss_plugin.training.run import require_free

    require_free(out)
    held_out, device = options.pop("held_out"), options.pop("device")
    opened = load_features(features)
    recipe = _recipe(opened, k=k, lam=lam, **options)
    trained = train_recipe(
        opened,
        recipe,
        out=out,
        held_out=None if held_out is None else load_features(held_out),
        device=device,
        logger=None if wandb is None else _wandb(wandb, recipe, out),
    )
    found = trained.comparison
    text: list[str | Table] = [
        _described(trained.recipe),
        table("on held-out samples", *found.runs, rows=found.cells()),
        *found.notes,
        f"for SAE.load_from_disk and monoloss evaluate: {trained.folder}",
    ]
    return Output({**found.to_dict(), "folder": trained.folder}, text)


def sweep(
    features: _Features,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the numbers (JSON) and the figure.")
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", min=1, help="Active latents. You may repeat the option."),
    ] = None,
    lam: Annotated[
        list[float] | None,
        typer.Option(
            "--lam", min=0, help="A weight to try. You may repeat the option; by default six."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="About how long it may take.")] = 10.0,
    cost: Annotated[
        float, typer.Option(help="The share of R² that the suggested weight may cost.")
    ] = 0.01,
    **options: Any,
) -> Output:
    """Choose the weight of the loss by short runs.

    Prints R² and MonoScore above chance of each run and of baselines, which of them are on the
    Pareto front, and the largest weight that costs little R².
    """
    from monoloss_plugin.figures import save_figure
    from monoloss_plugin.training import sweep as sweep_recipe

    held_out, device = options.pop("held_out"), options.pop("device")
    if out is not None:
        if out.exists():
            require_folder(out, "out")
        out.mkdir(parents=True, exist_ok=True)  # so that a bad place is found before the runs
    opened = load_features(features)
    found = sweep_recipe(
        opened,
        _recipe(opened, **options),
        lams=lam or None,
        ks=k or None,
        seconds=60 * minutes,
        cost=cost,
        held_out=None if held_out is None else load_features(held_out),
        device=device,
    )
    files = {}
    if out is not None:
        files["numbers"] = found.save(out / "sweep.json")
        files["figure"] = save_figure(found.plot(), out / "sweep.png")
    comparison, front = found.comparison, found.front()
    names = {name: f"{name} *" if name in front else name for name in comparison.runs}
    text: list[str | Table] = [
        table(f"after {found.steps} steps", *names.values(), rows=comparison.cells()),
        "* on the Pareto front of R² and MonoScore above chance",
        *comparison.notes,
    ]
    for budget in dict.fromkeys(run.k for run in found.runs):
        at = "" if not k else f" at k {budget}"
        text.append(
            f"largest weight{at} that costs at most {cost:.2g} of R²: {found.suggested(budget):.3g}"
        )
    text += [f"{what}: {path}" for what, path in files.items()]
    return Output({**found.to_dict(), "files": files}, text)


def _recipe(opened: FeatureSet, **options: Any) -> Recipe:
    from monoloss_plugin.training import get_recipe

    return get_recipe(
        options["recipe"],
        opened,
        architecture=options["arch"],
        lam=options.get("lam"),
        patches=options["patches"],
        num_latents=options["latents"],
        k=options.get("k"),
        epochs=options["epochs"],
        batch_size=options["batch_size"],
        seed=options["seed"],
    )


def _described(recipe: Recipe) -> str:
    terms = ", ".join(f"{term.name} {term.lam:.3g} ({term.lam_units})" for term in recipe.terms)
    k = "" if recipe.k is None else f", k {recipe.k}"
    return (
        f"{recipe.architecture}, {recipe.num_latents} latents{k}, {recipe.epochs:g} epochs of "
        f"batches of {recipe.batch_size}, seed {recipe.seed}; losses: {terms or 'none'}"
    )


def _wandb(project: str, recipe: Recipe, out: Path) -> Any:
    import wandb
    from sae_lens.config import LoggingConfig

    wandb.init(project=project, name=out.name, config={"recipe": _described(recipe)})
    return LoggingConfig(wandb_project=project, log_weights_to_wandb=False)

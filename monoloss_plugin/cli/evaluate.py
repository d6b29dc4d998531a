"""``monoloss evaluate``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from monoloss_plugin._places import local_path, require_folder, without
from monoloss_plugin.cli.output import Output, table

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

SAEPlace = Annotated[
    str,
    typer.Argument(
        help="A SAELens SAE: a folder such as ./sae, or REPOSITORY:SAE_ID on the Hub, or digits or "
        "photos (bundled)."
    ),
]
HeldOut = Annotated[
    str,
    typer.Option(
        help="Held-out features: a folder such as ./features, or REPOSITORY:SPLIT on the Hub."
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option("--against", help="Another SAE to compare with. You may repeat the option."),
]


def evaluate(
    sae: SAEPlace,
    features: HeldOut,
    against: Against = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="Training features, for baselines and probes; by default half of --features."
        ),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space",
            help="Features of the same images from another encoder, as NAME=FOLDER, to score "
            "MonoScore in. You may repeat the option.",
        ),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Compare with SAEs that have learnt nothing.")
    ] = False,
    match_l0: Annotated[
        bool, typer.Option("--match-l0", help="Give every SAE the L0 of the first.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Leave out probes, other k, twins and other spaces."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the numbers (JSON), every latent (safetensors) and figures."),
    ] = None,
) -> Output:
    """Measure SAEs on held-out features, side by side.

    Prints R², MonoScore with its chance level, class purity, L0 and dead latents; and unless you
    say --quick, robustness to k, linear probes, redundancy, and stability over seeds. If the
    features are of patches, it also prints the scores of whole images, coherence and extent.
    """
    spaces = [name.partition("=")[::2] for name in space or []]
    if bad := [name for name, place in spaces if not name or not place]:
        raise typer.BadParameter(f"expected NAME=FOLDER, got {bad[0]!r}", param_hint="--space")
    from monoloss_plugin.comparison import GROUPS, compare

    if out is not None and out.exists():
        require_folder(out, "out")
    found = compare(
        load_saes(sae, against),
        load_features(features),
        train=None if train is None else load_features(train),
        spaces={name: load_features(place) for name, place in spaces},
        baselines=baselines,
        match="l0" if match_l0 else None,
        groups=() if quick else GROUPS,
        progress=True,
    )
    header = ["on held-out samples", *found.runs]
    written = {} if out is None else _write(found, out)
    said = [f"{what}: {path}" for what, path in written.items()]
    text: list[str | Table] = [table(*header, rows=found.cells()), *found.notes, *said]
    return Output({**found.to_dict(), "files": written}, text)


def load_saes(sae: str, against: list[str] | None) -> dict[str, Any]:
    """Return the SAEs of a command line by the names that were given."""
    places = [sae, *(against or [])]
    if len(set(places)) < len(places):
        raise typer.BadParameter("an SAE is named twice", param_hint="--against")
    return {place: _load_sae(place) for place in places}


def _load_sae(place: str) -> Any:
    from monoloss_plugin.hub import load_pretrained
    from monoloss_plugin.hub.saes import load_folder

    folder = local_path(place)
    if folder is None:
        repository, _, sae_id = place.partition(":")
        return load_pretrained(repository, sae_id or None).sae
    require_folder(folder, "sae")
    return load_folder(folder, place)


def load_features(place: str) -> FeatureSet:
    """Return the features of a folder, or of a REPOSITORY:SPLIT on the Hub."""
    from monoloss_plugin.features import FeatureSet
    from monoloss_plugin.hub import load_features as load_from_hub

    path = local_path(place)
    if path is not None:
        return FeatureSet.open(path)
    repository, _, split = place.partition(":")
    return load_from_hub(repository, split or None)


def _write(found: Any, out: Path) -> dict[str, Path]:
    """Write everything that was found, and return the files by what they hold."""
    from monoloss_plugin.figures import (
        plot_curves,
        plot_density,
        plot_scores,
        plot_support,
        plot_trade_off,
        save_figure,
    )

    first = {name: of[0] for name, of in found.evaluations.items()}
    files = {"numbers": found.save(out / "comparison.json")}
    for name, evaluation in first.items():
        folder = out / "latents" / re.sub(r"[^\w.=+-]+", "-", name).strip("-.")
        files[f"latents of {name}"] = evaluation.save(folder)
    curves = {name: of.monoscore.curve() for name, of in first.items()}
    chance = next(iter(first.values())).monoscore.chance
    for name, axes in (
        ("curves", plot_curves(curves, chance=chance)),
        ("trade-off", plot_trade_off(found)),
        ("scores", plot_scores(first)),
        ("support", plot_support(first)),
        ("density", plot_density(first)),
    ):
        files[name] = save_figure(axes, without(out / f"{name}.png"))
    return files

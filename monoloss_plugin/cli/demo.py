"""``monoloss demo``."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.table import Table

from monoloss_plugin.cli.output import Output, one_of, table
from monoloss_plugin.demo.architectures import ARCHITECTURES
from monoloss_plugin.losses import L1L2Ratio, LossTerm, MonoLoss, OffSupportL1

REGULARIZERS: dict[str, type[OffSupportL1 | L1L2Ratio]] = {
    "off_support_l1": OffSupportL1,
    "l1_l2_ratio": L1L2Ratio,
}


def demo(
    arch: Annotated[
        str,
        typer.Option(
            help=f"SAE architecture: {', '.join(ARCHITECTURES)}.", callback=one_of(*ARCHITECTURES)
        ),
    ] = "batchtopk",
    lam: Annotated[
        float, typer.Option(help="Weight of MonoLoss, with lam_units 'mse'; 0 leaves MonoLoss out.")
    ] = 3e-3,
    regularizer: Annotated[
        list[str] | None,
        typer.Option(
            help="Top-k regularizer to add, as NAME or NAME=LAM (LAM is 0.002 by default): "
            f"{', '.join(REGULARIZERS)}. You may repeat the option."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many pairs of SAEs to train.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for SAEs, figures and results.")] = Path(
        "monoloss-demo"
    ),
) -> Output:
    """Compare SAEs without and with the loss on real images: handwritten digits.

    The demo trains a small vision transformer on scikit-learn's digits. Then it trains pairs of
    SAEs on its features with SAELens's own trainer, one without and one with the loss terms, and
    compares them on held-out images. It also writes a page to look at their latents. It needs no
    network, and two or three minutes on two cores.
    """
    try:
        terms = _terms(arch, lam, regularizer or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    from monoloss_plugin.demo.run import RUNS, run_demo

    result, files = run_demo(arch, terms, range(seeds), out)
    name = " + ".join(term.name for term in terms)
    baselines = result.comparison.baselines
    rows = result.comparison.cells()
    seconds = (f"{fmean(result.seconds[run]):.1f}" for run in RUNS)
    rows.append(["training, seconds", *seconds, *("" for _ in baselines)])
    text: list[str | Table] = [
        f"Encoder: {result.encoder_accuracy:.1%} of the held-out digits right. "
        f"{arch} SAE, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}:",
        table("on held-out images", *(f"{run} {name}" for run in RUNS), *baselines, rows=rows),
        *result.comparison.notes,
        *(f"{what}: {path}" for what, path in files.items() if what != "report"),
        f"to look at the latents, open in a browser: {files['report']}",
        f"SAEs, for SAE.load_from_disk: {out}/seed-*/with",
        f"to publish one: monoloss publish sae {out}/seed-0/with USER/NAME --dry-run --features "
        f"{out}/features/held-out --train {out}/features/train --baseline {out}/seed-0/without",
    ]
    return Output({**result.to_dict(), "files": files, "folder": out}, text)


def _terms(arch: str, lam: float, regularizers: list[str]) -> list[LossTerm]:
    """Return the terms that the options ask for.

    Raises:
        ValueError: an option makes no sense, or does not fit the architecture.
    """
    terms: list[LossTerm] = [MonoLoss(lam=lam)] if lam else []
    for entry in regularizers:
        name, _, weight = entry.partition("=")
        name = name.replace("-", "_")
        if name not in REGULARIZERS:
            raise ValueError(
                f"regularizer: expected one of {', '.join(REGULARIZERS)}, got {name!r}"
            )
        terms.append(REGULARIZERS[name](lam=float(weight or 0.002)))
    if not terms:
        raise ValueError("nothing to compare: give --lam above 0 or a --regularizer")
    if len({term.name for term in terms}) < len(terms):
        raise ValueError("regularizer: give each regularizer once")
    if any(term.needs_selection for term in terms) and "topk" not in arch:
        raise ValueError(f"regularizer: needs a Top-k selection; {arch} has none")
    return terms

"""``monoloss report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from monoloss_plugin._places import local_path, require_file
from monoloss_plugin.cli.evaluate import Against, HeldOut, SAEPlace, load_features, load_saes
from monoloss_plugin.cli.output import Output


def report(
    sae: SAEPlace,
    features: HeldOut,
    images: Annotated[
        str | None,
        typer.Option(
            help="The images of the features: a folder such as ./photos, or a dataset on the Hub. "
            "By default those that the features' record tells of."
        ),
    ] = None,
    against: Against = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="Training features. The page then shows SAEs that have learnt nothing too."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="A file of texts, one a line, to name the latents by. Needs an encoder "
            "with a text side, such as CLIP."
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="What encodes the texts; by default the encoder of the features."),
    ] = None,
    count: Annotated[int, typer.Option(help="Images of each latent in each band.")] = 8,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> Output:
    """Write a page to look at latents: their images, measures and neighbours.

    It is one HTML file, which opens in a browser from disk and needs no network. You can sort,
    search and filter the latents, and put two SAEs side by side.
    """
    if text_encoder is not None and texts is None:
        raise typer.BadParameter("needs --texts to encode", param_hint="--text-encoder")
    given = _lines(texts) if texts is not None else []
    from monoloss_plugin.report import write_report

    saes = load_saes(sae, against)
    written = write_report(
        dict(zip(_short(list(saes)), saes.values(), strict=True)),
        load_features(features),
        out,
        images=None if images is None else local_path(images) or images,
        train=None if train is None else load_features(train),
        texts=given,
        encoder=text_encoder,
        count=count,
        progress=True,
    )
    size = written.stat().st_size
    text = [f"{written} ({decimal(size)}): open it in a browser"]
    return Output({"report": written, "bytes": size}, text)


def _short(places: list[str]) -> list[str]:
    """Return the ends of paths that tell them apart: a page should not tell where files are."""
    parts = [Path(one).parts[::-1] if local_path(one) else (one,) for one in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[:length][::-1]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return places


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    require_file(path, "texts")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"texts: {path} is not text in UTF-8") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"texts: expected a text on each line of {path}, got none")
    return found

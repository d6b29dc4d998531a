"""``monoloss extract`` and ``monoloss features``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from monoloss_plugin.cli.errors import readable_errors

_SHOWN = 5
"""Names of classes that are printed."""

features = typer.Typer(help="Look at feature datasets and put them together.", no_args_is_help=True)


def extract(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images such as ./photos (class subfolders become labels), "
            "open-images:FOLDER, a folder of Dataset.save_to_disk, or a Hub dataset such as "
            "imagenet-1k or cifar10."
        ),
    ],
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder",
            "-e",
            help="clip-vit-l14, siglip2-so400m, vit-l16, or LIBRARY:NAME with open_clip, "
            "transformers or timm.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the feature dataset.")],
    split: Annotated[
        str | None, typer.Option(help="Split of the dataset, or subfolder of the folder.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    source_revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of a Hub dataset.")
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a Hub dataset without downloading it first.")
    ] = False,
    image: Annotated[str | None, typer.Option(help="Image column; found by default.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column; found by default.")] = None,
    image_id: Annotated[str | None, typer.Option(help="Column of ids; found by default.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the encoder's weights.")] = None,
    output: Annotated[
        str | None, typer.Option(help="pooled (the default), cls, or mean of the patch tokens.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Module whose output to take, such as blocks.9.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Stored as float16 or float32.")] = "float16",
    autocast: Annotated[
        str | None, typer.Option(help="Run the encoder in bfloat16 or float16.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A GPU where there is one, by default.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images at once; by default what fits the memory.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode images.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N, from 0: this process's share of N. Under torchrun, its rank and world size."
        ),
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="Images a shard.")] = None,
    max_unreadable: Annotated[
        int, typer.Option(help="Unreadable images to leave out before the run stops.")
    ] = 100,
) -> None:
    """Encode images with a frozen encoder and store their features as a dataset.

    Killed at any moment, it goes on where it was when it is started again. Several processes may
    write to one folder, each with its --shard I/N.
    """
    with readable_errors():
        from monoloss_plugin.features.extraction import extract as run

        done = run(
            source,
            encoder,
            out,
            split=split,
            config=config,
            source_revision=source_revision,
            streaming=streaming,
            image=image,
            label=label,
            image_id=image_id,
            revision=revision,
            output=output,  # type: ignore[arg-type]  # checked by extract
            layer=layer,
            dtype=dtype,  # type: ignore[arg-type]
            autocast=autocast,  # type: ignore[arg-type]
            device=device,
            batch_size=batch_size,
            workers=workers,
            shard=_share(shard),
            shard_size=shard_size,
            max_unreadable=max_unreadable,
        )
    rate = f", {done.images / done.seconds:.0f} a second" if done.images else ""
    print(f"{done.images} images encoded in this run{rate}; {done.rows} in {done.folder}")
    if done.classes is not None:
        print(f"labels: {_listed(done.classes)}")
    if done.unreadable:
        print(f"{len(done.unreadable)} unreadable images left out:")
        for bad in done.unreadable:
            print(f"  {bad['image_id']}: {bad['error']}")
    if not done.complete:
        print("this share is done; the set is not complete yet, since other shares are not")


@features.command()
def verify(folder: Annotated[Path, typer.Argument(help="A feature dataset.")]) -> None:
    """Compare every shard with its checksum; exit with 1 if one is missing, cut or altered."""
    with readable_errors():
        from tqdm.auto import tqdm

        from monoloss_plugin.features import shards, whole

        size = sum(path.stat().st_size for path in folder.glob("data-*.arrow"))
        with tqdm(total=size, unit="B", unit_scale=True, desc="Verifying", disable=not size) as bar:
            problems = whole.verify(folder, bar.update)
        count, complete = len(shards.finished(folder)), shards.is_complete(folder)
    for problem in problems:
        print(problem)
    if problems:
        print("delete an altered file, and run the extraction again to repair the set")
        sys.exit(1)
    print(f"{count} shards are as they were written{'' if complete else '; not complete yet'}")


@features.command()
def info(folder: Annotated[Path, typer.Argument(help="A feature dataset.")]) -> None:
    """Show what a feature dataset holds and what it was made with."""
    with readable_errors():
        from monoloss_plugin.features import FeatureSet

        opened = FeatureSet.open(folder)
    table = Table(show_header=False)
    table.add_row("features", f"{len(opened)} x {opened.width}, {opened.dtype}")
    classes = opened.classes
    if opened.labels is not None:
        table.add_row("labels", _listed(classes) if classes else "numbers")
    for part in ("encoder", "source"):
        for name, value in opened.record.get(part, {}).items():
            if value is not None:
                table.add_row(f"{part} {name}", str(value))
    for name in ("unreadable", "autocast", "versions"):
        if opened.record.get(name):
            table.add_row(name, str(opened.record[name]))
    Console().print(table)


@features.command()
def join(
    folder: Annotated[Path, typer.Argument(help="Where the shards go.")],
    others: Annotated[list[Path], typer.Argument(help="Folders of other machines' shards.")],
) -> None:
    """Copy the shards that other machines made of the same source into one folder."""
    with readable_errors():
        from monoloss_plugin.features import shards, whole

        complete = whole.join(folder, others)
    print(
        f"{len(shards.finished(folder))} shards in {folder}, {'' if complete else 'not '}complete"
    )


@features.command()
def encoders() -> None:
    """List the encoders that have short names."""
    with readable_errors():
        from monoloss_plugin.features.encoders import SHORT_NAMES
    table = Table("name", "width", "weights", "revision", "what")
    for name, pinned in SHORT_NAMES.items():
        revision = pinned.revision or "by name"
        table.add_row(name, str(pinned.width), pinned.name, revision, pinned.about)
    Console().print(table)


def _listed(classes: list[str]) -> str:
    """Say how many classes there are, and the first."""
    said = "1 class" if len(classes) == 1 else f"{len(classes)} classes"
    more = ", ..." if len(classes) > _SHOWN else ""
    return f"{said}: {', '.join(classes[:_SHOWN])}{more}"


def _share(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    part, _, parts = shard.partition("/")
    if not (part.isdigit() and parts.isdigit()):
        raise typer.BadParameter(f"expected I/N such as 0/4, got {shard!r}", param_hint="--shard")
    return int(part), int(parts)

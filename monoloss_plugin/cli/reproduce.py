"""``monoloss reproduce``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from monoloss_plugin._places import require_folder
from monoloss_plugin.cli.output import Output, one_of, table

# Written out, because importing them would make --help slow. A test keeps them right.
_NAMES = (
    "figure2",
    "figure4",
    "table1",
    "table2",
    "hard-budget",
    "referee",
    "ground-truth",
    "collection",
)


def reproduce(
    experiment: Annotated[
        str, typer.Argument(help=f"One of {', '.join(_NAMES)}.", callback=one_of(*_NAMES))
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for SAEs, numbers and figures. Experiments may share it."),
    ],
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features",
            help="A folder or Hub repository with splits train and test (or held_out, validation). "
            "Repeat it for other encoders of the same images; the first is trained on.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images: ./FOLDER, or a dataset on the Hub such as imagenet-1k."),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder", help="Extract features of --data with it. You may repeat the option."
        ),
    ] = None,
    splits: Annotated[
        str, typer.Option(help="Splits of --data to train and to measure on.")
    ] = "train,test",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images for a timm encoder.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="full has the papers' sizes and takes a GPU; small fits a few CPU cores.",
            callback=one_of("small", "full"),
        ),
    ] = "small",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1; by default a GPU if there is one.")
    ] = None,
) -> Output:
    """Run an experiment of the papers, and print its table beside the paper's.

    If you stop it, start it again with the same options, and it goes on.
    """
    if encoder and data is None:
        raise typer.BadParameter("needs --data, whose features to extract", param_hint="--encoder")
    if splits.count(",") != 1:
        raise typer.BadParameter(f"expected TRAIN,TEST, got {splits!r}", param_hint="--splits")
    if out.exists():
        require_folder(out, "out")
    from monoloss_plugin import reproduce as experiments
    from monoloss_plugin._checks import device_or_gpu
    from monoloss_plugin.features import open_source

    images: dict[str, Any] = {}
    if data is not None:
        names = zip(("train", "held_out"), splits.split(","), strict=True)
        images = {split: open_source(data, split=name) for split, name in names}
    opened: dict[str, Any] = {}
    for place in features or []:
        name, found = experiments.features_in(place)
        if name in opened:
            raise ValueError(f"features: two are called {name!r}; rename the folder of one")
        opened[name] = found
    for wanted in encoder or []:
        name = re.sub(r"[^\w.=+-]+", "-", wanted)
        if name in opened:
            raise ValueError(f"encoder: {wanted!r} is named twice, or features have its name")
        folder = out / "features" / name
        opened[name] = experiments.extracted(images, wanted, folder, image_size)
    setting = experiments.Setting(
        out=out,
        features=opened,
        full=scale == "full",
        seeds=range(seeds),
        images=images,
        device=str(device_or_gpu(device)),
    )
    done = experiments.reproduce(experiment, experiments.EXPERIMENTS[experiment], setting)
    text: list[str | Table] = []
    for one in done.tables:
        text += [one.title, table(*one.header, rows=one.rows), *([one.note] if one.note else [])]
    text += [f"{what}: {path}" for what, path in done.files.items()]
    return Output({**done.found, "files": done.files}, text)

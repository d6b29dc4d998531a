"""The features of an experiment: opened where they are, or extracted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from monoloss_plugin._places import as_path, local_path, require_folder
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub.features import load_features, splits_in
from monoloss_plugin.hub.repository import Place, open_repository
from monoloss_plugin.reproduce.experiment import Features

TRAIN = "train"
HELD_OUT = ("held_out", "test", "validation", "val")
"""Names of the split that is measured on; the first that is there counts."""


def features_in(place: str | os.PathLike[str]) -> tuple[str, Features]:
    """Return the features of an encoder, and a name for it.

    Args:
        place: a folder with a folder ``train`` and one called ``held_out``, ``test`` or
            ``validation``, each a feature set; or a repository on the Hub, ``user/name`` or
            ``user/name:config``, with splits of these names; or ``"digits"``, which is bundled.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder or repository.
        ValueError: it does not have both splits, or their features have different widths.
    """
    folder = local_path(place)
    if folder is not None:
        require_folder(folder, "features")
        split = _held_out({path.name for path in folder.iterdir()}, str(folder))
        found = Features(FeatureSet.open(folder / TRAIN), FeatureSet.open(folder / split))
        name = folder.resolve().name
    else:
        repository, _, config = str(place).partition(":")
        there = splits_in(open_repository(Place(repository, "dataset", None, None, None, False)))
        config = config or next(iter(there)).config if there else config
        split = _held_out({one.split for one in there if one.config == config}, str(place))
        found = Features(
            load_features(repository, TRAIN, config=config),
            load_features(repository, split, config=config),
        )
        name = config if config != "default" else repository.rpartition("/")[2]
    if found.train.width != found.held_out.width:
        raise ValueError(
            f"features: {place}: {TRAIN} has width {found.train.width}, {split} has "
            f"{found.held_out.width}"
        )
    return name, found


def _held_out(there: set[str], place: str) -> str:
    split = next((name for name in HELD_OUT if name in there), None)
    if TRAIN not in there or split is None:
        raise ValueError(
            f"features: expected {TRAIN} and one of {', '.join(HELD_OUT)} in {place}, found "
            f"{', '.join(sorted(there)) or 'nothing'}"
        )
    return split


def extracted(images: dict[str, Any], encoder: str, out: Path, image_size: int | None) -> Features:
    """Return the features of images, extracted now, or as far as they are not there yet.

    Args:
        images: "train" and "held_out", as ``open_source`` takes or returns them.
        encoder: a name that ``load_encoder`` takes.
        out: folder for both.
        image_size: as ``load_encoder``.
    """
    from monoloss_plugin.features import extract, load_encoder

    loaded = load_encoder(encoder, image_size=image_size)
    folder = as_path(out, "out")
    for split, source in images.items():
        extract(source, loaded, folder / split)
    return Features(FeatureSet.open(folder / TRAIN), FeatureSet.open(folder / "held_out"))

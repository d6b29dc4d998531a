"""Run an experiment, and write what it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.store import read_json, write_json
from monoloss_plugin.figures import save_figure
from monoloss_plugin.reproduce.experiment import Experiment, Found, Setting, Table
from monoloss_plugin.reproduce.machine import machine

_SETTING = "setting.json"


@dataclass(frozen=True)
class Reproduction:
    """What :func:`reproduce` gives."""

    found: Found
    tables: list[Table]
    files: dict[str, Path]
    """What was written: "numbers", and "figure" if the experiment has one."""


def reproduce(name: str, experiment: Experiment, setting: Setting) -> Reproduction:
    """Run an experiment, and write its numbers and its figure.

    If it is stopped, run it again with the same setting, and it goes on. Every number of a table
    comes from the JSON file.

    Args:
        name: of the files.
        experiment: one of :data:`~monoloss_plugin.reproduce.EXPERIMENTS`.
        setting: what to measure on.

    Raises:
        ValueError: the setting lacks features or images that the experiment needs; the held-out
            features are the training features; or ``setting.out`` holds runs of other features, of
            other images, or of the other scale.
    """
    _require(name, experiment, setting)
    _claim(setting)
    found = {**_described(name, setting), **experiment.measure(setting)}
    write_json(setting.out, f"{name}.json", found)
    files = {"numbers": setting.out / f"{name}.json"}
    if experiment.draw is not None:
        files["figure"] = save_figure(experiment.draw(found), setting.out / f"{name}.png")
    return Reproduction(found, experiment.tables(found), files)


def _require(name: str, experiment: Experiment, setting: Setting) -> None:
    if "features" in experiment.needs and not setting.features:
        raise ValueError(f"{name}: needs features: give --features, or --encoder and --data")
    if "second encoder" in experiment.needs and len(setting.features) < 2:
        raise ValueError(f"{name}: needs the features of two encoders")
    if "images" in experiment.needs and not setting.images:
        raise ValueError(f"{name}: needs images: give --data")
    for encoder, of in setting.features.items():
        if "labels" in experiment.needs and (of.train.labels is None or of.held_out.labels is None):
            raise ValueError(f"{name}: needs labels, and the features of {encoder} have none")
        if of.train.fingerprint() == of.held_out.fingerprint():
            raise ValueError(
                f"features: {encoder}: the held-out features are the training features"
            )


def _claim(setting: Setting) -> None:
    """Note what the runs of a folder are of; raise ValueError if it holds runs of something else.

    Encoders may be added.
    """
    now: dict[str, Any] = {
        "scale": {"full": setting.full},
        "features": {
            name: [one.fingerprint() for one in of] for name, of in setting.features.items()
        },
        "images": {name: of.record["sample_sha256"] for name, of in setting.images.items()},
    }
    place = setting.out / _SETTING
    then = read_json(place) if place.exists() else {}
    for what, of in now.items():
        known = then.setdefault(what, {})
        if changed := [name for name in of if known.setdefault(name, of[name]) != of[name]]:
            raise ValueError(
                f"out: {setting.out} holds runs of another {what} ({changed[0]}); give a new folder"
            )
    setting.out.mkdir(parents=True, exist_ok=True)
    write_json(setting.out, _SETTING, then)


def _described(name: str, setting: Setting) -> dict[str, Any]:
    """Return what the numbers were measured on."""
    return {
        "experiment": name,
        "scale": "full" if setting.full else "small",
        "seeds": list(setting.seeds),
        "machine": machine(setting.device),
        "features": {
            encoder: {split: _of_set(features) for split, features in of._asdict().items()}
            for encoder, of in setting.features.items()
        },
    }


def _of_set(features: FeatureSet) -> dict[str, Any]:
    encoder, source = features.record.encoder, features.record.source
    return {
        "rows": len(features),
        "width": features.width,
        "encoder": encoder.get("name"),
        "source": source.get("name"),
        "split": source.get("split"),
    }

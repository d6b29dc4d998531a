"""Run an experiment, and write what it found."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.store import write_json
from monoloss_plugin.figures import save_figure
from monoloss_plugin.reproduce.experiment import Experiment, Found, Setting, Table
from monoloss_plugin.reproduce.machine import machine

_VERSIONS = ("monoloss_plugin", "torch", "sae-lens")


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
        ValueError: the setting lacks features or images that the experiment needs.
    """
    _require(name, experiment, setting)
    found = {**_described(name, setting), **experiment.measure(setting)}
    setting.out.mkdir(parents=True, exist_ok=True)
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


def _described(name: str, setting: Setting) -> dict[str, Any]:
    """Return what the numbers were measured on."""
    return {
        "experiment": name,
        "scale": "full" if setting.full else "small",
        "seeds": list(setting.seeds),
        "machine": machine(setting.device),
        "versions": {package: version(package) for package in _VERSIONS},
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

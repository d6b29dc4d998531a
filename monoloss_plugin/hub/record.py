"""``monoloss.json``: what an SAE was trained with, on which data, and what it scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from monoloss_plugin.hub.repository import read_json

RECORD = "monoloss.json"

Inputs = Literal["unit norm", "as they are"]

_TYPES: dict[str, type] = {"losses": list, "inputs": str, "converted_from": str}
"""The type of each part that is not a dict."""


@dataclass(frozen=True)
class SAERecord:
    """What is known about an SAE beside its weights. A part that nobody stated is empty."""

    losses: list[dict[str, Any]] = field(default_factory=list)
    """The terms that were added to the host's loss: name, kind, lam and units of each."""
    inputs: Inputs | None = None
    """What the SAE takes: features scaled to unit norm, or features as the encoder gives them."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """The encoder that made the features."""
    dataset: dict[str, Any] = field(default_factory=dict)
    """The images that the features come from."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Measurements, named as in :meth:`~monoloss_plugin.evaluation.Evaluation.summary`."""
    baseline: dict[str, float] = field(default_factory=dict)
    """The same measurements of an SAE that was trained without the terms."""
    controls: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same measurements of SAEs that have learnt nothing, by name."""
    latents_shown: dict[str, Any] = field(default_factory=dict)
    """The latents of the picture: their numbers (``latents``), their places in the ranking by
    MonoScore above chance (``ranks``), how many are in the ranking (``of``), and whether these are
    above chance (``above_chance``). Empty without a picture."""
    evaluated_on: dict[str, Any] = field(default_factory=dict)
    """The samples that were measured."""
    refit: dict[str, float] = field(default_factory=dict)
    """What :func:`~monoloss_plugin.saes.refit.refit_decoder` did: ridge, R² before and after."""
    converted_from: str | None = None
    """The library whose checkpoint was converted."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that published the SAE."""

    @property
    def lam(self) -> float:
        """The weight of MonoLoss, in its units; 0 if the SAE was trained without it."""
        monoloss = (term for term in self.losses if term.get("term") == "MonoLoss")
        return sum((float(term.get("lam", 0)) for term in monoloss), 0.0)

    def write(self, folder: Path) -> None:
        """Write the record into an SAE's folder."""
        content = json.dumps({"format": 1, **asdict(self)}, indent=1, sort_keys=True)
        (folder / RECORD).write_text(f"{content}\n", encoding="utf-8")


def read_record(folder: Path, name: str) -> SAERecord:
    """Read the record of an SAE's folder; an empty one if there is none."""
    path = folder / RECORD
    return parse_record(read_json(path), f"{name}/{RECORD}") if path.is_file() else SAERecord()


def parse_record(content: Mapping[str, Any], name: str) -> SAERecord:
    """Make a record from JSON; raise ValueError if a part has the wrong type.

    Parts that a later version may have added are left out.
    """
    known: dict[str, Any] = {}
    for part in (part.name for part in fields(SAERecord)):
        value = content.get(part)
        if value is None:
            continue
        if not isinstance(value, _TYPES.get(part, dict)) or not _fits(part, value):
            raise ValueError(f"{name}: {part} is not what a record holds there: {value!r}")
        known[part] = value
    return SAERecord(**known)


def record_in(sae: Any) -> SAERecord:
    """Return what a SAELens SAE's own metadata says: its loss terms, inputs and origin."""
    own = sae.cfg.metadata["monoloss"] or {}
    try:
        losses = list(own.get("terms", {}).values())
        return parse_record({**own, "losses": losses}, "sae")
    except (AttributeError, TypeError, ValueError) as error:  # it may hold anything
        raise ValueError(
            f"sae: its metadata.monoloss is not what this package writes there: {error}"
        ) from error


def _fits(part: str, value: Any) -> bool:
    if part == "losses":
        return all(
            isinstance(term, dict)
            and isinstance(term.get("name"), str)
            and _is_number(term.get("lam"))
            for term in value
        )
    if part in ("metrics", "baseline", "refit"):
        return all(_is_number(number) for number in value.values())
    if part == "controls":
        return all(isinstance(one, dict) and _fits("metrics", one) for one in value.values())
    if part == "latents_shown" and value:
        return _tells_latents(value)
    return part != "inputs" or value in get_args(Inputs)


def _is_number(value: Any) -> bool:
    # A JSON integer can be too long for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _tells_latents(value: dict[str, Any]) -> bool:
    latents, ranks = value.get("latents"), value.get("ranks")
    if not isinstance(latents, list) or not isinstance(ranks, list) or not latents:
        return False
    whole = all(
        type(number) is int and number >= 0 for number in (*latents, *ranks, value.get("of"))
    )
    return whole and len(latents) == len(ranks) and type(value.get("above_chance")) is bool

"""``monoloss.json``: what an SAE was trained with, on what, and what it scored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

RECORD = "monoloss.json"
FORMAT = 1

_FOREIGN = "sae: its metadata.monoloss is not what this package writes there"

Inputs = Literal["unit norm", "as they are"]


@dataclass(frozen=True)
class SAERecord:
    """What is known of an SAE beside its weights; empty where nothing was said."""

    losses: list[dict[str, Any]] = field(default_factory=list)
    """Terms added to the host's loss, each with its name, kind, lam and units; none: a baseline."""
    inputs: Inputs | None = None
    """What the SAE takes: features scaled to unit norm, or as the encoder gives them."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """What the features come from."""
    dataset: dict[str, Any] = field(default_factory=dict)
    """What images they are features of."""
    metrics: dict[str, float] = field(default_factory=dict)
    """By the names of :meth:`~monoloss_plugin.evaluation.Evaluation.summary`."""
    baseline: dict[str, float] = field(default_factory=dict)
    """The same of an SAE that was trained without the terms."""
    evaluated_on: dict[str, Any] = field(default_factory=dict)
    """Which samples the metrics are of."""
    converted_from: str | None = None
    """The library whose checkpoint it was converted from."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that published it."""

    @property
    def lam(self) -> float:
        """MonoLoss's weight, in its units; 0 where the SAE was trained without it."""
        ours = (term for term in self.losses if term.get("term") == "MonoLoss")
        return sum((float(term.get("lam", 0)) for term in ours), 0.0)

    def to_json(self) -> str:
        """Return the file's content."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"


def record_from(content: Mapping[str, Any], name: str) -> SAERecord:
    """Read a record; what a later version may have added is left out.

    Args:
        content: of the file.
        name: of the file, for the error.

    Raises:
        ValueError: a part that is not of its type, or a later format.
    """
    made = content.get("format", FORMAT)
    if not isinstance(made, int) or made > FORMAT:
        raise ValueError(
            f"{name}: format {made!r}, and this version of monoloss_plugin reads up to {FORMAT}; "
            "update it"
        )
    known: dict[str, Any] = {}
    for part in fields(SAERecord):
        given = content.get(part.name)
        if given is None:
            continue
        expected = _TYPES.get(part.name, dict)
        if not isinstance(given, expected) or not _fits(part.name, given):
            raise ValueError(f"{name}: {part.name} is not what a record holds there: {given!r}")
        known[part.name] = given
    return SAERecord(**known)


def record_in(sae: Any) -> SAERecord:
    """Return what a SAELens SAE's own metadata say: its loss terms, inputs and origin.

    Raises:
        ValueError: there is something else under our name.
    """
    said = sae.cfg.metadata["monoloss"] or {}
    terms = said.get("terms", {}) if isinstance(said, Mapping) else None
    if not isinstance(terms, Mapping):
        raise ValueError(_FOREIGN)
    own = {name: said.get(name) for name in ("inputs", "converted_from")}
    try:
        return record_from({**own, "losses": list(terms.values())}, "sae")
    except ValueError as error:
        raise ValueError(_FOREIGN) from error


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are numbers, which is what JSON and YAML can hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def write_record(record: SAERecord, folder: Path) -> None:
    """Write a record into an SAE's folder."""
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")


_TYPES: dict[str, type] = {"losses": list, "inputs": str, "converted_from": str}


def _fits(part: str, given: Any) -> bool:
    if part == "losses":
        return all(isinstance(term, dict) and is_term(term) for term in given)
    if part in ("metrics", "baseline"):
        return all(_is_number(value) for value in given.values())
    if part == "inputs":
        return given in get_args(Inputs)
    return True


def is_term(term: Mapping[str, Any]) -> bool:
    """Say whether a loss term is described as the adapters describe it: by a name and a weight."""
    return isinstance(term.get("name"), str) and _is_number(term.get("lam"))


def _is_number(value: Any) -> bool:
    # JSON holds integers of any length, which no float does.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300

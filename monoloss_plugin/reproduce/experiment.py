"""What every experiment shares: what it gets, what it gives, and how its runs survive a stop.

An experiment measures, and keeps each run in a file of its own, so that it goes on where it was.
What it returns is JSON. Tables and figure are made from that JSON alone, so they can be made again
without measuring: for the terminal, and for the page of evidence.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.store import read_json, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = dict[str, Any]
"""What an experiment found, as JSON can hold it."""


class Features(NamedTuple):
    """The features of one encoder."""

    train: FeatureSet
    held_out: FeatureSet


@dataclass(frozen=True)
class Setting:
    """What an experiment measures on, how much, and where it keeps its runs."""

    out: Path
    """A folder. Experiments share it, so that none trains what another has trained."""
    features: Mapping[str, Features] = field(default_factory=dict)
    """By the name of their encoder, the one to train on first."""
    full: bool = False
    """At the papers' sizes, for a GPU and a large data set; else at a size for a few CPU cores."""
    seeds: Sequence[int] = (0, 1, 2)
    images: Mapping[str, Any] = field(default_factory=dict)
    """"train" and "held_out" images, as ``open_source`` takes them, where they are needed."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.features:  # it names folders, and SAEs on the Hub
            if not re.fullmatch(r"[\w=+][\w.=+-]*", name):
                raise ValueError(
                    f"features: expected a name of letters, digits and _=+.-, got {name!r}; rename "
                    "its folder"
                )

    def run(self, *names: object, compute: Callable[[], Any]) -> Any:
        """Return what a run gave as JSON: from its file if it is there, or else by computing it.

        Args:
            names: of the experiment, and what tells the run from others, such as "table2", "lam
                0.1", "seed 0".
            compute: returns what JSON can hold.
        """
        *folders, name = (re.sub(r"[^\w.=+-]+", "-", str(one)) for one in names)
        folder = self.out.joinpath("runs", *folders)
        path = folder / f"{name}.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Through JSON, so that a new run gives what an old one gives.
            write_json(folder, path.name, json.loads(json.dumps(compute())))
        return read_json(path)


@dataclass(frozen=True)
class Table:
    """A table of an experiment, for people. Columns without any number are left out."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What one must know to read it."""

    def __post_init__(self) -> None:
        filled = [i for i in range(len(self.header)) if any(row[i] for row in self.rows)]
        object.__setattr__(self, "header", [self.header[i] for i in filled])
        object.__setattr__(self, "rows", [[row[i] for i in filled] for row in self.rows])


@dataclass(frozen=True)
class Experiment:
    """An experiment of one of the papers, or one that the papers leave out."""

    about: str
    """What it shows, in a line."""
    needs: frozenset[str]
    """Of "features", "images", "labels" and "second encoder"."""
    measure: Callable[[Setting], Found]
    tables: Callable[[Found], list[Table]]
    draw: Callable[[Found], Axes] | None = None


def mean_of(values: Iterable[float | None]) -> float:
    """Return the mean over seeds of the values that are there; NaN if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else float("nan")


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Return the mean ± standard deviation over seeds; only the value if there is one.

    It is empty if a value is missing.
    """
    known = list(values)
    if not known or None in known:
        return ""
    numbers = [float(value) for value in known if value is not None]
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"

"""What an evaluation found: the measures of an SAE and of each of its latents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, require_file, require_folder
from monoloss_plugin.metrics import MonoScoreResult
from monoloss_plugin.purity import Purity

if TYPE_CHECKING:
    import pandas as pd

MEASURES: dict[str, str] = {
    "r2": "R²",
    "monoscore": "MonoScore, undefined counting 0",
    "monoscore_defined": "MonoScore, defined latents",
    "monoscore_adjusted": "MonoScore above chance, defined latents",
    "monoscore_per_firing": "MonoScore, mean over firings",
    "chance": "MonoScore of shuffled activations",
    "defined_share": "share of latents defined",
    "significant_share": "share of latents above chance",
    "purity_binary": "class purity, binary",
    "purity_weighted": "class purity, weighted",
    "purity_adjusted": "class purity above chance",
    "l0": "L0",
    "dead_latents": "dead latents",
}
"""The entries of :meth:`Evaluation.summary`, and their names in a table."""

_SUMMARY, _LATENTS = "evaluation.json", "latents.safetensors"
_OF_PURITY = "purity_"
_SHOWN = 5


@dataclass(frozen=True)
class Spaces:
    """What samples are compared by.

    A score is more convincing in another space than the one that MonoLoss was trained in.
    """

    scored: str
    """What MonoScore compares samples by here."""
    trained: str = ""
    """What MonoLoss compared samples by in training; empty if that is not known or there was no
    MonoLoss."""

    def __str__(self) -> str:
        trained = f"; MonoLoss was trained on {self.trained}" if self.trained else ""
        return f"samples are compared by {self.scored}{trained}"


@dataclass(frozen=True)
class Evaluation:
    """The measures of an SAE with M latents, over one dataset."""

    monoscore: MonoScoreResult
    """MonoScore of each latent, and its chance level."""
    purity: Purity | None
    """Class purity of each latent; None if the data has no labels."""
    r2: float
    """R² of the reconstruction, averaged over feature dimensions."""
    spaces: Spaces
    """What samples were compared by."""
    classes: Sequence[str] | None = None
    """Names of the classes, if they are known."""

    @property
    def num_latents(self) -> int:
        """M."""
        return len(self.monoscore.scores)

    @property
    def frequency(self) -> Tensor:
        """(M,) float32: the share of samples on which each latent is active."""
        return self.monoscore.support / self.monoscore.num_samples

    @property
    def l0(self) -> float:
        """Mean number of active latents per sample."""
        return float(self.monoscore.support.sum()) / self.monoscore.num_samples

    @property
    def num_dead(self) -> int:
        """Number of latents that are never active on these samples."""
        return int((self.monoscore.support == 0).sum())

    def summary(self) -> dict[str, float]:
        """Return the measures of the SAE as a whole, by name; see :data:`MEASURES`."""
        monoscore, purity = self.monoscore, self.purity
        scalars: dict[str, float] = {
            "r2": self.r2,
            "monoscore": monoscore.mean,
            "monoscore_defined": monoscore.mean_defined,
            "monoscore_adjusted": monoscore.mean_adjusted,
            "monoscore_per_firing": monoscore.mean_per_firing,
            "chance": monoscore.chance,
            "defined_share": monoscore.num_defined / self.num_latents,
            "significant_share": int(monoscore.significant().sum()) / self.num_latents,
        }
        if purity is not None:
            scalars["purity_binary"] = purity.mean_binary
            scalars["purity_weighted"] = purity.mean_weighted
            scalars["purity_adjusted"] = purity.mean_adjusted
        return {**scalars, "l0": self.l0, "dead_latents": self.num_dead}

    def latents(self) -> pd.DataFrame:
        """Return a table with a row for each latent, for pandas.

        Columns: score, adjusted, z, p, significant (at 0.01), support, frequency and largest (its
        largest activation), and with labels purity, purity_adjusted and class. A score or purity
        that is not defined is NaN. See :class:`~monoloss_plugin.metrics.MonoScoreResult` and
        :class:`~monoloss_plugin.purity.Purity`.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        pandas, of = _pandas(), self.monoscore
        undefined = ~of.defined
        columns: dict[str, Any] = {
            "score": of.scores.masked_fill(undefined, torch.nan),
            "adjusted": of.adjusted.masked_fill(undefined, torch.nan),
            "z": of.z_scores.masked_fill(undefined, torch.nan),
            "p": of.p_values,
            "significant": of.significant(),
            "support": of.support,
            "frequency": self.frequency,
            "largest": of.largest,
        }
        columns = {name: values.numpy() for name, values in columns.items()}
        if self.purity is not None:
            columns["purity"] = self.purity.binary.numpy()
            columns["purity_adjusted"] = self.purity.adjusted.numpy()
            columns["class"] = [self.class_name(label) for label in self.purity.dominant.tolist()]
        return pandas.DataFrame(columns).rename_axis("latent")

    def to_frame(self) -> pd.DataFrame:
        """Return the summary as a table of one column, for pandas.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        names = {MEASURES[name]: value for name, value in self.summary().items()}
        return _pandas().DataFrame({"value": names}).rename_axis("measure")

    def save(self, folder: str | Path) -> Path:
        """Write the measures to a folder: the summary as JSON, the latents as safetensors.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
        """
        try:
            from safetensors.torch import save_file
        except ModuleNotFoundError as error:
            raise missing_extra(error, "hub") from error
        place = as_path(folder, "folder", "a folder")
        place.mkdir(parents=True, exist_ok=True)
        tensors = self.monoscore.tensors()
        if self.purity is not None:
            tensors |= {f"{_OF_PURITY}{name}": of for name, of in self.purity._asdict().items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, place / _LATENTS)
        summary = self.summary().items()
        content = {
            # JSON has no NaN.
            "summary": {name: None if math.isnan(of) else of for name, of in summary},
            "chance": self.monoscore.chance,
            "num_samples": self.monoscore.num_samples,
            "r2": self.r2,
            "spaces": asdict(self.spaces),
            "classes": None if self.classes is None else list(self.classes),
        }
        (place / _SUMMARY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return place

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the files are damaged.
            ModuleNotFoundError: safetensors is not installed.
        """
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise missing_extra(error, "hub") from error
        place = as_path(folder, "folder", "a folder")
        require_folder(place, "folder")
        for name in (_SUMMARY, _LATENTS):
            require_file(place / name, "folder")
        try:
            content = json.loads((place / _SUMMARY).read_text(encoding="utf-8"))
            tensors = load_file(place / _LATENTS)
            purity: dict[str, Tensor] = {}
            for name in [name for name in tensors if name.startswith(_OF_PURITY)]:
                purity[name.removeprefix(_OF_PURITY)] = tensors.pop(name)
            numbers: dict[str, Any] = {name: content[name] for name in ("chance", "num_samples")}
            return cls(
                MonoScoreResult(**{**tensors, **numbers}),
                Purity(**purity) if purity else None,
                content["r2"],
                Spaces(**content["spaces"]),
                content["classes"],
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{place}: not what Evaluation.save writes: {error!r}") from error

    def __repr__(self) -> str:
        found = self.summary()
        shown = ("r2", "monoscore_adjusted", "monoscore", "chance", "l0", "dead_latents")
        numbers = ", ".join(f"{name}={found[name]:.4g}" for name in shown)
        return f"Evaluation({self.num_latents} latents, {numbers})"

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows: the summary and the best latents.

        Without pandas it is None, and the notebook shows the repr.
        """
        try:
            of_each = self.latents()
        except ModuleNotFoundError:
            return None
        tested = of_each[of_each["significant"]]
        best = tested.sort_values("adjusted", ascending=False).head(_SHOWN)
        return (
            f"<p>{self.num_latents:,} latents on {self.monoscore.num_samples:,} samples; "
            f"{escape(str(self.spaces))}</p>"
            f"{self.to_frame().to_html(header=False, float_format='{:.3f}'.format)}"
            "<p>The latents that are most above chance, of those that are significant:</p>"
            f"{best.to_html(float_format='%.3g')}"
        )

    def class_name(self, label: int) -> str:
        """Return the name of a class: its number if classes have no names, nothing for -1."""
        if label < 0:
            return ""
        return str(label) if self.classes is None else self.classes[label]


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise missing_extra(error, "referee") from error
    return pandas

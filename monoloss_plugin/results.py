"""What an evaluation found: the measures of an SAE and of each of its latents."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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

IMAGE_MEASURES: dict[str, str] = {
    "images_max_adjusted": "images by largest patch, MonoScore above chance",
    "images_mean_adjusted": "images by mean of patches, MonoScore above chance",
    "coherence": "coherence on the grid (Moran's I)",
    "extent": "share of an image's patches that are active",
    "num_images": "images",
}
"""The entries that a summary has beside :data:`MEASURES`, if samples are patches."""

_SUMMARY, _LATENTS = "evaluation.json", "latents.safetensors"
_OF_PURITY, _OF_IMAGES = "purity_", "images_"
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
class ImageMeasures:
    """What is measured of whole images, if samples are patches. All samples of an image count.

    Only positive activations count. A class token counts as a sample of its image, but it has no
    place on the grid, so it does not count in coherence and extent.
    """

    POOLED: ClassVar = ("largest", "mean")
    """How the activations of an image's samples become that of the image."""

    largest: MonoScoreResult
    """MonoScore of images, whose activation is the largest of their samples; compared by the
    images' own embeddings."""
    mean: MonoScoreResult
    """The same, with the mean of their samples."""
    coherence: Tensor
    """(M,) float64: Moran's I of the latent's map over an image's grid, mean over the images where
    it is defined. Near 1 if active patches lie together. If they lie anywhere, it is -1 / (P - 1)
    on average for P places; see :mod:`monoloss_plugin.spatial`. NaN if there is none, or if places
    of the grids are missing."""
    extent: Tensor
    """(M,) float64: the share of an image's patches that are active, mean over the images with an
    active patch; NaN if there are none."""

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.mean.num_samples

    def columns(self) -> dict[str, Tensor]:
        """Return what tables show of each latent, (M,) by name; NaN where it is undefined."""
        found = {}
        for name, one in (("max", self.largest), ("mean", self.mean)):
            adjusted = one.adjusted.masked_fill(~one.defined, torch.nan)
            found[f"images_{name}_adjusted"] = adjusted
        return {**found, "coherence": self.coherence, "extent": self.extent}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is known of each latent, (M,) tensors by name."""
        found = {"coherence": self.coherence, "extent": self.extent}
        for name in self.POOLED:
            of_each = getattr(self, name).tensors()
            found |= {f"{name}_{what}": values for what, values in of_each.items()}
        return found

    @classmethod
    def of(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> ImageMeasures:
        """Return the measures of :meth:`tensors`, with the numbers of each score."""
        found: dict[str, Any] = dict(tensors)
        for name in cls.POOLED:
            found[name] = _result_of(_pop_prefixed(found, f"{name}_"), numbers[name])
        return cls(**found)


@dataclass(frozen=True)
class Evaluation:
    """The measures of an SAE with M latents, over one dataset."""

    monoscore: MonoScoreResult
    """MonoScore of each latent, and its chance level. Patches of one image are not compared."""
    purity: Purity | None
    """Class purity of each latent; None if the data has no labels. If samples are patches, it is
    that of images: a patch activates its image, by the largest activation."""
    r2: float
    """R² of the reconstruction, averaged over feature dimensions."""
    spaces: Spaces
    """What samples were compared by."""
    classes: Sequence[str] | None = None
    """Names of the classes, if they are known."""
    images: ImageMeasures | None = None
    """What is measured of whole images; None if samples are no patches."""

    @property
    def tested(self) -> MonoScoreResult:
        """The scores whose p-values say which latents are above chance.

        Patches of one image are not independent of each other, so there is no test of patches. If
        samples are patches, these are the scores of ``images.mean``; else :attr:`monoscore`.
        """
        return self.monoscore if self.images is None else self.images.mean

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
        """Return the measures of the SAE as a whole, by name.

        See :data:`MEASURES`, and :data:`IMAGE_MEASURES` if samples are patches. Coherence and
        extent are means over the latents that have one.
        """
        monoscore, purity, images = self.monoscore, self.purity, self.images
        scalars: dict[str, float] = {
            "r2": self.r2,
            "monoscore": monoscore.mean,
            "monoscore_defined": monoscore.mean_defined,
            "monoscore_adjusted": monoscore.mean_adjusted,
            "monoscore_per_firing": monoscore.mean_per_firing,
            "chance": monoscore.chance,
            "defined_share": monoscore.num_defined / self.num_latents,
            "significant_share": int(self.tested.significant().sum()) / self.num_latents,
        }
        if purity is not None:
            scalars["purity_binary"] = purity.mean_binary
            scalars["purity_weighted"] = purity.mean_weighted
            scalars["purity_adjusted"] = purity.mean_adjusted
        if images is not None:
            scalars["images_max_adjusted"] = images.largest.mean_adjusted
            scalars["images_mean_adjusted"] = images.mean.mean_adjusted
            scalars["coherence"] = float(images.coherence.nanmean())
            scalars["extent"] = float(images.extent.nanmean())
            scalars["num_images"] = images.num_images
        return {**scalars, "l0": self.l0, "dead_latents": self.num_dead}

    def latents(self) -> pd.DataFrame:
        """Return a table with a row for each latent, for pandas.

        Columns: score, adjusted, z, p, significant (at 0.01), support, frequency and largest (its
        largest activation), and with labels purity, purity_adjusted and class. A score or purity
        that is not defined is NaN. If samples are patches, z, p and significant are those of
        :attr:`tested`, purity is that of images, and there are the columns images (how many
        activate the latent), images_max_adjusted, images_mean_adjusted, coherence and extent. See
        :class:`~monoloss_plugin.metrics.MonoScoreResult`, :class:`~monoloss_plugin.purity.Purity`
        and :class:`ImageMeasures`.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        pandas, of, tested = _pandas(), self.monoscore, self.tested
        undefined = ~of.defined
        columns: dict[str, Any] = {
            "score": of.scores.masked_fill(undefined, torch.nan),
            "adjusted": of.adjusted.masked_fill(undefined, torch.nan),
            "z": tested.z_scores.masked_fill(~tested.defined, torch.nan),
            "p": tested.p_values,
            "significant": tested.significant(),
            "support": of.support,
            "frequency": self.frequency,
            "largest": of.largest,
        }
        if self.images is not None:
            columns |= {"images": self.images.largest.support, **self.images.columns()}
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
        labels = MEASURES | IMAGE_MEASURES
        names = {labels[name]: value for name, value in self.summary().items()}
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
        if self.images is not None:
            tensors |= {f"{_OF_IMAGES}{name}": of for name, of in self.images.tensors().items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, place / _LATENTS)
        summary = self.summary().items()
        content = {
            # JSON has no NaN.
            "summary": {name: None if math.isnan(of) else of for name, of in summary},
            **_numbers_of(self.monoscore),
            "r2": self.r2,
            "spaces": asdict(self.spaces),
            "classes": None if self.classes is None else list(self.classes),
        }
        if self.images is not None:
            content["images"] = {
                name: _numbers_of(getattr(self.images, name)) for name in ImageMeasures.POOLED
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
            purity = _pop_prefixed(tensors, _OF_PURITY)
            images = _pop_prefixed(tensors, _OF_IMAGES)
            return cls(
                _result_of(tensors, content),
                Purity(**purity) if purity else None,
                content["r2"],
                Spaces(**content["spaces"]),
                content["classes"],
                ImageMeasures.of(images, content["images"]) if images else None,
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{place}: not what Evaluation.save writes: {error!r}") from error

    def __repr__(self) -> str:
        found = self.summary()
        shown = ("r2", "monoscore_adjusted", "monoscore", "chance", *IMAGE_MEASURES)
        shown = (*(name for name in shown if name in found), "l0", "dead_latents")
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
        samples, by = f"{self.monoscore.num_samples:,} samples", "adjusted"
        if self.images is not None:
            samples = f"{samples} of {self.images.num_images:,} images"
            by = "images_mean_adjusted"  # what was tested
        tested = of_each[of_each["significant"]]
        best = tested.sort_values(by, ascending=False).head(_SHOWN)
        return (
            f"<p>{self.num_latents:,} latents on {samples}; "
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


def _numbers_of(result: MonoScoreResult) -> dict[str, Any]:
    """Return what is known of all latents together."""
    return {"chance": result.chance, "num_samples": result.num_samples}


def _result_of(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> MonoScoreResult:
    known: dict[str, Any] = {name: numbers[name] for name in ("chance", "num_samples")}
    return MonoScoreResult(**{**tensors, **known})


def _pop_prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors whose name has a prefix, and return them without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise missing_extra(error, "referee") from error
    return pandas

"""The arguments of ``evaluate`` as batches: tensors, a feature set, or batches made elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_rows, as_tensor, require_at_least
from monoloss_plugin._places import kind_of
from monoloss_plugin.batch import Batch

_UNIT = 1e-2
"""A norm this close to 1 counts as 1: float16 and bfloat16 store unit vectors no better."""


@dataclass(frozen=True)
class Samples:
    """Every sample to score, in batches."""

    batches: Iterable[Batch]
    total: int | None
    """Number of samples, if it is known."""
    num_classes: int | None
    scaling: Literal["unknown", "wanted", "done"] = "unknown"
    """Whether features are scaled to unit norm. A feature set holds them as the encoder gave them,
    and SAEs are trained on them scaled: "wanted". ``FeatureBatches`` scales by default: "done"."""
    compared_by: str = "embeddings of the batches"
    """What samples are compared by."""
    classes: list[str] | None = None
    """Names of the classes, if they are known."""
    own: str = "their own features"
    """The features, in words: what patches are compared by."""

    @property
    def patches_compared_by(self) -> str:
        """What patches and their images are compared by."""
        if self.own == self.compared_by:
            return self.own
        return f"{self.own} (patches) and {self.compared_by} (images)"

    @classmethod
    def of(
        cls, features: Any, labels: Any, embeddings: Any, num_classes: int | None, batch_size: int
    ) -> Samples:
        """Return the samples of ``evaluate``'s arguments.

        Raises:
            TypeError, ValueError: as :func:`~monoloss_plugin.evaluation.evaluate`.
        """
        require_at_least(1, batch_size, "batch_size")
        if num_classes is not None:
            require_at_least(1, num_classes, "num_classes")
        if isinstance(features, Tensor) or hasattr(features, "__array_interface__"):
            return cls._of_tensors(features, labels, embeddings, num_classes, batch_size)
        # A FeatureSet and FeatureBatches; their module needs libraries that this one does not.
        has_rows = hasattr(features, "every_row") and not isinstance(features, type)
        is_iterable = isinstance(features, Iterable)
        if not has_rows and (isinstance(features, (str, bytes, dict, type)) or not is_iterable):
            raise TypeError(
                "features: expected a tensor, a FeatureSet or batches of samples, got "
                f"{kind_of(features)}"
            )
        if labels is not None or embeddings is not None:
            raise ValueError(
                "features: batches bring their own labels and embeddings; leave out labels= and "
                "embeddings="
            )
        if not has_rows:
            return cls(_checked(features), None, num_classes)
        normalized = getattr(features, "normalize", None)
        scaling: Any = {None: "wanted", True: "done", False: "unknown"}[normalized]
        held = getattr(features, "features", features)  # FeatureBatches hold their feature set
        return cls(
            features.every_row(batch_size),
            features.num_rows,
            num_classes or features.num_classes,
            scaling,
            getattr(features, "images", features).compared_by,
            held.classes,
            held.compared_by,
        )

    @classmethod
    def _of_tensors(
        cls, features: Any, labels: Any, embeddings: Any, num_classes: int | None, batch_size: int
    ) -> Samples:
        x = as_rows(features, "features")
        _refuse_patches(features, labels)
        y = None if labels is None else as_labels(labels).flatten()
        e = None if embeddings is None else as_rows(embeddings, "embeddings")
        for name, given in (("labels", y), ("embeddings", e)):
            if given is not None and len(given) != len(x):
                raise ValueError(
                    f"{name}: expected {len(x)} rows to match features, got {len(given)}"
                )
        if y is not None and num_classes is None and len(y):
            # If no sample has a label (all are -1), say one class: no latent has a purity.
            num_classes = max(int(y.max()), 0) + 1
        batches = (
            Batch(x[rows], None if e is None else e[rows], None if y is None else y[rows])
            for rows in (slice(start, start + batch_size) for start in range(0, len(x), batch_size))
        )
        compared_by = "the features" if e is None else "other embeddings"
        return cls(batches, len(x), num_classes, compared_by=compared_by)


def _refuse_patches(features: Any, labels: Any) -> None:
    """Raise ValueError for features (N, P, d) with one label for each of the N."""
    shape = tuple(features.shape)
    if labels is None or len(shape) != 3 or shape[1] == 1:
        return
    if tuple(as_labels(labels).shape) in ((shape[0],), (shape[0], 1)):
        raise ValueError(
            f"labels: expected {shape[:2]} to match features {shape}, got {shape[0]}; if these are "
            f"{shape[1]} patches of each of {shape[0]} images, pass "
            "FeatureSet.from_tensors(x, labels)"
        )


def scaling_for(sae: Any, samples: Samples, normalize: bool | None) -> bool:
    """Return whether to scale features to unit norm: as asked, or as the SAE was trained.

    Raises:
        TypeError: ``normalize`` is not a bool.
        ValueError: the features are already scaled, and the SAE takes them as they are.
    """
    if normalize is not None:
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected True, False or None, got {normalize!r}")
        return normalize
    taken = inputs_of(sae)
    if taken == "as they are" and samples.scaling == "done":
        raise ValueError(
            "features: these batches are scaled to unit norm, and the SAE takes features as they "
            "are; use FeatureBatches(..., normalize=False), or pass the FeatureSet"
        )
    return samples.scaling == "wanted" if taken is None else taken == "unit norm"


def inputs_of(sae: Any) -> str | None:
    """Return the inputs that an SAE says it takes: "unit norm", "as they are", or None."""
    cfg, record = getattr(sae, "cfg", None), own_record(sae)
    if record.get("inputs") in ("unit norm", "as they are"):
        return str(record["inputs"])
    if getattr(cfg, "normalize_activations", "none") != "none":
        return None  # the SAE may scale its inputs itself
    measured = record.get("input_mean_square_norm")  # by the adapter, in training
    return "unit norm" if isinstance(measured, float) and abs(measured - 1) < _UNIT else None


def trained_on(sae: Any) -> str:
    """Return what MonoLoss compared samples by in training; empty if the SAE does not say."""
    terms = own_record(sae).get("terms")
    return compared_in_training(terms.values() if isinstance(terms, dict) else ())


def compared_in_training(terms: Iterable[Any]) -> str:
    """Return what recorded loss terms compared samples by, as the first says it; or empty."""
    said = (term.get("compared_by") for term in terms if isinstance(term, dict))
    return next((str(one) for one in said if one), "")


def own_record(sae: Any) -> dict[str, Any]:
    """Return what an SAE's own metadata records; empty if it is not a record."""
    record = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "monoloss", None)
    return record if isinstance(record, dict) else {}


def is_scaled(features: Tensor) -> bool:
    """Return whether all features (B, d) have unit norm already, or are zero."""
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    return bool((((norms - 1).abs() < _UNIT) | (norms == 0)).all())


def _checked(batches: Iterable[Any]) -> Iterator[Batch]:
    """Yield batches with their features as a tensor; raise TypeError for anything else."""
    for batch in batches:
        if not isinstance(batch, Batch):
            raise TypeError(
                f"features: expected batches of the class Batch, got {type(batch).__name__}; "
                "make them with Batch(x, labels=y)"
            )
        yield batch._replace(features=as_tensor(batch.features, "features"))


def of_training(features: Any) -> str | None:
    """Return the name of a feature set's split if SAEs are trained on it; else None."""
    held = getattr(features, "features", features)  # FeatureBatches hold their feature set
    source = getattr(getattr(held, "record", None), "source", None)
    split = source.get("split") if isinstance(source, dict) else None
    return split if split in ("train", "training") else None

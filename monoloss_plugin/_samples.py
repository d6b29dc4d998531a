"""What ``evaluate`` takes, as batches: tensors, a feature set, or batches that someone made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_rows, as_tensor, require_at_least
from monoloss_plugin.batch import Batch

_UNIT = 1e-2
"""How far a norm may be from 1: float16 and bfloat16 store unit vectors no better."""


@dataclass(frozen=True)
class Samples:
    """Every sample to score, in batches."""

    batches: Iterable[Batch]
    total: int | None
    """Number of samples, where it is known."""
    num_classes: int | None
    scaling: Literal["unknown", "wanted", "done"] = "unknown"
    """To unit norm: a feature set's are as the encoder gave them, and SAEs are trained on them
    scaled; ``FeatureBatches`` has done it, if it was not told otherwise."""

    @classmethod
    def of(
        cls, features: Any, labels: Any, embeddings: Any, num_classes: int | None, batch_size: int
    ) -> Samples:
        """Return the samples of ``evaluate``'s arguments.

        Raises:
            TypeError, ValueError: as ``evaluate``.
        """
        require_at_least(1, batch_size, "batch_size")
        if num_classes is not None:
            require_at_least(1, num_classes, "num_classes")
        if isinstance(features, Tensor) or hasattr(features, "__array_interface__"):
            return cls._of_tensors(features, labels, embeddings, num_classes, batch_size)
        rows_at_hand = hasattr(features, "every_row") and not isinstance(features, type)
        if not rows_at_hand and (
            isinstance(features, (str, bytes, dict, type)) or not isinstance(features, Iterable)
        ):
            got = features if isinstance(features, type) else type(features).__name__
            raise TypeError(
                f"features: expected a tensor, a FeatureSet or batches of samples, got {got}"
            )
        if labels is not None or embeddings is not None:
            raise ValueError("features: batches bring their own labels and embeddings")
        if not rows_at_hand:
            return cls(_checked(features), None, num_classes)
        return cls._of_rows(features, num_classes, batch_size)

    @classmethod
    def _of_rows(cls, features: Any, num_classes: int | None, batch_size: int) -> Samples:
        """Return a feature set's rows, or those of ``FeatureBatches``."""
        scaling: Any = {None: "wanted", True: "done", False: "unknown"}[
            getattr(features, "normalize", None)
        ]
        batches = features.every_row(batch_size)
        return cls(batches, features.num_rows, num_classes or features.num_classes, scaling)

    @classmethod
    def _of_tensors(
        cls, features: Any, labels: Any, embeddings: Any, num_classes: int | None, batch_size: int
    ) -> Samples:
        x = as_rows(features, "features")
        y = None if labels is None else as_labels(labels).flatten()
        e = None if embeddings is None else as_rows(embeddings, "embeddings")
        for name, given in (("labels", y), ("embeddings", e)):
            if given is not None and len(given) != len(x):
                raise ValueError(
                    f"{name}: expected {len(x)} rows to match features, got {len(given)}"
                )
        if y is not None and num_classes is None and len(y):
            # Where no sample has a label (all are -1), of one class: no latent has a purity.
            num_classes = max(int(y.max()), 0) + 1
        batches = (
            Batch(
                x[rows],
                None if e is None else e[rows],
                None if y is None else y[rows],
            )
            for rows in (slice(start, start + batch_size) for start in range(0, len(x), batch_size))
        )
        return cls(batches, len(x), num_classes)


def scaling_for(sae: Any, samples: Samples, normalize: bool | None) -> bool:
    """Say whether features are to be scaled to unit norm: as asked, or as the SAE was trained.

    Raises:
        TypeError: ``normalize`` is no bool.
        ValueError: features that are scaled already, for an SAE that takes them as they are.
    """
    if normalize is not None:
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected True, False or None, got {normalize!r}")
        return normalize
    taken = inputs_of(sae)
    if taken == "as they are" and samples.scaling == "done":
        raise ValueError(
            "features: these batches are scaled to unit norm, and the SAE takes features as they "
            "are; use FeatureBatches(..., normalize=False), or give the FeatureSet"
        )
    return samples.scaling == "wanted" if taken is None else taken == "unit norm"


def inputs_of(sae: Any) -> str | None:
    """Return what an SAE says that it takes: "unit norm" or "as they are"; None if it does not."""
    cfg = getattr(sae, "cfg", None)
    record = getattr(getattr(cfg, "metadata", None), "monoloss", None)
    record = record if isinstance(record, dict) else {}
    if record.get("inputs") in ("unit norm", "as they are"):
        return str(record["inputs"])
    if getattr(cfg, "normalize_activations", "none") != "none":
        return None  # it may scale its inputs by itself
    measured = record.get("input_mean_square_norm")  # by the adapter, in training
    return "unit norm" if isinstance(measured, float) and abs(measured - 1) < _UNIT else None


def is_scaled(features: Tensor) -> bool:
    """Say whether features (B, d) are of unit norm already, or zero."""
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    return bool((((norms - 1).abs() < _UNIT) | (norms == 0)).all())


def _checked(batches: Iterable[Any]) -> Iterator[Batch]:
    """Yield batches, rows apart from leading dimensions; raise TypeError for anything else."""
    for batch in batches:
        if not isinstance(batch, Batch):
            raise TypeError(
                f"features: expected batches of the class Batch, got {type(batch).__name__}; "
                "make them with Batch(x, labels=y)"
            )
        yield batch._replace(features=as_tensor(batch.features, "features"))


def of_training(features: Any) -> str | None:
    """Return the name of a feature set's split, where it is one that SAEs are trained on."""
    source = getattr(getattr(features, "record", None), "source", None)
    split = source.get("split") if isinstance(source, dict) else None
    return split if split in ("train", "training") else None

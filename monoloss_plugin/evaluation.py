"""Every metric of the papers from one pass over an SAE's features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows, require_at_least
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.batch import Batch
from monoloss_plugin.kernels.support import Support, is_sparse, support_of
from monoloss_plugin.metrics import R2, ClassPurity, MonoScore, MonoScoreResult
from monoloss_plugin.purity import Purity

MEASURES: dict[str, str] = {
    "r2": "R²",
    "monoscore": "MonoScore, undefined counting 0",
    "monoscore_defined": "MonoScore, defined latents",
    "defined_share": "share of latents defined",
    "purity_binary": "class purity, binary",
    "purity_weighted": "class purity, weighted",
    "l0": "L0",
    "dead_latents": "dead latents",
}
"""What :meth:`Evaluation.summary` holds, and how a table calls it."""


class SAE(Protocol):
    """What is asked of an SAE: SAELens's classes have it."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Return the latents (B, M) of features (B, d_in); dense, or sparse COO."""
        ...

    def decode(self, latents: Tensor, /) -> Tensor:
        """Return the reconstruction (B, d_in) of latents (B, M)."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a dataset says of an SAE of M latents."""

    monoscore: MonoScoreResult
    """MonoScore of each latent."""
    purity: Purity | None
    """Class purity of each latent; None without labels."""
    r2: float
    """Coefficient of determination of the reconstruction, mean over feature dimensions."""
    l0: float
    """Mean number of active latents a sample."""
    frequency: Tensor
    """(M,) share of samples on which each latent is active."""

    @property
    def num_latents(self) -> int:
        """M."""
        return len(self.frequency)

    @property
    def num_dead(self) -> int:
        """Number of latents that are never active on these samples."""
        return int((self.frequency == 0).sum())

    def summary(self) -> dict[str, float]:
        """Return the scalars that the papers report, by name."""
        scalars: dict[str, float] = {
            "r2": self.r2,
            "monoscore": self.monoscore.mean,
            "monoscore_defined": self.monoscore.mean_defined,
            "defined_share": self.monoscore.num_defined / self.num_latents,
            "l0": self.l0,
            "dead_latents": self.num_dead,
        }
        if self.purity is not None:
            scalars["purity_binary"] = self.purity.mean_binary
            scalars["purity_weighted"] = self.purity.mean_weighted
        return scalars


@torch.no_grad()
def evaluate(
    sae: SAE,
    features: Tensor | Iterable[Batch],
    labels: Tensor | None = None,
    *,
    num_classes: int | None = None,
    embeddings: Tensor | None = None,
    batch_size: int = 2048,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score an SAE on features, in one pass through the SAE.

    Batches go to the SAE's device one by one, and the sums stay there: features larger than an
    accelerator's memory, or memory-mapped ones, are fine. Sparse latents cost what is active.

    A BatchTopK SAE in training selects over the batch it is given, and what SAELens saves of it has
    a threshold instead: other latents are active. Save it, and evaluate what
    ``SAE.load_from_disk`` gives.

    Args:
        sae: anything with ``encode`` and ``decode``, such as a SAELens SAE.
        features: (N, d_in), what the SAE takes; leading dimensions are flattened. Or batches that
            bring their labels and embeddings along, such as
            ``FeatureBatches(features, shuffle="none", drop_last=False)``.
        labels: (N,) integer classes, for purity; -1 where a sample has none.
        num_classes: number of classes; by default one more than the largest label, and what
            batches say of themselves.
        embeddings: (N, d) another similarity space of the same samples; the features by default.
        batch_size: samples a step.
        device: where the SAE computes; by default where its parameters are, or else the features.
        progress: show a progress bar (needs tqdm).

    Returns:
        Scores of each latent and of the SAE, on the CPU.

    Raises:
        TypeError: features not floating or labels not integer.
        ValueError: shapes that do not match, no samples, NaN or infinite values, or labels or
            embeddings beside batches.
        ModuleNotFoundError: ``progress`` without tqdm.

    Warns:
        UserWarning: a BatchTopK SAE in training.

    Examples:
        >>> class Identity:
        ...     def encode(self, x): return x.relu()
        ...     def decode(self, latents): return latents
        >>> evaluate(Identity(), torch.eye(3), torch.tensor([0, 1, 1])).l0
        1.0

    Source: Nasiri-Sarvi et al. 2026, section 4.1 and appendix B.
    """
    _warn_of_selection_over_batches(sae)
    total: int | None
    if isinstance(features, Tensor):
        x = as_rows(features, "features")
        total = len(x)
        batches: Iterable[Batch] = _batches_of(x, labels, embeddings, batch_size)
        if labels is not None and num_classes is None and labels.numel():
            # Where no sample has a label (all are -1), of one class: no latent then has a purity.
            num_classes = max(int(labels.max()), 0) + 1
    else:
        if not isinstance(features, Iterable) or hasattr(features, "tensor"):
            got = type(features).__name__
            remedy = "; FeatureBatches makes batches of it" if hasattr(features, "tensor") else ""
            raise TypeError(f"features: expected a tensor or batches of samples, got {got}{remedy}")
        if labels is not None or embeddings is not None:
            raise ValueError("features: batches bring their own labels and embeddings")
        batches, total = features, getattr(features, "num_rows", None)
        num_classes = num_classes or getattr(features, "num_classes", None)
    place = torch.device(device) if device is not None else _device_of(sae)
    decode, monoscore, r2, activity = _Decoder(sae), MonoScore(), R2(), _Activity()
    purity: ClassPurity | None = None
    seen = 0

    with _bar(total, progress) as advance:
        for batch in batches:
            if not isinstance(getattr(batch, "features", None), Tensor):
                got = type(batch).__name__
                raise TypeError(f"features: expected a tensor or batches of samples, got {got}s")
            given = as_rows(batch.features, "features")
            given = given if place is None else given.to(place)
            latents = as_rows(sae.encode(given), "latents", keep_sparse=True)
            # The entries are looked for once, and everything sums over them.
            found = support_of(latents) if is_sparse(latents) else latents
            r2.update(given, decode(latents, found))
            monoscore.update(found, batch.similarity.to(given.device))
            if batch.labels is not None:
                if num_classes is None:
                    raise ValueError("num_classes: needed for the purity of batches with labels")
                purity = purity or ClassPurity(num_classes)
                purity.update(*_labelled(found, latents, batch.labels.to(given.device)))
            activity.update(found)
            seen += len(given)
            advance(len(given))
    if seen == 0:
        raise ValueError("features: expected at least one sample, got none")

    scores, counts = monoscore.compute(), activity.counts.cpu()
    by_class = None if purity is None else purity.compute()
    return Evaluation(
        monoscore=MonoScoreResult(scores.scores.cpu(), scores.defined.cpu(), scores.num_samples),
        purity=None if by_class is None else Purity(by_class.binary.cpu(), by_class.weighted.cpu()),
        r2=r2.compute(),
        l0=float(counts.sum()) / seen,
        frequency=counts / seen,
    )


def _warn_of_selection_over_batches(sae: SAE) -> None:
    architecture = getattr(getattr(sae, "cfg", None), "architecture", None)
    if callable(architecture) and "batchtopk" in str(architecture()):
        warnings.warn(
            "sae: a BatchTopK SAE in training selects over each batch, and its scores depend on "
            "the batch size; save it with save_inference_model, and evaluate what "
            "SAE.load_from_disk gives, which is what others will use",
            stacklevel=4,  # past torch.no_grad
        )


def _labelled(
    found: Tensor | Support, latents: Tensor, labels: Tensor
) -> tuple[Tensor | Support, Tensor]:
    """Leave out samples without a label, whose label is -1."""
    unlabelled = labels == -1
    if not bool(unlabelled.any()):
        return found, labels
    dense = latents if latents.layout == torch.strided else latents.to_dense()
    return dense[~unlabelled], labels[~unlabelled]


def _batches_of(
    x: Tensor, labels: Tensor | None, embeddings: Tensor | None, batch_size: int
) -> Iterator[Batch]:
    """Check tensors against each other, and return their batches."""
    labels = None if labels is None else labels.flatten()
    embeddings = x if embeddings is None else as_rows(embeddings, "embeddings")
    for name, given in (("labels", labels), ("embeddings", embeddings)):
        if given is not None and len(given) != len(x):
            raise ValueError(f"{name}: expected {len(x)} rows to match features, got {len(given)}")
    require_at_least(1, batch_size, "batch_size")
    return (
        Batch(x[rows], embeddings[rows], None if labels is None else labels[rows])
        for rows in (slice(start, start + batch_size) for start in range(0, len(x), batch_size))
    )


class _Decoder:
    """Decodes sparse latents from their entries, where the SAE's ``decode`` can.

    Whether it can is tried on the first such batch, against what it makes of dense latents.
    """

    def __init__(self, sae: SAE) -> None:
        self.decode = sae.decode
        self.takes_sparse: bool | None = None

    def __call__(self, latents: Tensor, found: Tensor | Support) -> Tensor:
        if latents.layout != torch.strided or not isinstance(found, Support):
            return self.decode(latents)
        if self.takes_sparse:
            return self.decode(found.by_sample())
        dense = self.decode(latents)
        if self.takes_sparse is None and len(found.values):
            self.takes_sparse = self._agrees(found.by_sample(), dense)
        return dense

    def _agrees(self, sparse: Tensor, expected: Tensor) -> bool:
        try:
            given = self.decode(sparse)
        except Exception:  # whatever a decode that knows no sparse tensors trips over
            return False
        if given.layout != expected.layout or given.shape != expected.shape:
            return False
        tolerance = 1e-5 * expected.abs().max()  # NaN, where there is one, is within nothing
        return bool(((given - expected).abs() <= tolerance + 1e-4 * expected.abs()).all())


class _Activity:
    """On how many samples each latent is active."""

    def __init__(self) -> None:
        self.counts = torch.zeros((), dtype=torch.int64)

    def update(self, latents: Tensor | Support) -> None:
        if isinstance(latents, Support):
            counts = latents.sums((latents.values > 0).double()).long()
        else:
            counts = (latents > 0).sum(0)
        self.counts = self.counts.to(counts.device) + counts


def _device_of(sae: SAE) -> torch.device | None:
    """Return where a module's parameters are; None for anything else."""
    if isinstance(sae, torch.nn.Module):
        for tensor in (*sae.parameters(), *sae.buffers()):
            return tensor.device
    return None


@contextmanager
def _bar(samples: int | None, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Yield what to call with the number of samples done."""
    if not shown:
        yield lambda _: None
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cli") from error
    with tqdm(total=samples, desc="Evaluating", unit=" samples", unit_scale=True) as bar:
        yield bar.update

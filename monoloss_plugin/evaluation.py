"""Every measure of the papers, from one pass over an SAE's features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_device,
    as_labels,
    as_rows,
    as_tensor,
    require_finite,
)
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of
from monoloss_plugin._samples import Samples, is_scaled, of_training, scaling_for, trained_on
from monoloss_plugin.batch import Batch
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.kernels.support import Support, is_sparse, support_of
from monoloss_plugin.metrics import R2, ClassPurity, MonoScore
from monoloss_plugin.purity import Purity
from monoloss_plugin.results import MEASURES as MEASURES
from monoloss_plugin.results import Evaluation as Evaluation
from monoloss_plugin.results import Spaces

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet


class SAE(Protocol):
    """What an SAE must have. SAELens's classes have it."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Return the latents (B, M) of features (B, d_in); dense, or sparse COO."""
        ...

    def decode(self, latents: Tensor, /) -> Tensor:
        """Return the reconstruction (B, d_in) of latents (B, M)."""
        ...


def evaluate(
    sae: SAE,
    features: Tensor | FeatureSet | Iterable[Batch],
    labels: Tensor | None = None,
    *,
    num_classes: int | None = None,
    embeddings: Tensor | None = None,
    normalize: bool | None = None,
    batch_size: int = 2048,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score an SAE on features, in one pass through the SAE.

    Batches go to the SAE's device one by one, and the sums stay there. So features may be larger
    than an accelerator's memory, and may be memory-mapped. Sparse latents cost little: only active
    entries are summed.

    Save a BatchTopK SAE before you evaluate it, and evaluate what ``SAE.load_from_disk`` gives. In
    training it selects over the batch it is given; SAELens saves a threshold instead, which makes
    other latents active.

    Args:
        sae: anything with ``encode`` and ``decode``, such as a SAELens SAE.
        features: a :class:`~monoloss_plugin.features.FeatureSet`; or (..., d_in) features; or
            batches that bring their own labels and embeddings: a ``FeatureBatches``, or any
            iterable of :class:`~monoloss_plugin.batch.Batch`. Every row is scored once, even if a
            ``FeatureBatches`` shuffles or drops its last batch.
        labels: (N,) integer classes, for purity; -1 for a sample without a class.
        num_classes: number of classes. The default is what batches say of themselves, or one more
            than the largest label.
        embeddings: (N, d), what samples are compared by; by default the features.
        normalize: scale features to unit norm. By default this follows what the SAE says about its
            training (in ``cfg.metadata.monoloss``). If it says nothing, a feature set is scaled,
            and other features are used as they are.
        batch_size: samples per step.
        device: where the SAE computes; by default the device of its parameters, or of the features.
        progress: show a progress bar (needs tqdm).

    Returns:
        Scores of each latent and of the SAE, on the CPU.

    Raises:
        TypeError: not an SAE, features of another kind, features not floating, labels not integer.
        ValueError: shapes that do not match, no samples, NaN or infinite values, labels or
            embeddings given beside batches, or batches of unit norm for an SAE that takes features
            as they are.
        ModuleNotFoundError: ``progress`` without tqdm.

    Warns:
        UserWarning: the SAE is a BatchTopK SAE in training; the features are of a training split;
            the features were scaled because the SAE takes unit norm; R² is negative.

    Examples:
        >>> class Identity:
        ...     def encode(self, x): return x.relu()
        ...     def decode(self, latents): return latents
        >>> evaluate(Identity(), torch.eye(3), torch.tensor([0, 1, 1])).l0
        1.0

    Source: Nasiri-Sarvi et al. 2026, section 4.1 and appendix B; :mod:`monoloss_plugin.chance`.
    """
    require_sae(sae)
    samples = Samples.of(features, labels, embeddings, num_classes, batch_size)
    scale = scaling_for(sae, samples, normalize)
    if selects_over_batches(sae):
        _warn(
            "sae: a BatchTopK SAE in training selects over each batch, so its scores depend on the "
            "batch size. Save it with save_inference_model and evaluate what SAE.load_from_disk "
            "gives: that is what others will use"
        )
    if split := of_training(features):
        _warn(
            f"features: these are of the split {split!r}. If the SAE was trained on them, its "
            "scores are too good; use held-out features"
        )
    place = as_device(device) if device is not None else device_of(sae)
    found, were_scaled = _score(sae, samples, scale, place, progress)
    if scale and not were_scaled and normalize is None and samples.scaling != "wanted":
        _warn(
            "features: scaled to unit norm, because the SAE was trained on unit norm. Pass "
            "normalize=False to use them as they are"
        )
    if found.r2 < 0:
        _warn(
            f"sae: R² is {found.r2:.2f}, worse than the mean of the features would be. Check that "
            "the features are on the scale that the SAE was trained on"
        )
    return found


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)  # shown at the call of evaluate


@torch.no_grad()
def _score(
    sae: SAE, samples: Samples, scale: bool, place: torch.device | None, progress: bool
) -> tuple[Evaluation, bool]:
    """Return the measures, and whether the features came with unit norm."""
    decode, monoscore, r2 = _Decoder(sae), MonoScore(), R2()
    purity: ClassPurity | None = None
    were_scaled = True

    with progress_bar("Evaluating", samples.total, progress) as advance:
        for batch in samples.batches:
            given = as_rows(batch.features, "features")
            require_width(sae, given.shape)
            given = given if place is None else given.to(place)
            require_finite(given, "features")
            if scale:
                were_scaled = were_scaled and is_scaled(given)
                given, _ = unit_rows(given, torch.float32)
            latents = as_rows(sae.encode(given), "sae.encode(features)", keep_sparse=True)
            # Look for the entries once; every measure sums over them.
            found = support_of(latents) if is_sparse(latents) else latents
            r2.update(given, decode(latents, found))
            similarity = given if batch.embeddings is None else batch.embeddings
            monoscore.update(found, as_tensor(similarity, "embeddings").to(given.device))
            if batch.labels is not None:
                if samples.num_classes is None:
                    raise ValueError("num_classes: needed for the purity of batches with labels")
                purity = purity or ClassPurity(samples.num_classes)
                purity.update(
                    *_labelled(found, latents, as_labels(batch.labels).flatten().to(given.device))
                )
            advance(len(given))
    if not r2.n:
        raise ValueError("features: expected at least one sample, got none")
    evaluation = Evaluation(
        monoscore=monoscore.compute().cpu(),
        purity=None if purity is None else Purity(*(of.cpu() for of in purity.compute())),
        r2=r2.compute(),
        spaces=Spaces(samples.compared_by, trained_on(sae)),
        classes=samples.classes,
    )
    return evaluation, were_scaled


def require_sae(sae: Any) -> None:
    """Raise TypeError for anything without ``encode`` and ``decode``."""
    if isinstance(sae, type) or not all(
        callable(getattr(sae, m, None)) for m in ("encode", "decode")
    ):
        hint = "; pass its .sae" if hasattr(sae, "sae") else ""
        raise TypeError(f"sae: expected an SAE with encode and decode, got {kind_of(sae)}{hint}")


def require_width(sae: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError if features of a shape (N, d) are not what the SAE says it takes."""
    d_in = getattr(getattr(sae, "cfg", None), "d_in", None)
    if isinstance(d_in, int) and shape[1] != d_in:
        raise ValueError(f"features: expected (N, {d_in}) for this SAE, got {tuple(shape)}")


def selects_over_batches(sae: SAE) -> bool:
    """Return whether an SAE selects latents over each batch: a BatchTopK SAE in training."""
    architecture = getattr(getattr(sae, "cfg", None), "architecture", None)
    return callable(architecture) and "batchtopk" in str(architecture())


def _labelled(
    found: Tensor | Support, latents: Tensor, labels: Tensor
) -> tuple[Tensor | Support, Tensor]:
    """Return the samples that have a label, which is not -1."""
    unlabelled = labels == -1
    if not bool(unlabelled.any()):
        return found, labels
    dense = latents if latents.layout == torch.strided else latents.to_dense()
    return dense[~unlabelled], labels[~unlabelled]


class _Decoder:
    """Decodes sparse latents from their entries, which is faster, if the SAE's ``decode`` can.

    The first sparse batch is decoded both ways. If the results agree, all later ones are decoded
    sparse.
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
        except Exception:  # a decode that does not know sparse tensors may raise anything
            return False
        if given.layout != expected.layout or given.shape != expected.shape:
            return False
        tolerance = 1e-5 * expected.abs().max()  # with a NaN, no comparison below is true
        return bool(((given - expected).abs() <= tolerance + 1e-4 * expected.abs()).all())


def device_of(sae: SAE) -> torch.device | None:
    """Return the device of a module's parameters; None for anything else."""
    if isinstance(sae, torch.nn.Module):
        for tensor in (*sae.parameters(), *sae.buffers()):
            return tensor.device
    return None


@contextmanager
def progress_bar(title: str, samples: int | None, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Yield a function to call with the number of samples done."""
    if not shown:
        yield lambda _: None
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cli") from error
    with tqdm(total=samples, desc=title, unit=" samples", unit_scale=True) as bar:
        yield bar.update

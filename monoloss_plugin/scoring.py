"""One pass of an SAE over samples, which takes every measure on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_device, as_labels, as_rows, as_tensor, require_finite
from monoloss_plugin._progress import progress_bar
from monoloss_plugin._sae import SAE, device_of, require_width, selects_over_batches
from monoloss_plugin._samples import Samples, is_scaled, of_training, scaling_for, trained_on
from monoloss_plugin.batch import Batch
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.image_scores import EncodedImages, ImageScores
from monoloss_plugin.kernels.support import Support, is_sparse, support_of
from monoloss_plugin.metrics import R2, ClassPurity, MonoScore
from monoloss_plugin.other_saes import as_sae, encoded
from monoloss_plugin.purity import Purity
from monoloss_plugin.results import Evaluation, Spaces
from monoloss_plugin.spatial import ImagesOfBatch

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet


class Encoded(NamedTuple):
    """A batch of B samples, as the SAE saw it."""

    rows: Tensor
    """(B,) int64 on the CPU: the samples' row numbers."""
    features: Tensor
    """(B, d_in), on the SAE's device, as it encoded them."""
    latents: Tensor | Support
    """(B, M), on the SAE's device."""
    embeddings: Tensor
    """(B, d): what the samples are compared by. For patches, their own features."""
    images: EncodedImages | None = None
    """The images whose patches are in the batch; None if samples are no patches."""


class Scoring:
    """The measures of :func:`~monoloss_plugin.evaluation.evaluate`, for one pass.

    Read every one of :meth:`batches`, then call :meth:`evaluation`. Its arguments, errors and
    warnings are those of ``evaluate``.
    """

    images: ImageScores | None
    """The scores of images; None if samples are no patches."""

    def __init__(
        self,
        sae: SAE,
        features: Tensor | FeatureSet | Iterable[Batch],
        labels: Tensor | None = None,
        *,
        num_classes: int | None = None,
        embeddings: Tensor | None = None,
        normalize: bool | None = None,
        batch_size: int = 2048,
        device: torch.device | str | None = None,
    ) -> None:
        self.sae = sae = as_sae(sae)
        self.samples = Samples.of(features, labels, embeddings, num_classes, batch_size)
        self.scaled = scaling_for(sae, self.samples, normalize)
        self.device = as_device(device) if device is not None else device_of(sae)
        self.monoscore, self.r2 = MonoScore(), R2()
        self.purity: ClassPurity | None = None
        self.images = None
        self._say_if_scaled = normalize is None and self.samples.scaling != "wanted"
        if selects_over_batches(sae):
            _warn(
                "sae: a BatchTopK SAE in training selects over each batch, so its scores depend on "
                "the batch size. Save it with save_inference_model and evaluate what "
                "SAE.load_from_disk gives: that is what others will use"
            )
        if split := of_training(features):
            _warn(
                f"features: these are of the split {split!r}. If the SAE was trained on them, its "
                "scores are too good; use held-out features"
            )

    @torch.no_grad()
    def batches(self, title: str, progress: bool) -> Iterator[Encoded]:
        """Encode every batch, add it to the measures, and yield it."""
        decode, seen, samples = _Decoder(self.sae), 0, self.samples
        were_scaled = True
        with progress_bar(title, samples.total, progress) as advance:
            for batch in samples.batches:
                given = as_rows(batch.features, "features")
                require_width(self.sae, given.shape)
                given = given if self.device is None else given.to(self.device)
                require_finite(given, "features")
                if self.scaled:
                    were_scaled = were_scaled and is_scaled(given)
                    given, _ = unit_rows(given, torch.float32)
                latents = encoded(self.sae, given)
                # Look for the entries once; every measure sums over them.
                found = support_of(latents) if is_sparse(latents) else latents
                self.r2.update(given, decode(latents, found))
                similarity = given if batch.embeddings is None else batch.embeddings
                embeddings = as_tensor(similarity, "embeddings").to(given.device)
                labels = None if batch.labels is None else as_labels(batch.labels).flatten()
                if seen and (batch.images is None) != (self.images is None):
                    raise ValueError("images: expected in every batch or in none")
                of_images = None
                if batch.images is None:
                    self.monoscore.update(found, embeddings)
                    self._add_labels(found, labels)
                else:
                    self.images = self.images or ImageScores()
                    images = ImagesOfBatch.of(batch.images, given.device)
                    of_images = self.images.add(found, embeddings, images, batch)
                    self.monoscore.update(found, given, groups=images.of_sample)
                    self._add_labels(
                        of_images.latents,
                        None if labels is None else images.values_of(labels, "labels"),
                    )
                    embeddings = given
                counted = torch.arange(seen, seen + len(given))
                seen += len(given)
                rows = counted if batch.rows is None else batch.rows.flatten()
                yield Encoded(rows, given, found, embeddings, of_images)
                advance(len(given))
        self._say_if_scaled = self._say_if_scaled and self.scaled and not were_scaled

    @property
    def of_images(self) -> MonoScore:
        """MonoScore of images: of those of patches, by their largest activation, or of samples."""
        return self.monoscore if self.images is None else self.images.largest

    def evaluation(self) -> Evaluation:
        """Return the measures of everything that was read, on the CPU.

        Raises:
            ValueError: no samples.
        """
        if not self.r2.n:
            raise ValueError("features: expected at least one sample, got none")
        purity = None if self.purity is None else self.purity.compute()
        samples = self.samples
        compared_by = samples.compared_by if self.images is None else samples.patches_compared_by
        found = Evaluation(
            monoscore=self.monoscore.compute().cpu(),
            purity=None if purity is None else Purity(*(of.cpu() for of in purity)),
            r2=self.r2.compute(),
            spaces=Spaces(compared_by, trained_on(self.sae)),
            classes=self.samples.classes,
            images=None if self.images is None else self.images.measures(),
        )
        if self._say_if_scaled:
            _warn(
                "features: scaled to unit norm, because the SAE was trained on unit norm. Pass "
                "normalize=False to use them as they are"
            )
        if found.r2 < 0:
            _warn(
                f"sae: R² is {found.r2:.2f}, worse than the mean of the features would be. Check "
                "that the features are on the scale that the SAE was trained on"
            )
        return found

    def _add_labels(self, found: Tensor | Support, labels: Tensor | None) -> None:
        if labels is None:
            return
        if self.samples.num_classes is None:
            raise ValueError("num_classes: needed for the purity of batches with labels")
        if self.purity is None:
            self.purity = ClassPurity(self.samples.num_classes)
        self.purity.update(*_labelled(found, labels.to(found.device)))


def _labelled(found: Tensor | Support, labels: Tensor) -> tuple[Tensor | Support, Tensor]:
    """Return the samples that have a label, which is not -1."""
    has_label = labels != -1
    if bool(has_label.all()):
        return found, labels
    known = found.of_samples(has_label) if isinstance(found, Support) else found[has_label]
    return known, labels[has_label]


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


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)  # shown at the call of evaluate

"""Every measure of the papers, from one pass over an SAE's features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from monoloss_plugin._sae import SAE as SAE
from monoloss_plugin.batch import Batch
from monoloss_plugin.results import IMAGE_MEASURES as IMAGE_MEASURES
from monoloss_plugin.results import MEASURES as MEASURES
from monoloss_plugin.results import Evaluation as Evaluation
from monoloss_plugin.results import ImageMeasures as ImageMeasures
from monoloss_plugin.scoring import Scoring

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet


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

    Samples may be patches, of which an image has several: a feature set of patches, or batches with
    ``images``. MonoScore then compares patches of different images, class purity is that of images,
    and ``images`` of the result has what is measured of whole images; see
    :class:`~monoloss_plugin.results.ImageMeasures`.

    Save a BatchTopK SAE before you evaluate it, and evaluate what ``SAE.load_from_disk`` gives. In
    training it selects over the batch it is given; SAELens saves a threshold instead, which makes
    other latents active.

    Args:
        sae: an SAE of SAELens, dictionary_learning, overcomplete (in its eval mode) or sparsify; or
            anything whose ``encode`` and ``decode`` take and return tensors.
        features: a :class:`~monoloss_plugin.features.FeatureSet`; or (..., d_in) features; or
            batches that bring their own labels and embeddings: a ``FeatureBatches``, or any
            iterable of :class:`~monoloss_plugin.batch.Batch`. Every row is scored once, even if a
            ``FeatureBatches`` shuffles or drops its last batch. Rows of a tensor are samples of
            their own: patches (N, P, d) of one image are then compared with each other too. To
            keep them apart, use ``FeatureSet.from_tensors(x, labels)``. In batches with ``images``,
            all patches of an image must be in one batch.
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
        TypeError: not an SAE, or one whose ``encode`` returns no tensor; features of another kind,
            features not floating, labels not integer.
        ValueError: shapes that do not match, no samples, NaN or infinite values, labels or
            embeddings given beside batches, batches of unit norm for an SAE that takes features
            as they are, or patches of an image in two batches.
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
    scoring = Scoring(
        sae,
        features,
        labels,
        num_classes=num_classes,
        embeddings=embeddings,
        normalize=normalize,
        batch_size=batch_size,
        device=device,
    )
    for _ in scoring.batches("Evaluating", progress):
        pass
    return scoring.evaluation()

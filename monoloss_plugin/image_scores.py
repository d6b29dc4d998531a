"""What ``evaluate`` measures of images, from the latents of their patches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from monoloss_plugin.batch import Batch
from monoloss_plugin.kernels.support import Support, support_of
from monoloss_plugin.metrics import MonoScore
from monoloss_plugin.results import ImageMeasures
from monoloss_plugin.spatial import ImagesOfBatch, Spatial, pool


class EncodedImages(NamedTuple):
    """The images of a batch of patches."""

    numbers: Tensor
    """(I,) int64 on the CPU: the images' numbers."""
    latents: Support
    """(I, M), on the SAE's device: the largest activation of an image's samples; not negative."""
    mean: Support
    """(I, M), on the SAE's device: the mean of an image's samples; not negative."""
    embeddings: Tensor
    """(I, d), on the SAE's device: what the images are compared by."""


class ImageScores:
    """The measures of images, from the latents of their patches, for one pass."""

    def __init__(self) -> None:
        self.largest, self.mean = MonoScore(), MonoScore()
        """MonoScore of images whose activation is the largest, or the mean, of their patches."""
        self.spatial = Spatial()
        self._seen: set[int] = set()

    def add(
        self, latents: Tensor | Support, embeddings: Tensor, images: ImagesOfBatch, batch: Batch
    ) -> EncodedImages:
        """Add the images of a batch, and return them.

        An image is compared by the mean of its samples' embeddings: its own, if these are of the
        image; or else the mean of its patches' features.

        Raises:
            ValueError: an image was in an earlier batch, or as :class:`Spatial`.
        """
        numbers = images.numbers.tolist()
        if not self._seen.isdisjoint(numbers):
            again = next(number for number in numbers if number in self._seen)
            raise ValueError(
                f"images: expected all patches of an image in one batch, got image {again} in two"
            )
        self._seen.update(numbers)
        entries = latents if isinstance(latents, Support) else support_of(latents)
        self.spatial.update(entries, images, batch.places, batch.grids)
        pooled, compared_by = pool(entries, images), images.means(embeddings, "embeddings")
        self.largest.update(pooled.largest, compared_by)
        self.mean.update(pooled.mean, compared_by)
        return EncodedImages(images.numbers, pooled.largest, pooled.mean, compared_by)

    def measures(self) -> ImageMeasures:
        """Return the measures of every image that was added, on the CPU."""
        spatial = self.spatial.compute()
        return ImageMeasures(
            largest=self.largest.compute().cpu(),
            mean=self.mean.compute().cpu(),
            coherence=spatial.coherence.cpu(),
            extent=spatial.extent.cpu(),
        )

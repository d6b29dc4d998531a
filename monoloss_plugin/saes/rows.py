"""The samples of a tensor or a feature set, on the scale that an SAE takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows, require_finite
from monoloss_plugin._places import kind_of
from monoloss_plugin._sae import device_of, require_sae, require_width
from monoloss_plugin._samples import Samples, scaling_for
from monoloss_plugin.batch import Batch
from monoloss_plugin.embeddings import unit_rows

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

BATCH = 2048


@dataclass(frozen=True)
class Rows:
    """N samples of width d, which can be read several times and by their numbers."""

    features: Tensor | FeatureSet
    unit_norm: bool
    """Whether to scale each sample to unit norm, as ``evaluate`` does."""
    device: torch.device | None = None
    """Where to put what is read; by default where it is."""

    @classmethod
    def of(cls, features: Any, unit_norm: bool, device: torch.device | None = None) -> Rows:
        """Check features and return their rows.

        Raises:
            TypeError: neither a feature set nor a floating-point tensor.
            ValueError: there are no samples.
        """
        is_set = hasattr(features, "every_row") and hasattr(features, "take")
        if not is_set and not (
            isinstance(features, (Tensor, list)) or hasattr(features, "__array_interface__")
        ):
            raise TypeError(f"features: expected a tensor or a FeatureSet, got {kind_of(features)}")
        rows = cls(features if is_set else as_rows(features, "features"), unit_norm, device)
        if not len(rows):
            raise ValueError("features: expected at least one sample, got none")
        return rows

    @classmethod
    def for_sae(cls, sae: Any, features: Any, normalize: bool | None) -> Rows:
        """Return rows on the device and the scale that ``evaluate`` would choose for an SAE.

        Raises:
            TypeError: not an SAE; as :meth:`of`; or ``normalize`` is not a bool.
            ValueError: as :meth:`of`, or the SAE takes features of another width.
        """
        require_sae(sae)
        rows = cls.of(features, False, device_of(sae))
        require_width(sae, (len(rows), rows.width))
        samples = Samples.of(features, None, None, None, BATCH)
        return cls(rows.features, scaling_for(sae, samples, normalize), rows.device)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        """The length d of a sample."""
        held = self.features
        return held.shape[1] if isinstance(held, Tensor) else held.width

    def take(self, numbers: Tensor) -> Tensor:
        """Return the samples of some row numbers (B,) as (B, d), float32 or wider.

        Raises:
            ValueError: NaN or infinite values.
        """
        held = self.features
        return self._prepared(
            held[numbers.to(held.device)] if isinstance(held, Tensor) else held.take(numbers)
        )

    def _prepared(self, x: Tensor) -> Tensor:
        x = x.to(self.device, torch.promote_types(x.dtype, torch.float32))
        require_finite(x, "features")
        return unit_rows(x, torch.float32)[0] if self.unit_norm else x

    def batches(self) -> Iterator[Tensor]:
        """Yield every sample once, in order, as (B, d)."""
        for numbers in torch.arange(len(self)).split(BATCH):
            yield self.take(numbers)

    def samples(self) -> Iterator[Batch]:
        """Yield every sample once, in order, with its row number. No image's patches are cut.

        Features are as :meth:`take` gives them.
        """
        held = self.features
        if isinstance(held, Tensor):
            for numbers in torch.arange(len(self)).split(BATCH):
                yield Batch(self.take(numbers), rows=numbers)
        else:
            for batch in held.every_row(BATCH):
                yield batch._replace(features=self._prepared(batch.features))

    def sample(self, most: int, seed: int) -> Tensor:
        """Return at most so many samples, each at most once: all in order, or a random choice."""
        if len(self) <= most:
            return self.take(torch.arange(len(self)))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:most])

    def mean(self) -> Tensor:
        """Return the mean of the samples (d,), float64."""
        return torch.stack([x.double().sum(0) for x in self.batches()]).sum(0) / len(self)


def require_samples(rows: Rows, num_latents: int) -> None:
    """Raise ValueError unless there is a sample for each latent."""
    if len(rows) < num_latents:
        raise ValueError(
            f"features: expected at least {num_latents} samples, one for each latent, got "
            f"{len(rows)}"
        )

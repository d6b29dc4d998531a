"""Embeddings beside the samples that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet


def aligned_embeddings(features: FeatureSet, image_ids: Sequence[str]) -> Tensor:
    """Return the features of images in the order of their ids.

    Args:
        features: a set with ``image_id``, such as ``extract`` makes with the frozen encoder.
        image_ids: one for each sample of the data to train on.

    Returns:
        (N, d) in float32.

    Raises:
        ValueError: a set without ids, an id that it does not have, or one that it has twice.
    """
    if features.ids is None:
        raise ValueError("features: the set has no image_id to find images by")
    rows: dict[str, int] = {}
    for row, image_id in enumerate(features.ids.to_pylist()):
        if image_id in rows:
            raise ValueError(f"features: the image_id {image_id!r} occurs twice")
        rows[image_id] = row
    missing = [str(one) for one in image_ids if str(one) not in rows]
    if missing:
        raise ValueError(
            f"image_ids: {len(missing)} of {len(image_ids)} images have no features, such as "
            f"{missing[0]!r}; the set has ids such as {next(iter(rows), None)!r}"
        )
    numbers = torch.tensor([rows[str(one)] for one in image_ids], dtype=torch.int64)
    return features.take(numbers).float()


class WithEmbeddings(Dataset[Any]):
    """A map-style dataset whose samples bring their embeddings along.

    Whatever shuffles, splits or drops samples, an embedding stays with its image.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, of tuples or dicts.
        embeddings: (N, d), one row a sample.
        key: name of the embeddings in samples that are dicts; to tuples they are appended.

    Raises:
        TypeError: embeddings that are not floating.
        ValueError: another number of rows than samples.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(4, 3, 8, 8), torch.arange(4)
        >>> data = WithEmbeddings(TensorDataset(images, labels), torch.eye(4))
        >>> image, label, embedding = data[2]
        >>> embedding
        tensor([0., 0., 1., 0.])
    """

    def __init__(self, dataset: Any, embeddings: Tensor, key: str = "embeddings") -> None:
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            raise TypeError("embeddings: expected a floating-point tensor (N, d)")
        if embeddings.ndim != 2 or len(embeddings) != len(dataset):
            raise ValueError(
                f"embeddings: expected ({len(dataset)}, d), one row a sample, got "
                f"{tuple(embeddings.shape)}"
            )
        self.dataset, self.embeddings, self.key = dataset, embeddings, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, dict):
            return {**sample, self.key: self.embeddings[index]}
        return (*sample, self.embeddings[index])


def frozen(encoder: Any) -> Callable[[Any], Tensor]:
    """Return a callable that gives embeddings without gradients, and is never trained."""
    if isinstance(encoder, torch.nn.Module):
        encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(inputs: Any) -> Tensor:
        if isinstance(encoder, torch.nn.Module):
            encoder.eval()  # a host's model.train() may have reached it
            if isinstance(inputs, Tensor):
                encoder.to(inputs.device)
        found: Tensor = encoder(inputs)
        return found

    return embed

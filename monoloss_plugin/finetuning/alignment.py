"""Embeddings beside the samples that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from monoloss_plugin._checks import as_tensor

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet


def aligned_embeddings(
    features: FeatureSet, ids: Iterable[str], *, split: str | None = None
) -> Tensor:
    """Return the features of images in the order of their ids.

    Args:
        features: a set with ``image_id``, such as ``extract`` makes with the frozen encoder.
        ids: one for each sample of the data to train on.
        split: the split that the samples are of. Images of another may have the same ids, such as
            ``cat/001.png``; features of another are refused.

    Returns:
        (N, d) in float32.

    Raises:
        TypeError: not a feature set, or ids that are not a list.
        ValueError: features of another split, a set without ids, an id that it does not have, or
            one that it has twice.
    """
    if isinstance(features, type) or not (hasattr(features, "ids") and hasattr(features, "take")):
        raise TypeError(
            "features: expected a feature set, such as load_features gives, got "
            f"{type(features).__name__}"
        )
    if isinstance(ids, (str, bytes, type, Tensor)) or not isinstance(ids, Iterable):
        raise TypeError(f"ids: expected a list of ids, got {type(ids).__name__}")
    wanted = [str(one) for one in ids]
    source = features.record.source
    if split is not None and source and split not in (source.get("split"), source.get("name")):
        raise ValueError(
            f"features: expected those of split {split!r}, got features of {source.get('name')} "
            f"(split {source.get('split')}), whose images may have the same ids"
        )
    if features.ids is None:
        raise ValueError("features: the set has no image_id to find images by")
    rows: dict[str, int] = {}
    for row, image_id in enumerate(features.ids.to_pylist()):
        if image_id in rows:
            raise ValueError(f"features: the image_id {image_id!r} occurs twice")
        rows[image_id] = row
    missing = [one for one in wanted if one not in rows]
    if missing:
        raise ValueError(
            f"ids: {len(missing)} of {len(wanted)} images have no features, such as "
            f"{missing[0]!r}; the set has ids such as {next(iter(rows), None)!r}"
        )
    numbers = torch.tensor([rows[one] for one in wanted], dtype=torch.int64)
    return features.take(numbers).float()


class WithEmbeddings(Dataset[Any]):
    """A map-style dataset whose samples bring their embeddings along.

    Whatever shuffles, splits or drops samples, an embedding stays with its image.

    Args:
        dataset: with ``__len__`` and ``__getitem__``, of tuples or dicts.
        embeddings: (N, d), one row a sample, of floating-point numbers.
        key: name of the embeddings in samples that are dicts; to tuples they are appended.

    Raises:
        TypeError: another kind of dataset, or embeddings that are not floating.
        ValueError: another number of rows than samples.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(4, 3, 8, 8), torch.arange(4)
        >>> data = WithEmbeddings(TensorDataset(images, labels), torch.eye(4))
        >>> image, label, embedding = data[2]
        >>> embedding
        tensor([0., 0., 1., 0.])
    """

    def __init__(self, dataset: Any, embeddings: Any, key: str = "embeddings") -> None:
        sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if (
            not sized
            or isinstance(dataset, (str, bytes, type))
            or getattr(dataset, "shape", 1) == ()
        ):
            raise TypeError(
                f"dataset: expected one with __len__ and __getitem__, got {type(dataset).__name__}"
            )
        if not isinstance(key, str) or not key:
            raise TypeError(f"key: expected a name, got {key!r}")
        embeddings = as_tensor(embeddings, "embeddings")
        if not embeddings.is_floating_point():
            raise TypeError(
                f"embeddings: expected floating-point numbers (N, d), got {embeddings.dtype}"
            )
        if embeddings.ndim != 2 or len(embeddings) != len(dataset):
            raise ValueError(
                f"embeddings: expected ({len(dataset)}, d), one row a sample, got "
                f"{tuple(embeddings.shape)}"
            )
        self.dataset, self.embeddings, self.key = dataset, embeddings.detach(), key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise ValueError(f"key: samples have {self.key!r} already; give another name")
            return {**sample, self.key: self.embeddings[index]}
        if isinstance(sample, (tuple, list)):
            return (*sample, self.embeddings[index])
        raise TypeError(
            f"dataset: expected samples that are tuples or dicts, got {type(sample).__name__}"
        )


class Frozen:
    """Gives embeddings without gradients; a module is never trained.

    Args:
        encoder: from what it is given to (B, d).
        model: what is trained, which must not be the encoder too.

    Raises:
        ValueError: encoder and model share parameters.
    """

    def __init__(self, encoder: Callable[[Any], Any], model: torch.nn.Module | None) -> None:
        self.encoder = encoder
        if isinstance(encoder, torch.nn.Module):
            trained = set() if model is None else {id(p) for p in model.parameters()}
            if any(id(parameter) in trained for parameter in encoder.parameters()):
                raise ValueError(
                    "embeddings: the encoder shares parameters with the model in training; "
                    "give a copy"
                )
            encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Any:
        """Return the embeddings (B, d), as the encoder gives them."""
        if isinstance(self.encoder, torch.nn.Module):
            self.encoder.eval()  # a host's model.train() may have reached it
            if isinstance(inputs, Tensor):
                self.encoder.to(inputs.device)
        return self.encoder(inputs)

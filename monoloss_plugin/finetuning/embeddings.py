"""Embeddings of the samples that a model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from monoloss_plugin._checks import as_rows

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet


def aligned_embeddings(
    features: FeatureSet, ids: Iterable[str], *, split: str | None = None
) -> Tensor:
    """Return the features of images in the order of their ids.

    Args:
        features: a set with ``image_id``, such as ``extract`` makes with the frozen encoder.
        ids: one id for each sample of your training data.
        split: the split of your training data. Images of different splits may have the same ids,
            such as ``cat/001.png``, so features of another split are refused.

    Returns:
        (N, d) in float32.

    Raises:
        TypeError: ``features`` is not a feature set, or ``ids`` is not a list.
        ValueError: the features are of another split or have no ids, or an id is missing or occurs
            twice.
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
    return getattr(features, "images", features).take(numbers).float()


class WithEmbeddings(Dataset[Any]):
    """A map-style dataset that adds its embedding to each sample.

    The embedding stays with its image, whatever shuffles, splits or drops samples.

    Args:
        dataset: an object with ``__len__`` and ``__getitem__``; its samples are tuples or dicts.
        embeddings: (N, d), floating-point, one row for each sample.
        key: the embedding's key in samples that are dicts. To a tuple it is appended.

    Raises:
        TypeError: the dataset has the wrong type, or the embeddings are not floating-point.
        ValueError: the embeddings do not have one row for each sample.

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
        scalar = getattr(dataset, "shape", None) == ()
        if not sized or scalar or isinstance(dataset, (str, bytes, type)):
            raise TypeError(
                f"dataset: expected one with __len__ and __getitem__, got {type(dataset).__name__}"
            )
        if not isinstance(key, str) or not key:
            raise TypeError(f"key: expected a name, got {key!r}")
        embeddings = as_rows(embeddings, "embeddings")
        if len(embeddings) != len(dataset):
            raise ValueError(
                f"embeddings: expected ({len(dataset)}, d), one row for each sample, got "
                f"{tuple(embeddings.shape)}"
            )
        self.dataset, self.embeddings, self.key = dataset, embeddings, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise ValueError(f"key: samples already have {self.key!r}; give another key")
            return {**sample, self.key: self.embeddings[index]}
        if isinstance(sample, (tuple, list)):
            return (*sample, self.embeddings[index])
        raise TypeError(
            f"dataset: expected samples that are tuples or dicts, got {type(sample).__name__}"
        )


@dataclass(frozen=True)
class Column:
    """Takes the embeddings, or a frozen encoder's input, out of a batch that is a dict."""

    key: str
    hint: str = ""
    """What to do if the batch lacks it, for the error."""

    def __call__(self, batch: Any) -> Any:
        """Return what the batch has under the key, or raise ValueError."""
        if isinstance(batch, Mapping) and self.key in batch:
            return batch[self.key]
        named = isinstance(batch, Mapping)
        got = f"has {', '.join(map(str, batch))}" if named else f"is a {type(batch).__name__}"
        raise ValueError(f"embeddings: the batch has no column {self.key!r}; it {got}{self.hint}")


class Frozen:
    """Calls an encoder without gradients. A module is put in eval mode and never trained.

    ``takes`` finds the encoder's input in a batch; by default the encoder gets the batch itself.
    """

    def __init__(
        self,
        encoder: Callable[[Any], Any],
        model: nn.Module | None = None,
        takes: Column | None = None,
    ) -> None:
        self.encoder, self.takes = encoder, takes
        if isinstance(encoder, nn.Module):
            trained = set() if model is None else {id(p) for p in model.parameters()}
            if any(id(parameter) in trained for parameter in encoder.parameters()):
                raise ValueError(
                    "embeddings: the encoder shares parameters with the model in training; "
                    "give a copy"
                )
            encoder.eval().requires_grad_(False)

    def __deepcopy__(self, _: Any) -> Frozen:
        # A copy of a host's object shares the encoder: it may be large, and it never changes.
        return self

    @torch.no_grad()
    def __call__(self, batch: Any) -> Any:
        """Return the embeddings (B, d), as the encoder gives them."""
        inputs = batch if self.takes is None else self.takes(batch)
        if isinstance(self.encoder, nn.Module):
            self.encoder.eval()  # the host's model.train() may have reached it
            if isinstance(inputs, Tensor):
                self.encoder.to(inputs.device)
        return self.encoder(inputs)

"""Fine-tune a pretrained timm model on photographs, with a loss term on its latents or without.

timm has the task, the optimizer, the schedule and the augmentation; here they meet the photographs
and their embeddings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.finetuning import (
    LatentRecorder,
    WithEmbeddings,
    aligned_embeddings,
    insert_mono_layer,
)
from monoloss_plugin.losses import LossTerm
from monoloss_plugin.metrics import MonoScore

try:
    from datasets import IterableDataset
    from timm.data.transforms_factory import create_transform
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # no __all__
    from timm.scheduler.scheduler_factory import create_scheduler_v2
    from timm.task import ClassificationTask
    from timm.utils.random import random_seed

    from monoloss_plugin.adapters.timm import add_loss
    from monoloss_plugin.features.encoders import Encoder, load_encoder
    from monoloss_plugin.features.images import decode
    from monoloss_plugin.features.sources import Source
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

if TYPE_CHECKING:
    from monoloss_plugin.reproduce.table2 import Scale

_CROP = (0.7, 1.0)
"""Share of an image that a crop for training keeps. Its embedding is of the whole image, so that a
smaller crop may not show what the embedding says."""
_CURVE = 101
"""Points of a curve over latents that a run keeps."""


class Photographs(NamedTuple):
    """Images of a source, and what encoders make of each."""

    source: Source
    rows: list[int]
    """(N,) numbers in the source."""
    labels: list[int]
    """(N,) of these images."""
    embeddings: dict[str, Tensor]
    """(N, d) by the name of their encoder."""

    def with_embeddings(
        self, transform: Callable[[Any], Tensor], mode: str, *given: Tensor
    ) -> Dataset[Any]:
        """Return the images, their labels, and each of the embeddings (N, d) that are given."""
        data: Any = _Images(self, transform, mode)
        for embeddings in given:
            data = WithEmbeddings(data, embeddings)
        return data  # type: ignore[no-any-return]


class _Images(Dataset[tuple[Tensor, int]]):
    """The photographs as tensors, with their labels."""

    def __init__(self, of: Photographs, transform: Callable[[Any], Tensor], mode: str) -> None:
        self.of, self.transform, self.mode = of, transform, mode

    def __len__(self) -> int:
        return len(self.of.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.of.source[self.of.rows[index]]
        return self.transform(decode(row, self.mode)), self.of.labels[index]


def choose_photographs(
    source: Source, features: Mapping[str, FeatureSet], count: int | None
) -> Photographs:
    """Choose labelled images at random, the same in each call, and find their embeddings.

    Args:
        source: of images, some with labels.
        features: of these images, by the name of their encoder.
        count: how many images; None for all of them.

    Raises:
        TypeError: the source is a stream.
        ValueError: images have no labels, or there are no features of an image.
    """
    ids, labels = source.ids(), _labels(source)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    found = [(row, label) for row in order if (label := labels[row]) is not None and label >= 0]
    found = found[:count]
    chosen, split = [ids[row] for row, _ in found], source.record.get("split")
    return Photographs(
        source,
        [row for row, _ in found],
        [label for _, label in found],
        {name: aligned_embeddings(one, chosen, split=split) for name, one in features.items()},
    )


def number_of_classes(source: Source) -> int:
    """Return how many classes the labels of a source have.

    Raises:
        TypeError: the source is a stream.
        ValueError: images have no labels.
    """
    labels = _labels(source)
    if source.classes is not None:
        return len(source.classes)
    return 1 + max(label for label in labels if label is not None)


def _labels(source: Source) -> list[int | None]:
    """Return the label of every image; None or -1 where there is none."""
    if isinstance(source.rows, IterableDataset):
        raise TypeError("images: expected a source with rows by number, got a stream")
    if source.label is None:
        raise ValueError("images: expected labels to fine-tune a classifier on, got none")
    labels: list[int | None] = source.rows[source.label][:]
    return labels


def embeddings_of_others(embeddings: Tensor, seed: int) -> Tensor:
    """Return the embeddings (N, d) of other images: no image keeps its own.

    They are dealt out at random: in a random order of the images, each gets that of the one before.
    """
    order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))
    dealt = torch.empty_like(embeddings)
    dealt[order] = embeddings[order.roll(1)]
    return dealt


def load_model(scale: Scale, num_classes: int, seed: int) -> Encoder:
    """Load the pretrained model, with a new head and a MonoLayer before it, to be trained."""
    random_seed(seed)
    encoder = load_encoder(scale.encoder, image_size=scale.image_size)
    model: Any = encoder.model
    model.reset_classifier(num_classes)
    insert_mono_layer(model.requires_grad_(True), relu=True)
    return encoder


def fine_tune(
    encoder: Encoder,
    photographs: Photographs,
    embeddings: Tensor,
    loss: LossTerm | None,
    scale: Scale,
    device: str,
) -> list[float]:
    """Fine-tune a model, and return the seconds that each epoch took.

    Args:
        encoder: from :func:`load_model`.
        photographs: to train on.
        embeddings: (N, d) of the photographs, for the loss term.
        loss: the term beside the cross entropy; None for none.
        scale: says how.
        device: where.

    Raises:
        ValueError: there are fewer photographs than a batch has.
    """
    transform = create_transform(
        **encoder.record["preprocessing"], is_training=True, scale=_CROP, color_jitter=0.0
    )
    data = photographs.with_embeddings(transform, encoder.mode, embeddings)
    batches = _loader(data, scale, device, train=True)
    if not len(batches):
        raise ValueError(
            f"images: expected at least {scale.batch_size}, a batch, got {len(photographs.rows)}"
        )
    model = _to(encoder.model, device)
    task = ClassificationTask(model, device=torch.device(device), verbose=False)
    if loss is not None:
        add_loss(task, loss)
    optimizer = create_optimizer_v2(
        model, "sgd", lr=scale.lr, momentum=0.9, weight_decay=scale.weight_decay
    )
    schedule, epochs = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=scale.epochs,
        warmup_epochs=scale.warm_up_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    assert schedule is not None
    model.train()
    updates, seconds = 0, []
    for _ in range(epochs):
        started = time.perf_counter()
        for images, labels, h in batches:
            given = {} if loss is None else {"embeddings": h.to(device)}
            of_step = task(_to(images, device), labels.to(device), **given)
            of_step["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            schedule.step_update(updates)
        of_step["loss"].item()  # once this is known, a GPU has done its work
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def measure_model(
    encoder: Encoder, photographs: Photographs, scale: Scale, device: str
) -> dict[str, Any]:
    """Measure a model and its latents on photographs, in the space of each of their embeddings.

    Returns:
        ``accuracy``, a share; ``num_latents``; ``dead``, the number of latents that no image
        activates; ``images``, the number of images that activate the median latent; ``active``,
        the shares of the images that activate a latent, in decreasing order, at even ranks; and for
        each space in ``spaces`` the mean MonoScore (``monoscore``), its mean above chance
        (``adjusted``), the level of ``chance`` and the ``curve`` of scores, in decreasing order.
    """
    model = _to(encoder.model, device).eval()
    spaces = photographs.embeddings
    data = photographs.with_embeddings(encoder.preprocess, encoder.mode, *spaces.values())
    scores = {space: MonoScore() for space in spaces}
    right = 0
    with LatentRecorder(model) as recorder:
        for images, labels, *given in _loader(data, scale, device):
            right += int((model(_to(images, device)).argmax(1).cpu() == labels).sum())
            latents = recorder.take()
            for score, h in zip(scores.values(), given, strict=True):
                score.update(latents, h.to(device))
    found = {space: score.compute().cpu() for space, score in scores.items()}
    support = next(iter(found.values())).support
    return {
        "accuracy": right / len(photographs.rows),
        "num_latents": len(support),
        "dead": int((support == 0).sum()),
        "images": int(support.median()),
        "active": _points(support.sort(descending=True).values / len(photographs.rows)),
        "spaces": {
            space: {
                "monoscore": one.mean,
                "adjusted": one.mean_adjusted if one.num_defined else None,
                "chance": one.chance,
                "curve": _points(one.curve()),
            }
            for space, one in found.items()
        },
    }


def _points(curve: Tensor) -> list[float]:
    """Return the values at even ranks of a curve over latents (M,)."""
    ranks = torch.linspace(0, len(curve) - 1, min(len(curve), _CURVE)).round().long()
    return [round(value, 5) for value in curve[ranks].tolist()]


def _loader(
    data: Dataset[Any], scale: Scale, device: str, *, train: bool = False
) -> DataLoader[Any]:
    # A model on the CPU needs the cores itself.
    workers = 0 if device == "cpu" else min(16, os.cpu_count() or 1)
    return DataLoader(
        data,
        batch_size=scale.batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device != "cpu",
    )


def _to(one: Any, device: str) -> Any:
    """Move a model or images; in this layout, convolutions on a CPU take two thirds of the time."""
    return one.to(device, memory_format=torch.channels_last)

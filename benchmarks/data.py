"""Activations of a BatchTopK SAE's shape and the features they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monoloss_plugin.reproduce.synthetic import clustered_features


@dataclass(frozen=True)
class Shape:
    """Sizes of an SAE and its batches; by default the MonoLoss paper's."""

    batch: int = 2048
    width: int = 768
    latents: int = 8192
    k: int = 64


def features(rows: int, shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """Return unit vectors (rows, width) around a hundred directions, as an encoder's would be."""
    return clustered_features(rows, shape.width, seed).to(device)


def activations(x: Tensor, shape: Shape, seed: int = 1) -> Tensor:
    """Return what a random BatchTopK encoder makes of features: (rows, latents), k a row."""
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randn(shape.width, shape.latents, generator=generator).to(x.device)
    parts = []
    for rows in x.split(shape.batch):
        pre = (rows @ encoder).relu_()
        kept = pre.flatten().topk(shape.k * len(rows), sorted=False)
        flat = torch.zeros_like(pre).flatten()
        parts.append(flat.scatter_(0, kept.indices, kept.values).view_as(pre))
    return torch.cat(parts)

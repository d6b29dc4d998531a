"""What an SAE must be, and what it says about itself."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from monoloss_plugin._places import kind_of


class SAE(Protocol):
    """What an SAE must have. SAELens's classes have it."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Return the latents (B, M) of features (B, d_in); dense, or sparse COO."""
        ...

    def decode(self, latents: Tensor, /) -> Tensor:
        """Return the reconstruction (B, d_in) of latents (B, M)."""
        ...


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


def device_of(sae: SAE) -> torch.device | None:
    """Return the device of a module's parameters; None for anything else."""
    if isinstance(sae, torch.nn.Module):
        for tensor in (*sae.parameters(), *sae.buffers()):
            return tensor.device
    return None

"""What a conversion must keep: latents and reconstruction, on real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sklearn.datasets import load_digits
from torch import Tensor

from monoloss_plugin import load_pretrained

WIDTH, LATENTS = 64, 48


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """(1797, 64) images of unit norm."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    return torch.nn.functional.normalize(pixels, dim=1)


@pytest.fixture
def assert_same(tmp_path: Path) -> Callable[[SAE, Tensor, Tensor, Tensor], None]:
    """Compare a converted SAE, before and after publishing, with what its source gives."""

    def compare(sae: SAE, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
        assert 0 < int((latents > 0).sum()) < latents.numel()
        folder = tmp_path / "published"
        sae.save_model(folder / "one")
        for one in (sae, load_pretrained(folder).sae):
            found = one.encode(x)
            assert torch.equal(found > 0, latents > 0)
            assert (found - latents).abs().max() <= 1e-5 * max(1.0, float(latents.abs().max()))
            difference = (one.decode(found) - reconstruction).abs().max()
            assert difference <= 1e-5 * max(1.0, float(reconstruction.abs().max()))

    return compare

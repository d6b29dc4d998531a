"""Fixtures for every test."""

from __future__ import annotations

import pytest
from torch import Tensor

from monoloss_plugin.kernels import support
from tests import oracle


@pytest.fixture
def embeddings() -> Tensor:
    """(40, 7) for the cases of the oracle."""
    return oracle.embeddings_with_a_zero()


@pytest.fixture(params=["dense", "sparse"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take dense latents the one way or the other, whatever their density."""
    monkeypatch.setattr(support, "SPARSE_BELOW", {"dense": -1.0, "sparse": 1.0}[request.param])
    return str(request.param)

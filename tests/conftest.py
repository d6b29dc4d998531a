"""Fixtures for every test."""

from __future__ import annotations

import pytest

from monoloss_plugin.kernels import support


@pytest.fixture(params=["dense", "sparse"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take dense latents the one way or the other, whatever their density."""
    monkeypatch.setattr(support, "SPARSE_BELOW", {"dense": -1.0, "sparse": 1.0}[request.param])
    return str(request.param)

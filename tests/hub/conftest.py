"""The clients as a user has them: logged in, with a cache of their own, never waiting long."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from tests.hub.server import OWNER_TOKEN, LoopbackHub


@pytest.fixture(autouse=True)
def _as_alice(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    use_cache(monkeypatch, tmp_path / "cache")
    # The client's own retries, without their waits.
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give the clients another cache, which is empty if the folder is new."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))

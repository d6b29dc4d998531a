"""Fixtures for every test."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from tests.hub.environment import only_hub
from tests.hub.server import LoopbackHub

# Processes that share the cores would wait for each other's threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The Hub's clients read these when they are imported: every test sees a Hub on loopback alone, and
# a cache of its own.
_HUB = LoopbackHub()
_HUB.start()
_HOME = tempfile.TemporaryDirectory(prefix="monoloss-tests-", ignore_cleanup_errors=True)
only_hub(_HUB.url, _HOME.name)

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from monoloss_plugin.kernels import support  # noqa: E402
from tests import oracle  # noqa: E402

# Its kernels are for GPUs, and it asks for them wherever triton is installed.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

# They run in environments of their own: python -m tests.hosts.
collect_ignore = [] if Path(sys.prefix).parent.name == "hosts" else ["hosts"]

_SLOW = (
    "tests/adapters/test_transformers.py",
    "tests/e2e/",
    "tests/features/test_commands.py",
    "tests/features/test_extraction.py",
    "tests/features/test_store.py",
    "tests/finetuning/test_gathering.py",
    "tests/hub/test_saes.py",
    "tests/report/test_page.py",
    "tests/report/test_report.py",
    "tests/reproduce/test_experiments.py",
    "tests/test_arguments.py",
    "tests/test_documents.py",
    "tests/test_package.py",
    "tests/test_torchmetrics.py",
)
"""Tests that ``make check`` leaves out, beside those that are marked one by one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(_SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers in every run: a test that fails can be run again."""
    torch.manual_seed(0)


@pytest.fixture
def hub() -> LoopbackHub:
    """The Hub on loopback, with nothing in it."""
    _HUB.reset()
    return _HUB


@pytest.fixture
def free_port() -> int:
    """A port for processes to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def embeddings() -> Tensor:
    """(40, 7) for the cases of the oracle."""
    return oracle.embeddings_with_a_zero()


@pytest.fixture(params=["dense", "sparse"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take dense latents the one way or the other, whatever their density."""
    monkeypatch.setattr(support, "SPARSE_BELOW", {"dense": -1.0, "sparse": 1.0}[request.param])
    return str(request.param)

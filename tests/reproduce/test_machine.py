"""What measurements were made on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from monoloss_plugin import __version__
from monoloss_plugin.reproduce import machine as module
from monoloss_plugin.reproduce.machine import machine


def test_the_machine_is_named_with_its_threads_and_versions() -> None:
    named = json.loads(json.dumps(machine("cpu")))
    assert named["device"] == named["cpu"] != ""
    assert named["threads"] == torch.get_num_threads()
    assert named["torch"] == torch.__version__
    assert named["monoloss_plugin"] == __version__


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_the_cpu_has_the_name_that_the_system_gives_it() -> None:
    assert machine("cpu")["cpu"] in Path("/proc/cpuinfo").read_text()


def test_a_library_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(library: str) -> str:
        raise module.PackageNotFoundError(library)

    monkeypatch.setattr(module, "version", version)
    assert "sae-lens" not in machine("cpu")

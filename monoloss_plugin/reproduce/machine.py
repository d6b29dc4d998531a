"""What measurements were made on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from monoloss_plugin import __version__


def machine(device: str) -> dict[str, Any]:
    """Return the names of the device and the CPU, the number of threads, and the versions.

    The number of threads is torch's: how many it computes with on the CPU.
    """
    cpu = _cpu()
    found = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "torch": torch.__version__,
        "sae-lens": _version("sae-lens"),
        "monoloss_plugin": __version__,
    }
    return {name: value for name, value in found.items() if value is not None}


def _cpu() -> str:
    """Return the CPU's name; Python's own ``platform`` does not know it on Linux."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None

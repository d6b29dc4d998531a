"""How much a benchmark runs, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.data import Shape

Found = dict[str, Any]
"""What a case saw: ``says``, a line of it, ``target`` and the figures."""


@dataclass(frozen=True)
class Setting:
    """How much to run, and where."""

    device: torch.device
    full: bool
    shape: Shape

    def rounds(self, quick: int, full: int) -> int:
        return full if self.full else quick

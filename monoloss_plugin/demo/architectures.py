"""The SAE architectures of the demo. This module imports nothing, so that the command is quick."""

from __future__ import annotations

from typing import Any

NUM_LATENTS = 256
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": 8},
    "topk": {"k": 8},
    "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [64, NUM_LATENTS]},
    "jumprelu": {"jumprelu_sparsity_loss_mode": "step", "l0_coefficient": 0.01},
    "standard": {"l1_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.05},
}
"""For each of SAELens's architectures the settings that suit the demo's features."""

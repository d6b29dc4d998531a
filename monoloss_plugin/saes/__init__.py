"""What you do to an SAE beside training it: baselines, another selection, another decoder.

Baselines need the extras ``sae-lens`` and ``referee``; they are imported when you first ask for
them. The rest needs torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin._later import later
from monoloss_plugin.saes.decoder import Decoder, ridge_decoder
from monoloss_plugin.saes.initialise import init_from_data
from monoloss_plugin.saes.refit import Refit, refit_decoder
from monoloss_plugin.saes.selection import (
    Reselected,
    effective_latents,
    k_robustness,
    pre_activations,
    with_k,
    with_l0,
)

if TYPE_CHECKING:
    from monoloss_plugin.saes.baselines import BASELINES, make_baseline

__all__ = [
    "BASELINES",
    "Decoder",
    "Refit",
    "Reselected",
    "effective_latents",
    "init_from_data",
    "k_robustness",
    "make_baseline",
    "pre_activations",
    "refit_decoder",
    "ridge_decoder",
    "with_k",
    "with_l0",
]

__getattr__, __dir__ = later(__name__, {"BASELINES": "baselines", "make_baseline": "baselines"})

"""Vision features: from images to a feature set, and from a feature set to training batches.

To open feature sets and read batches from them, install the extra ``hub``. :func:`extract` needs
``vision``; it is imported when you first ask for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin._later import later
from monoloss_plugin._optional import missing_extra

try:  # the modules below import what they need; what is missing is said here
    from monoloss_plugin.features.batches import FeatureBatches
    from monoloss_plugin.features.feature_set import FeatureSet
    from monoloss_plugin.features.patches import Patches
    from monoloss_plugin.features.record import FeatureRecord
    from monoloss_plugin.features.store import SettingsError, verify
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

if TYPE_CHECKING:
    from monoloss_plugin.features.encoders import (
        Encoder,
        PatchTokens,
        TextEncoder,
        load_encoder,
        load_text_encoder,
    )
    from monoloss_plugin.features.extraction import Extraction, TooManyUnreadableError, extract
    from monoloss_plugin.features.sources import Source, open_source

__all__ = [
    "Encoder",
    "Extraction",
    "FeatureBatches",
    "FeatureRecord",
    "FeatureSet",
    "PatchTokens",
    "Patches",
    "SettingsError",
    "Source",
    "TextEncoder",
    "TooManyUnreadableError",
    "extract",
    "load_encoder",
    "load_text_encoder",
    "open_source",
    "verify",
]

__getattr__, __dir__ = later(
    __name__,
    {
        "Encoder": "encoders",
        "Extraction": "extraction",
        "PatchTokens": "encoders",
        "Source": "sources",
        "TextEncoder": "encoders",
        "TooManyUnreadableError": "extraction",
        "extract": "extraction",
        "load_encoder": "encoders",
        "load_text_encoder": "encoders",
        "open_source": "sources",
    },
)

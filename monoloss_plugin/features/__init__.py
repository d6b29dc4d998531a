"""Vision features: from images to a feature dataset to training batches.

Reading and batching need the extra ``hub``; :func:`extract`, which is imported when it is first
asked for, needs ``vision``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin._later import later
from monoloss_plugin.features.batches import FeatureBatches
from monoloss_plugin.features.feature_set import FeatureSet
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.shards import SettingsError
from monoloss_plugin.features.whole import verify

if TYPE_CHECKING:
    from monoloss_plugin.features.encoders import Encoder, load_encoder
    from monoloss_plugin.features.extraction import Extraction, TooManyUnreadableError, extract

__all__ = [
    "Encoder",
    "Extraction",
    "FeatureBatches",
    "FeatureRecord",
    "FeatureSet",
    "SettingsError",
    "TooManyUnreadableError",
    "extract",
    "load_encoder",
    "verify",
]

__getattr__, __dir__ = later(
    __name__,
    {
        "Encoder": "encoders",
        "load_encoder": "encoders",
        "Extraction": "extraction",
        "TooManyUnreadableError": "extraction",
        "extract": "extraction",
    },
)

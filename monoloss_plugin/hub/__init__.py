"""The Hugging Face Hub: publish and load dictionaries and features.

Features need the extra ``hub``; dictionaries, which are SAELens's, need ``sae-lens`` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin._later import later

if TYPE_CHECKING:
    from monoloss_plugin.hub.feature_repository import load_features
    from monoloss_plugin.hub.pretrained import Listed, Pretrained, list_pretrained, load_pretrained
    from monoloss_plugin.hub.publication import PlannedFile, Publication
    from monoloss_plugin.hub.publishing_dictionaries import publish_dictionary
    from monoloss_plugin.hub.publishing_features import publish_features
    from monoloss_plugin.hub.record import DictionaryRecord

__all__ = [
    "DictionaryRecord",
    "Listed",
    "PlannedFile",
    "Pretrained",
    "Publication",
    "list_pretrained",
    "load_features",
    "load_pretrained",
    "publish_dictionary",
    "publish_features",
]

__getattr__, __dir__ = later(
    __name__,
    {
        "DictionaryRecord": "record",
        "Listed": "pretrained",
        "PlannedFile": "publication",
        "Pretrained": "pretrained",
        "Publication": "publication",
        "list_pretrained": "pretrained",
        "load_features": "feature_repository",
        "load_pretrained": "pretrained",
        "publish_dictionary": "publishing_dictionaries",
        "publish_features": "publishing_features",
    },
)

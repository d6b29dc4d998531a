"""The Hugging Face Hub: publish and load SAEs and features.

Features need the extra ``hub``; SAEs, which are SAELens's, need ``sae-lens`` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin._later import later

if TYPE_CHECKING:
    from monoloss_plugin.hub.feature_repository import load_features
    from monoloss_plugin.hub.pretrained import Listed, Pretrained, list_pretrained, load_pretrained
    from monoloss_plugin.hub.publication import PlannedFile, Publication
    from monoloss_plugin.hub.publishing_features import publish_features
    from monoloss_plugin.hub.publishing_saes import publish_sae
    from monoloss_plugin.hub.record import SAERecord

__all__ = [
    "Listed",
    "PlannedFile",
    "Pretrained",
    "Publication",
    "SAERecord",
    "list_pretrained",
    "load_features",
    "load_pretrained",
    "publish_features",
    "publish_sae",
]

__getattr__, __dir__ = later(
    __name__,
    {
        "SAERecord": "record",
        "Listed": "pretrained",
        "PlannedFile": "publication",
        "Pretrained": "pretrained",
        "Publication": "publication",
        "list_pretrained": "pretrained",
        "load_features": "feature_repository",
        "load_pretrained": "pretrained",
        "publish_sae": "publishing_saes",
        "publish_features": "publishing_features",
    },
)

"""Publish SAEs and features to the Hugging Face Hub, and load them.

Features need the extra ``hub``. SAEs also need ``sae-lens``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from monoloss_plugin._later import later
from monoloss_plugin._optional import missing_extra

if TYPE_CHECKING:
    from monoloss_plugin.hub.collection import (
        CollectionPageError,
        PublishedCollection,
        publish_all,
    )
    from monoloss_plugin.hub.features import load_features, publish_features
    from monoloss_plugin.hub.record import SAERecord
    from monoloss_plugin.hub.saes import Listed, Pretrained, list_pretrained, load_pretrained
    from monoloss_plugin.hub.upload import PlannedFile, Publication
    from monoloss_plugin.hub.upload_sae import publish_sae

__all__ = [
    "CollectionPageError",
    "Listed",
    "PlannedFile",
    "Pretrained",
    "Publication",
    "PublishedCollection",
    "SAERecord",
    "list_pretrained",
    "load_features",
    "load_pretrained",
    "publish_all",
    "publish_features",
    "publish_sae",
]

_find, __dir__ = later(
    __name__,
    {
        "CollectionPageError": "collection",
        "Listed": "saes",
        "PlannedFile": "upload",
        "Pretrained": "saes",
        "Publication": "upload",
        "PublishedCollection": "collection",
        "SAERecord": "record",
        "list_pretrained": "saes",
        "load_features": "features",
        "load_pretrained": "saes",
        "publish_all": "collection",
        "publish_features": "features",
        "publish_sae": "upload_sae",
    },
)

_OF_HUB = ("datasets", "huggingface_hub", "pyarrow", "yaml")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for; say what to install if that fails."""
    try:
        return _find(name)
    except ModuleNotFoundError as error:
        of_hub = (error.name or "").partition(".")[0] in _OF_HUB
        raise missing_extra(error, "hub" if of_hub else "sae-lens") from error

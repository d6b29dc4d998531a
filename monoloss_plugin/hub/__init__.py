"""Publish SAEs and features to the Hugging Face Hub, and load them.

Features need the extra ``hub``. SAEs also need ``sae-lens``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from monoloss_plugin._later import later
from monoloss_plugin._optional import missing_extra

if TYPE_CHECKING:
    from monoloss_plugin.hub.features import load_features as load_features
    from monoloss_plugin.hub.pretrained import Listed as Listed
    from monoloss_plugin.hub.pretrained import Pretrained as Pretrained
    from monoloss_plugin.hub.pretrained import list_pretrained as list_pretrained
    from monoloss_plugin.hub.pretrained import load_pretrained as load_pretrained
    from monoloss_plugin.hub.record import SAERecord as SAERecord
    from monoloss_plugin.hub.upload import PlannedFile as PlannedFile
    from monoloss_plugin.hub.upload import Publication as Publication
    from monoloss_plugin.hub.upload_features import publish_features as publish_features
    from monoloss_plugin.hub.upload_sae import publish_sae as publish_sae

_find, __dir__ = later(
    __name__,
    {
        "Listed": "pretrained",
        "PlannedFile": "upload",
        "Pretrained": "pretrained",
        "Publication": "upload",
        "SAERecord": "record",
        "list_pretrained": "pretrained",
        "load_features": "features",
        "load_pretrained": "pretrained",
        "publish_features": "upload_features",
        "publish_sae": "upload_sae",
    },
)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for; say what to install if that fails."""
    try:
        return _find(name)
    except ModuleNotFoundError as error:
        of_hub = (error.name or "").partition(".")[0] in ("datasets", "huggingface_hub", "yaml")
        raise missing_extra(error, "hub" if of_hub else "sae-lens") from error

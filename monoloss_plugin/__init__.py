"""MonoScore, MonoLoss and Top-k sparsity regularizers for existing SAE trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from monoloss_plugin import functional
from monoloss_plugin._later import later
from monoloss_plugin.batch import Batch
from monoloss_plugin.losses import L1L2Ratio, LossTerm, MonoLoss, OffSupportL1
from monoloss_plugin.metrics import ClassPurity, MonoScore

if TYPE_CHECKING:
    from monoloss_plugin.adapters.own_loop import attach as attach
    from monoloss_plugin.gallery import name_latents as name_latents
    from monoloss_plugin.gallery import show_latents as show_latents
    from monoloss_plugin.gallery import top_images as top_images
    from monoloss_plugin.hub import list_pretrained as list_pretrained
    from monoloss_plugin.hub import load_features as load_features
    from monoloss_plugin.hub import load_pretrained as load_pretrained
    from monoloss_plugin.hub import publish_features as publish_features
    from monoloss_plugin.hub import publish_sae as publish_sae
    from monoloss_plugin.report import write_report as write_report
    from monoloss_plugin.saes import init_from_data as init_from_data
    from monoloss_plugin.saes import refit_decoder as refit_decoder

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "ClassPurity",
    "L1L2Ratio",
    "LossTerm",
    "MonoLoss",
    "MonoScore",
    "OffSupportL1",
    "__version__",
    "functional",
]

# These names' libraries are imported on first use; a star import needs torch alone.
__getattr__, __dir__ = later(
    __name__,
    {
        "attach": "adapters.own_loop",
        "list_pretrained": "hub",
        "load_features": "hub",
        "load_pretrained": "hub",
        "publish_sae": "hub",
        "publish_features": "hub",
        "init_from_data": "saes",
        "refit_decoder": "saes",
        "name_latents": "gallery",
        "show_latents": "gallery",
        "top_images": "gallery",
        "write_report": "report",
    },
)

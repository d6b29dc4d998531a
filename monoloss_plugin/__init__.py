"""MonoScore, MonoLoss and Top-k sparsity regularizers for existing SAE trainers."""

from monoloss_plugin import functional
from monoloss_plugin.losses import L1L2Ratio, LossTerm, MonoLoss, OffSupportL1
from monoloss_plugin.metrics import ClassPurity, MonoScore

__version__ = "0.1.0"

__all__ = [
    "ClassPurity",
    "L1L2Ratio",
    "LossTerm",
    "MonoLoss",
    "MonoScore",
    "OffSupportL1",
    "__version__",
    "functional",
]

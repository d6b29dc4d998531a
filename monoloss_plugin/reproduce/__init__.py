"""The papers' experiments, each by one command: ``monoloss reproduce``.

Needs the extras ``sae-lens``, ``vision`` and ``referee``.
"""

from __future__ import annotations

from monoloss_plugin.reproduce.collection import COLLECTION
from monoloss_plugin.reproduce.experiment import Experiment, Features, Setting, Table
from monoloss_plugin.reproduce.figure2 import FIGURE2
from monoloss_plugin.reproduce.figure4 import FIGURE4, TABLE1
from monoloss_plugin.reproduce.ground_truth import GROUND_TRUTH
from monoloss_plugin.reproduce.hard_budget import HARD_BUDGET
from monoloss_plugin.reproduce.inputs import extracted, features_in
from monoloss_plugin.reproduce.referee import REFEREE
from monoloss_plugin.reproduce.running import Reproduction, reproduce
from monoloss_plugin.reproduce.table2 import TABLE2

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Features",
    "Reproduction",
    "Setting",
    "Table",
    "extracted",
    "features_in",
    "reproduce",
]

EXPERIMENTS = {
    "figure2": FIGURE2,
    "figure4": FIGURE4,
    "table1": TABLE1,
    "table2": TABLE2,
    "hard-budget": HARD_BUDGET,
    "referee": REFEREE,
    "ground-truth": GROUND_TRUTH,
    "collection": COLLECTION,
}
"""Every experiment by its name."""

"""Make the bundle ``"digits"`` that ships with this package: the demo's features and two SAEs.

A maintainer runs ``python -m monoloss_plugin.demo.bundle`` to replace it in the package.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from monoloss_plugin.demo.digits import digit_features
from monoloss_plugin.demo.run import train_sae
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.gallery.finding import DIGITS
from monoloss_plugin.hub.features import DEFAULT, Split, write_features
from monoloss_plugin.hub.repository import BUNDLED, bundled_folder
from monoloss_plugin.hub.sae_files import SAEContent, write_sae
from monoloss_plugin.losses import MonoLoss

from sae_lens import SAE  # isort: skip  # after the demo, whose error names the extra

_NAME = "digits"


def write_bundle(root: Path) -> None:
    """Write the bundle's two repositories, ``models`` and ``datasets``, into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        data = digit_features(Path(scratch))
        splits = {
            "train": _described(data.train, "train"),
            "held_out": _described(data.held_out, "held_out"),
        }
        for split, features in splits.items():
            write_features(features, root / "datasets", Split(DEFAULT, split))
        baseline = None
        for terms in ((), (MonoLoss(lam=3e-3),)):
            folder = Path(scratch) / f"{len(terms)}-terms"
            train_sae(data.train, "batchtopk", terms, seed=0, folder=folder)
            evaluation = evaluate(SAE.load_from_disk(folder), data.held_out)
            content = SAEContent(folder, evaluation, baseline, splits["held_out"], unit_norm=True)
            write_sae(content, root / "models")
            baseline = evaluation


def _described(features: FeatureSet, split: str) -> FeatureSet:
    """Replace the names of temporary folders in a feature set's record by descriptions."""
    named = {**features.record.encoder, "name": "the demo's vision transformer, 3 blocks"}
    source = {"kind": "folder", "name": DIGITS, "split": split}
    return FeatureSet(features.dataset, replace(features.record, encoder=named, source=source))


if __name__ == "__main__":
    place = bundled_folder(_NAME)
    shutil.rmtree(place, ignore_errors=True)
    for kind in ("models", "datasets"):
        (place / kind).mkdir(parents=True)
    write_bundle(place)
    total = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    print(f"{place}: {total / 1e6:.2f} MB; by default {BUNDLED[_NAME]}")

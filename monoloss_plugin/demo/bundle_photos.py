"""Make the bundle ``"photos"`` that ships with this package: an SAE and a sample of its features.

A maintainer runs ``python -m monoloss_plugin.demo.bundle_photos FEATURES``, where FEATURES holds
the feature sets ``train`` and ``test`` of CIFAR-10 from EfficientNet-Lite0. The bundle holds no
images: CIFAR-10 comes without a licence that would allow it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub.features import DEFAULT, Split, write_features
from monoloss_plugin.hub.repository import BUNDLED, bundled_folder
from monoloss_plugin.hub.sae_files import SAEContent, write_sae
from monoloss_plugin.hub.saes import WEIGHTS
from monoloss_plugin.saes.baselines import QUICK, make_baseline
from monoloss_plugin.training import get_recipe, train

from sae_lens import SAE  # isort: skip  # after the training, whose error names the extra

_NAME = "photos"
_LATENTS, _K, _BATCH, _EPOCHS = 512, 16, 512, 8.0
_ROWS = 1000
"""Rows of each split: 2.6 MB."""


def write_photos(root: Path, features: FeatureSet, held_out: FeatureSet) -> None:
    """Train the SAE on all features, and write it and a sample of them into a folder.

    The weights are stored in float16, and measured as they are stored: a decoder in float32 would
    take as much room as a thousand images.
    """
    sizes: dict[str, Any] = {"num_latents": _LATENTS, "k": _K, "batch_size": _BATCH}
    recipe = get_recipe("recommended", features, epochs=_EPOCHS, **sizes)
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(features, recipe, out=scratch, baselines=())
        sae = trained.sae
        for parameter in sae.parameters():
            parameter.data = parameter.data.half().float()
        sae.save_model(scratch)
        sae = SAE.load_from_disk(scratch)
    found = evaluate(sae, held_out)
    controls = {
        kind: evaluate(make_baseline(kind, features, num_latents=_LATENTS, l0=_K), held_out)
        for kind in QUICK
    }
    content = SAEContent(sae, found, features=held_out, unit_norm=True, controls=controls)
    weights = root / "models" / write_sae(content, root / "models", BUNDLED[_NAME]) / WEIGHTS
    halved = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halved, weights)
    for split, rows in {"train": features, "held_out": held_out}.items():
        write_features(_sample(rows, split), root / "datasets", Split(DEFAULT, split))


def _sample(features: FeatureSet, split: str) -> FeatureSet:
    """Return some rows, with a record that says so."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    some = features.select(order[:_ROWS].sort().values)
    source = {**features.record.source, "split": split, "sample": f"{_ROWS} of {len(features)}"}
    return FeatureSet(some.dataset, replace(features.record, source=source))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    place = bundled_folder(_NAME)
    shutil.rmtree(place, ignore_errors=True)
    for kind in ("models", "datasets"):
        (place / kind).mkdir(parents=True)
    write_photos(place, FeatureSet.open(folder / "train"), FeatureSet.open(folder / "test"))
    total = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    print(f"{place}: {total / 1e6:.2f} MB")

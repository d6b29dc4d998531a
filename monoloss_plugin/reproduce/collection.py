"""SAEs for everyone: the SAEs of the experiments and their features, ready for the Hub.

The folder is a collection as ``monoloss publish all`` takes it. No SAE is chosen by its scores: it
holds the first seed of each recipe, encoder and k. If images are given, the recommended SAE of the
middle k gets a page with them: give them only where their licence allows to publish them.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.hub.features import Split, write_features
from monoloss_plugin.hub.record import RECORD, read_record
from monoloss_plugin.hub.sae_files import SAEContent, write_sae
from monoloss_plugin.report import write_report
from monoloss_plugin.reproduce.experiment import Experiment, Found, Setting, Table, spread
from monoloss_plugin.reproduce.saes import (
    MONOLOSS,
    PLAIN,
    RECOMMENDED,
    k_of,
    ks_of,
    recipes,
    trained,
)
from monoloss_plugin.saes.baselines import QUICK, make_baseline

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

_FOLDER = "collection"
_NAMES = (PLAIN, MONOLOSS, RECOMMENDED)
_COLUMNS = {
    "r2": "R²",
    "monoscore_adjusted": "MonoScore above chance",
    "purity_adjusted": "purity above chance",
    "l0": "L0",
    "dead_latents": "dead",
}
_DIGITS = {"dead_latents": 0}


def measure(setting: Setting) -> Found:
    """Write BatchTopK SAEs of every encoder over several k, and the features that they take."""
    folder = setting.out / _FOLDER
    saes: dict[str, dict[str, float]] = {}
    for encoder, features in setting.features.items():
        for name in ("train", "held_out"):
            split = Split(encoder, name)
            if not (folder / "datasets" / split.record_path).exists():
                write_features(getattr(features, name), folder / "datasets", split)
        for k in ks_of(setting, features):
            controls = setting.run(
                *("collection", encoder, f"k {k}", "controls"),
                compute=partial(_controls, setting, encoder, k),
            )
            for name in _NAMES:
                sae_id = f"{encoder}/{name.lower()}-k{k}"
                if not (folder / "models" / sae_id / RECORD).exists():
                    baseline = saes.get(f"{encoder}/{PLAIN}-k{k}")
                    _write(setting, encoder, name, k, sae_id, baseline, controls)
                saes[sae_id] = read_record(folder / "models" / sae_id, sae_id).metrics
    return {"folder": folder.name, "saes": saes}


def _controls(setting: Setting, encoder: str, k: int) -> dict[str, Any]:
    """Return the measures of SAEs that have learnt nothing."""
    features = setting.features[encoder]
    size: Any = recipes(setting, features, "batchtopk", k)[PLAIN].num_latents
    return {
        kind: evaluate(
            make_baseline(kind, features.train, num_latents=size, l0=k), features.held_out
        ).summary()
        for kind in QUICK
    }


def _write(
    setting: Setting,
    encoder: str,
    name: str,
    k: int,
    sae_id: str,
    baseline: dict[str, float] | None,
    controls: dict[str, Any],
) -> None:
    """Write the files of one SAE, all of them or none."""
    features = setting.features[encoder]
    recipe = recipes(setting, features, "batchtopk", k)[name]
    sae = trained(setting, encoder, name, recipe, setting.seeds[0])
    held_out: FeatureSet = features.held_out
    found = evaluate(sae, held_out)
    root = setting.out / _FOLDER / "models"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = None
        if setting.images and name == RECOMMENDED and k == k_of(setting, features):
            plain = recipes(setting, features, "batchtopk", k)[PLAIN]
            saes = {name: sae, PLAIN: trained(setting, encoder, PLAIN, plain, setting.seeds[0])}
            images = setting.images["held_out"].rows
            report = write_report(saes, held_out, Path(scratch) / "report.html", images=images)
        content = SAEContent(
            sae,
            found,
            baseline=baseline,
            features=held_out,
            unit_norm=True,
            controls=controls,
            report=report,
        )
        write_sae(content, root, sae_id)


def tables(found: Found) -> list[Table]:
    """Return the measures of every SAE."""
    rows = [
        [sae_id, *(spread([metrics.get(m)], _DIGITS.get(m, 3)) for m in _COLUMNS)]
        for sae_id, metrics in found["saes"].items()
    ]
    note = f"Publish them with: monoloss publish all OUT/{found['folder']} USER/NAME"
    return [Table("SAEs, on held-out images", ("SAE", *_COLUMNS.values()), rows, note)]


COLLECTION = Experiment(
    about="SAEs of every encoder over several k, and their features, ready for the Hub",
    needs=frozenset({"features"}),
    measure=measure,
    tables=tables,
)

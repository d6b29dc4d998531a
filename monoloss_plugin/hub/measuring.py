"""Measure an SAE that is to be published, beside what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monoloss_plugin._places import require_folder
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.gallery.samples import activating_samples
from monoloss_plugin.hub.illustrations import IMAGES
from monoloss_plugin.hub.record import read_record
from monoloss_plugin.hub.saes import load_folder
from monoloss_plugin.saes.baselines import QUICK, make_baseline


def measure(
    sae: Path,
    features: FeatureSet,
    *,
    baseline: Path | None = None,
    train: FeatureSet | None = None,
    raw: bool = False,
    find_images: bool = False,
) -> dict[str, Any]:
    """Measure an SAE on features, each SAE in one pass.

    Args:
        sae: its folder.
        features: held-out features.
        baseline: the folder of an SAE trained without the losses.
        train: training features, to make SAEs that have learnt nothing.
        raw: use features as they are, even if a folder's record does not ask for it.
        find_images: find the images that activate the SAE's latents, in the same pass.

    Returns:
        The arguments ``evaluation``, ``baseline`` and ``controls`` of
        :func:`~monoloss_plugin.hub.upload_sae.publish_sae`.
    """
    of_sae = _options(sae, raw)
    if find_images:
        evaluation: Any = activating_samples(features=features, count=IMAGES, **of_sae)
        measured = evaluation.evaluation
    else:
        evaluation = measured = evaluate(features=features, **of_sae)
    compared = None if baseline is None else evaluate(features=features, **_options(baseline, raw))
    controls = {}
    if train is not None:
        unit_norm = of_sae["normalize"] is not False
        size = {"num_latents": measured.num_latents, "l0": max(1, round(measured.l0))}
        for kind in QUICK:
            control = make_baseline(kind, train, normalize=unit_norm, **size)
            controls[kind] = evaluate(control, features)
    return {"evaluation": evaluation, "baseline": compared, "controls": controls}


def _options(folder: Path, raw: bool) -> dict[str, Any]:
    """Return an SAE, and how to measure it, as arguments of ``evaluate``."""
    require_folder(folder, "sae")
    raw = raw or read_record(folder, str(folder)).inputs == "as they are"
    sae = load_folder(folder, str(folder))
    return {"sae": sae, "normalize": False if raw else None, "progress": True}

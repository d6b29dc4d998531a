"""The files of an SAE that is published, made from what the caller gives."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import SAE
from safetensors.torch import save_file

from monoloss_plugin import __version__
from monoloss_plugin._checks import require_flag
from monoloss_plugin._places import as_path, require_folder
from monoloss_plugin.evaluation import Evaluation
from monoloss_plugin.gallery.samples import ActivatingSamples, activating_samples
from monoloss_plugin.hub import saes
from monoloss_plugin.hub.cards import CARD
from monoloss_plugin.hub.illustrations import (
    CURVES,
    ILLUSTRATIONS,
    IMAGES,
    LATENTS,
    REPORT,
    copy_picture,
    draw_curves,
    draw_latents,
)
from monoloss_plugin.hub.names import require_inside
from monoloss_plugin.hub.record import RECORD, Inputs, SAERecord, read_record, record_in
from monoloss_plugin.hub.repository import read_json
from monoloss_plugin.hub.saes import CONFIG, SPARSITY, WEIGHTS

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet
    from monoloss_plugin.gallery.pictures import Pictures

Metrics = Evaluation | Mapping[str, float]

FILES = (CONFIG, WEIGHTS, SPARSITY, RECORD, *ILLUSTRATIONS)
"""The files that are published of an SAE. Other files in its folder are left alone."""

_SCALABLE = ("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit")
"""Architectures whose outputs have the scale of their inputs."""

_NEVER = 1e-10
"""SAELens adds this to the share of samples before it takes the logarithm."""


@dataclass(frozen=True)
class SAEContent:
    """What to publish of an SAE, as the arguments of :func:`publish_sae` say it."""

    sae: SAE[Any] | str | Path
    evaluation: Metrics | None = None
    baseline: Metrics | None = None
    features: FeatureSet | None = None
    unit_norm: bool | None = None
    take_any_norm: bool = False
    controls: Mapping[str, Metrics] | None = None
    samples: ActivatingSamples | None = None
    pictures: Pictures | None = None
    report: Path | None = None

    def __post_init__(self) -> None:
        require_flag(self.take_any_norm, "take_any_norm")
        if self.unit_norm is not None:
            require_flag(self.unit_norm, "unit_norm")
        if self.features is not None:
            from monoloss_plugin.features.feature_set import require_set

            require_set(self.features, "features")
        if self.baseline is not None and self.evaluation is None:
            raise ValueError("baseline: needs an evaluation to compare it with")
        if self.controls and self.evaluation is None:
            raise ValueError("controls: need an evaluation to compare them with")
        if self.controls is not None and not isinstance(self.controls, Mapping):
            raise TypeError(f"controls: expected evaluations by name, got {self.controls!r}")


def write_sae(content: SAEContent, root: Path, sae_id: str | None = None) -> str:
    """Write all files of an SAE into ``root/sae_id``, and return the ``sae_id``."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".") as scratch:
        folder = Path(scratch) / "sae"
        given, source, known, sparsity = content.sae, None, SAERecord(), None
        if not isinstance(given, SAE):
            source = as_path(given, "sae", "a SAELens SAE or a folder")
            require_folder(source, "sae")
            given = saes.load_folder(source, str(source))
            known = read_record(source, str(source))
            sparsity = saes.read_sparsity(source, str(source), given.cfg.d_sae)
        # Write it and load it again, so that what is published is what others will load.
        saes.write_folder(given, folder)
        sae = saes.load_folder(folder, "sae")
        record = _illustrate(folder, source, sae, _complete(known, sae, content), content)
        if content.take_any_norm:
            sae = _taking_any_norm(sae, record.inputs)
            record = replace(record, inputs="as they are")
        # For people who load it with SAELens alone.
        own = sae.cfg.metadata["monoloss"] or {}
        sae.cfg.metadata["monoloss"] = {**own, "inputs": record.inputs}
        saes.write_folder(sae, folder)
        record.write(folder)
        if isinstance(content.evaluation, Evaluation):
            sparsity = torch.log10(content.evaluation.frequency.float() + _NEVER)
        if sparsity is not None:
            if len(sparsity) != sae.cfg.d_sae:
                raise ValueError(
                    f"evaluation: of {len(sparsity)} latents, but this SAE has {sae.cfg.d_sae}"
                )
            save_file({"sparsity": sparsity.float().contiguous()}, folder / SPARSITY)
        sae_id = _name(folder, sae, record) if sae_id is None else sae_id
        if require_inside(sae_id, "sae_id").partition("/")[0] == CARD:
            raise ValueError(f"sae_id: {CARD} is the card's name")
        (root / sae_id).parent.mkdir(parents=True, exist_ok=True)
        folder.rename(root / sae_id)
    return sae_id


def _complete(known: SAERecord, sae: SAE[Any], content: SAEContent) -> SAERecord:
    """Add to a record what the SAE itself, the features and the measurements say."""
    own = record_in(sae)
    record = replace(
        known,
        losses=own.losses or known.losses,
        inputs=_inputs(known.inputs or own.inputs, content.unit_norm),
        refit=own.refit or known.refit,
        converted_from=own.converted_from or known.converted_from,
        versions={
            "monoloss_plugin": __version__,
            "sae_lens": version("sae-lens"),
            "torch": torch.__version__,
        },
    )
    samples: dict[str, Any] = {}
    if content.features is not None:
        source = content.features.record.source
        record = replace(record, encoder=content.features.record.encoder, dataset=source)
        split = str(source.get("split") or source.get("name") or "not named")
        samples = {"samples": len(content.features), "split": split}
    if content.evaluation is None:
        return record
    if isinstance(content.evaluation, Evaluation):
        samples["compared by"] = content.evaluation.spaces.scored
    return replace(
        record,
        metrics=_numbers(content.evaluation, "evaluation"),
        baseline={} if content.baseline is None else _numbers(content.baseline, "baseline"),
        latents_shown={},  # of the measurements before
        controls={
            str(name): _numbers(of, "controls") for name, of in (content.controls or {}).items()
        },
        evaluated_on=samples,
    )


def _illustrate(
    folder: Path, source: Path | None, sae: SAE[Any], record: SAERecord, content: SAEContent
) -> SAERecord:
    """Add the pictures and the report; return the record, which then tells what they show.

    Without new measurements, those pictures that the source has are kept.
    """
    if isinstance(content.evaluation, Evaluation):
        draw_curves(folder / CURVES, record, content.evaluation, content.baseline)
    elif content.evaluation is None and source and (source / CURVES).is_file():
        copy_picture(source / CURVES, folder / CURVES)
    if content.report is not None:
        shutil.copyfile(content.report, folder / REPORT)
    if content.pictures is not None:
        samples = content.samples
        if samples is None:
            assert content.features is not None  # publish_sae needs them to open the images
            unit_norm = record.inputs == "unit norm"
            samples = activating_samples(sae, content.features, count=IMAGES, normalize=unit_norm)
        shown = draw_latents(folder / LATENTS, samples, content.pictures, content.features)
    elif record.latents_shown and source and (source / LATENTS).is_file():
        shown = record.latents_shown
        copy_picture(source / LATENTS, folder / LATENTS)
    else:
        shown = {}
    return replace(record, latents_shown=shown)


def _inputs(known: Inputs | None, unit_norm: bool | None) -> Inputs:
    """Return what the SAE takes, from the caller's word and what is known."""
    if unit_norm is None:
        return known or "unit norm"
    said: Inputs = "unit norm" if unit_norm else "as they are"
    if known not in (None, said):
        raise ValueError(f"unit_norm: the SAE's own record says that it takes {known!r}")
    return said


def _numbers(metrics: Metrics, argument: str) -> dict[str, float]:
    if isinstance(metrics, Evaluation):
        numbers = metrics.summary()
    elif isinstance(metrics, Mapping) and all(isinstance(v, Real) for v in metrics.values()):
        numbers = {str(name): float(value) for name, value in metrics.items()}
    else:
        raise TypeError(f"{argument}: expected an Evaluation or numbers by name, got {metrics!r}")
    # JSON cannot hold other numbers.
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _taking_any_norm(sae: SAE[Any], inputs: Inputs | None) -> SAE[Any]:
    """Make an SAE of unit-norm inputs scale its inputs itself."""
    architecture = sae.cfg.architecture()
    if architecture not in _SCALABLE:
        raise ValueError(f"take_any_norm: not for {architecture}, only for {', '.join(_SCALABLE)}")
    if inputs != "unit norm" or sae.cfg.normalize_activations != "none":
        raise ValueError(
            "take_any_norm: only for an SAE that was trained on features of unit norm and does not "
            f"scale them itself (normalize_activations={sae.cfg.normalize_activations!r})"
        )
    # SAELens scales inputs to the square root of d_in; folding its inverse brings them back to 1.
    sae.fold_activation_norm_scaling_factor(sae.cfg.d_in**-0.5)
    sae.cfg.normalize_activations = "constant_norm_rescale"
    return sae


def _name(folder: Path, sae: SAE[Any], record: SAERecord) -> str:
    architecture = saes.trained_as(read_json(folder / CONFIG))
    losses = "".join(f"-{term['name']}-{term['lam']:g}" for term in record.losses)
    name = f"{architecture}-{sae.cfg.d_sae}{losses}"
    return re.sub(r"[^\w.+=-]", "-", name, flags=re.ASCII)

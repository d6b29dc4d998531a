"""Publish a trained SAE."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import SAE
from safetensors.torch import save_file

from monoloss_plugin import __version__
from monoloss_plugin._checks import require_flag, require_text
from monoloss_plugin._places import as_path, require_folder
from monoloss_plugin.evaluation import Evaluation
from monoloss_plugin.hub import saes
from monoloss_plugin.hub.cards import CARD, hub_id
from monoloss_plugin.hub.model_card import CURVES, model_card
from monoloss_plugin.hub.names import require_hub_name, require_inside, require_texts
from monoloss_plugin.hub.record import RECORD, Inputs, SAERecord, read_record, record_in
from monoloss_plugin.hub.repository import Repository, read_json, repository_in
from monoloss_plugin.hub.saes import CONFIG, SPARSITY, WEIGHTS
from monoloss_plugin.hub.upload import Destination, Publication, upload

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

Metrics = Evaluation | Mapping[str, float]

_FILES = (CONFIG, WEIGHTS, SPARSITY, RECORD, CURVES)
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

    def __post_init__(self) -> None:
        require_flag(self.take_any_norm, "take_any_norm")
        if self.unit_norm is not None:
            require_flag(self.unit_norm, "unit_norm")
        if self.features is not None:
            from monoloss_plugin.features import FeatureSet

            if not isinstance(self.features, FeatureSet):
                raise TypeError(f"features: expected a FeatureSet, got {self.features!r}")
        if self.baseline is not None and self.evaluation is None:
            raise ValueError("baseline: needs an evaluation to compare it with")
        if self.controls and self.evaluation is None:
            raise ValueError("controls: need an evaluation to compare them with")
        if self.controls is not None and not isinstance(self.controls, Mapping):
            raise TypeError(f"controls: expected evaluations by name, got {self.controls!r}")


def publish_sae(
    sae: SAE[Any] | str | Path,
    repo_id: str,
    *,
    sae_id: str | None = None,
    evaluation: Metrics | None = None,
    baseline: Metrics | None = None,
    controls: Mapping[str, Metrics] | None = None,
    features: FeatureSet | None = None,
    unit_norm: bool | None = None,
    take_any_norm: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    tags: Sequence[str] = (),
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> Publication:
    """Publish an SAE to a repository of the Hub, beside the SAEs that are there.

    Plain SAELens loads it with ``SAE.from_pretrained(repo_id, sae_id)``. This function makes the
    repository if there is none. All files arrive in one commit, and nothing is overwritten unless
    you ask for it. After an interruption, run it again; it sends only what is missing.

    Args:
        sae: a SAELens SAE, in training or for inference; or the folder where you saved one. Its
            loss terms are read from its metadata, where the adapter has written them.
        repo_id: ``user/name``.
        sae_id: its folder in the repository; by default made of architecture, size and losses, such
            as ``batchtopk-8192-monoloss-0.0003``.
        evaluation: the result of :func:`~monoloss_plugin.evaluation.evaluate`, or numbers by name.
            Evaluate a BatchTopK SAE after you have saved and loaded it. Without an evaluation, the
            measurements in a folder's record are published.
        baseline: the same of an SAE trained without the losses, to compare with.
        controls: the same of SAEs that have learnt nothing, by name, such as the evaluations of
            :func:`~monoloss_plugin.saes.make_baseline`. The card shows them beside the SAE.
        features: the ``FeatureSet`` that you evaluated on. Its record names encoder and images.
        unit_norm: whether you trained the SAE on features of unit norm, as ``FeatureBatches`` gives
            them. By default as the SAE's own record says; yes if it does not say.
        take_any_norm: fold the scaling into the SAE, so that it takes features as the encoder gives
            them, and reconstructs them at their scale. The same latents are active; where SAELens
            rescales latents by decoder norms, they are larger by the square root of d_in.
        license: for the card, such as ``"mit"``.
        base_model: the encoder's repository on the Hub, for the card; by default from the features'
            record.
        dataset: the images' repository on the Hub, for the card; by default from the same record.
        tags: more tags for the card.
        private: make a new repository private.
        overwrite: replace an SAE of the same name.
        dry_run: upload nothing, and return what would be uploaded; where the Hub cannot be
            reached, what a new repository would get.
        token: by default the one you are logged in with.

    Raises:
        FileExistsError: the repository has another SAE of this name.
        FileNotFoundError: there is no such folder, or no SAE in it.
        PermissionError: ``private`` is asked for, but the repository is there and public.
        TypeError, ValueError: an argument is wrong; the SAE cannot be published as it is, such as
            the folder of a training checkpoint; or the Hub rejects the card's metadata.
        Exception: what ``huggingface_hub`` raises, such as its ``HfHubHTTPError`` with status 412
            if somebody else commits at the same moment; run it again.
    """
    content = SAEContent(sae, evaluation, baseline, features, unit_norm, take_any_norm, controls)
    to = Destination(repo_id, "model", private, overwrite, dry_run, token)
    tags = require_texts(tags, "tags")
    require_text(license, "license")
    for argument, name in (("base_model", base_model), ("dataset", dataset)):
        if name is not None:
            require_hub_name(name, argument)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sae_id = write_sae(content, root, sae_id)
        record = read_record(root / sae_id, sae_id)
        metadata = {
            "license": license,
            "tags": tags,
            "base_model": [base_model or hub_id(record.encoder)],
            "datasets": [dataset or hub_id(record.dataset)],
        }

        def write_card(existing: str, there: Repository | None) -> str:
            added = repository_in(root, sae_id)
            return model_card(existing, repo_id, [there, added], metadata)

        files = {f"{sae_id}/{file}" for file in _FILES}
        return upload(root, to, sae_id, owns=files.__contains__, write_card=write_card)


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
        record = _complete(known, sae, content)
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
            _draw_curves(folder / CURVES, record, content.evaluation, content.baseline)
        elif content.evaluation is None and source and (source / CURVES).is_file():
            _copy_picture(source / CURVES, folder / CURVES)
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
        controls={
            str(name): _numbers(of, "controls") for name, of in (content.controls or {}).items()
        },
        evaluated_on=samples,
    )


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


def _draw_curves(
    path: Path, record: SAERecord, evaluation: Evaluation, baseline: Metrics | None
) -> None:
    from monoloss_plugin.figures import plot_curves, save_figure

    added = " + ".join(str(term["name"]) for term in record.losses)
    curves = {f"with {added}" if added else "MonoScore": evaluation.monoscore.curve()}
    if isinstance(baseline, Evaluation):
        curves = {f"without {added or 'the losses'}": baseline.monoscore.curve(), **curves}
    save_figure(plot_curves(curves, chance=evaluation.monoscore.chance), path, dpi=110)


def _copy_picture(source: Path, target: Path) -> None:
    # The file may be a link to something that nobody means to publish.
    if source.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{source}: not a PNG picture")
    shutil.copyfile(source, target)


def _name(folder: Path, sae: SAE[Any], record: SAERecord) -> str:
    architecture = saes.trained_as(read_json(folder / CONFIG))
    losses = "".join(f"-{term['name']}-{term['lam']:g}" for term in record.losses)
    name = f"{architecture}-{sae.cfg.d_sae}{losses}"
    return re.sub(r"[^\w.+=-]", "-", name, flags=re.ASCII)

"""Publish a trained SAE."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin import __version__
from monoloss_plugin._checks import require_flag, require_text
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, require_folder
from monoloss_plugin.evaluation import Evaluation
from monoloss_plugin.hub import sae_folder
from monoloss_plugin.hub.cards import encoder_on_hub, images_on_hub
from monoloss_plugin.hub.model_card import CURVES, model_card
from monoloss_plugin.hub.names import (
    require_hub_name,
    require_inside,
    require_repo_id,
    require_texts,
)
from monoloss_plugin.hub.pretrained import listed
from monoloss_plugin.hub.publication import CARD, Existing, Publication, Staged, Target, publish
from monoloss_plugin.hub.record import (
    RECORD,
    Inputs,
    SAERecord,
    finite,
    record_from,
    record_in,
    write_record,
)
from monoloss_plugin.hub.repository import of_folder, of_hub, read_json
from monoloss_plugin.hub.staging import staging

try:
    from sae_lens import SAE
    from safetensors.torch import save_file
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

Metrics = Evaluation | Mapping[str, float]

FILES = (sae_folder.CONFIG, sae_folder.WEIGHTS, sae_folder.SPARSITY, RECORD, CURVES)
"""What is written of an SAE; other files in its folder are left alone."""

_SCALABLE = ("standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit")
"""Architectures whose outputs are of the scale of their inputs."""

_NEVER = 1e-10
"""What SAELens adds to the share of samples before it takes the logarithm."""


def publish_sae(
    sae: SAE[Any] | str | Path,
    repo_id: str,
    *,
    sae_id: str | None = None,
    evaluation: Metrics | None = None,
    baseline: Metrics | None = None,
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
    """Publish an SAE to a repository of the Hub, beside those that are there.

    ``SAE.from_pretrained(repo_id, sae_id)`` of plain SAELens loads it. The loss terms are read from
    the SAE, where the adapter has written them in training. All files arrive in one commit; a
    repository is made if there is none, and nothing in one is overwritten unless asked. Run again
    after an interruption, it sends what has not arrived.

    Args:
        sae: a SAELens SAE, in training or for inference; or a folder that one was saved to.
        repo_id: ``user/name``.
        sae_id: its folder in the repository, by default made of architecture, size and losses, such
            as ``batchtopk-8192-monoloss-0.0003``.
        evaluation: what :func:`~monoloss_plugin.evaluation.evaluate` found, or such numbers by
            name; of a BatchTopK SAE, once it was saved and loaded. It replaces the measurements
            that a folder's record has.
        baseline: the same of an SAE trained without the losses, to compare with.
        features: the :class:`~monoloss_plugin.features.FeatureSet` it was evaluated on; encoder
            and images are taken from its record.
        unit_norm: whether the SAE was trained on features of unit norm, as ``FeatureBatches`` gives
            them; what is published says so. By default as a folder's own record says, or else yes.
        take_any_norm: fold the scaling into the SAE, so that it takes the encoder's features as
            they are. Reconstructions come at the scale of the input. Latents keep their support and
            ratios; where SAELens rescales them by decoder norms, they grow by the square root of
            d_in.
        license: such as ``"mit"``, for the card.
        base_model: the encoder's repository on the Hub, for the card; by default what the
            features' record says.
        dataset: the images' repository on the Hub, in the same way.
        tags: more tags for the card.
        private: make a new repository private.
        overwrite: replace an SAE of this name.
        dry_run: upload nothing, and say what would be. Whether the token may write is not asked;
            where the Hub cannot be reached, it is what a new repository would get.
        token: by default the one that the machine is logged in with.

    Returns:
        The files with their sizes, and the commit.

    Raises:
        TypeError: an SAE or metrics of another kind.
        ValueError: not a repository's or folder's name; metadata that the Hub refuses; an SAE that
            cannot be published as it is (a training checkpoint's folder, or inputs whose scale is
            not folded in); a baseline without an evaluation.
        FileExistsError: another SAE of that name is there.
        FileNotFoundError: no such folder, or no SAE in it.
        PermissionError: no token, or one that may not write there; or a private repository is asked
            for, and it is public.
        ConnectionError: the Hub cannot be reached, and it is no dry run.
    """
    require_repo_id(repo_id)
    require_flag(take_any_norm, "take_any_norm")
    if unit_norm is not None:
        require_flag(unit_norm, "unit_norm")
    if sae_id is not None:
        _require_folder(sae_id)
    tags = require_texts(tags, "tags")
    require_text(license, "license")
    if features is not None:
        _require_features(features)
    for argument, given in (("base_model", base_model), ("dataset", dataset)):
        if given is not None:
            require_hub_name(given, argument)
    with staging() as staged:
        sae_id = stage_sae(
            sae,
            staged,
            sae_id=sae_id,
            evaluation=evaluation,
            baseline=baseline,
            features=features,
            unit_norm=unit_norm,
            take_any_norm=take_any_norm,
        )
        record = of_record(staged / sae_id)
        base_model = base_model or encoder_on_hub(record.encoder)
        dataset = dataset or images_on_hub(record.dataset)
        metadata = {
            "license": license,
            "tags": tags,
            "base_model": [base_model] if base_model else [],
            "datasets": [dataset] if dataset else [],
        }
        ours = {f"{sae_id}/{file}" for file in FILES}
        done = publish(
            Staged(staged, ours.__contains__, _Card(staged, repo_id, metadata, token)),
            Target(repo_id, "model", private, token, overwrite, dry_run),
            f"Publish {sae_id}",
        )
        return replace(done, name=sae_id)


def stage_sae(
    sae: SAE[Any] | str | Path,
    root: Path,
    *,
    sae_id: str | None,
    evaluation: Metrics | None,
    baseline: Metrics | None,
    features: FeatureSet | None,
    unit_norm: bool | None,
    take_any_norm: bool,
) -> str:
    """Write all that is published of an SAE into ``root/sae_id``, and return the ``sae_id``.

    Args and errors: as for :func:`publish_sae`.
    """
    with tempfile.TemporaryDirectory(dir=root, prefix=".") as beside:
        folder = Path(beside) / "sae"
        given = _given(sae)
        # Written and loaded again: what is published is what others will load.
        sae_folder.write(given.sae, folder)
        plain = sae_folder.load(folder, "sae")
        record = _record(given.record, plain, evaluation, baseline, features)
        inputs = _inputs(record, unit_norm)
        if take_any_norm:
            plain = _taking_any_norm(plain, inputs)
            inputs = "as they are"
            sae_folder.write(plain, folder)
        record = replace(record, inputs=inputs)
        write_record(record, folder)
        sae_folder.note_inputs(folder, inputs)
        sparsity = given.sparsity
        if isinstance(evaluation, Evaluation):
            sparsity = torch.log10(evaluation.frequency.float() + _NEVER)
            _draw(folder / CURVES, record, evaluation, baseline)
        elif evaluation is None and given.picture is not None:
            _keep_picture(given.picture, folder / CURVES)
        if sparsity is not None:
            save_file({"sparsity": _of_width(sparsity, plain)}, folder / sae_folder.SPARSITY)
        sae_id = sae_id or _named(folder, plain, record)
        target = root / _require_folder(sae_id)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    return sae_id


@dataclass(frozen=True)
class _Given:
    """What is to be published, and what its folder knows of it, where it comes from one."""

    sae: SAE[Any]
    record: SAERecord = field(default_factory=SAERecord)
    sparsity: Tensor | None = None
    picture: Path | None = None


def _given(sae: SAE[Any] | str | Path) -> _Given:
    if isinstance(sae, SAE):
        return _Given(sae)
    folder = as_path(sae, "sae", "a SAELens SAE or a folder")
    require_folder(folder, "sae")
    loaded = sae_folder.load(folder, str(folder))
    sparsity = sae_folder.sparsity_of(folder, str(folder), loaded.cfg.d_sae)
    picture = folder / CURVES
    return _Given(loaded, of_record(folder), sparsity, picture if picture.is_file() else None)


def of_record(folder: Path) -> SAERecord:
    """Return the record in an SAE's folder; an empty one where there is none."""
    path = folder / RECORD
    return record_from(read_json(path), str(path)) if path.is_file() else SAERecord()


@dataclass(frozen=True)
class _Card:
    """Makes the card of a repository from what it holds and what is added."""

    staged: Path
    repo_id: str
    metadata: Mapping[str, Any]
    token: str | bool | None

    def __call__(self, existing: Existing) -> str:
        added = listed(of_folder(self.staged))
        there = []
        names = [path.relative_to(self.staged).as_posix() for path in self.staged.rglob(CURVES)]
        if existing.commit is not None:
            there = listed(of_hub(self.repo_id, "model", existing.commit, token=self.token))
            names += existing.hashes
        curves = [str(file.parent) for file in map(PurePosixPath, names) if file.name == CURVES]
        every = {one.sae_id: one for one in (*there, *added)}
        ordered = [every[sae_id] for sae_id in sorted(every)]
        return model_card(existing.card, self.repo_id, ordered, curves, self.metadata)


def _taking_any_norm(plain: SAE[Any], inputs: Inputs) -> SAE[Any]:
    """Return an SAE of unit-norm inputs as one that scales its inputs itself."""
    architecture = plain.cfg.architecture()
    if architecture not in _SCALABLE:
        raise ValueError(f"take_any_norm: not for {architecture}, only for {', '.join(_SCALABLE)}")
    if inputs != "unit norm" or plain.cfg.normalize_activations != "none":
        raise ValueError(
            "take_any_norm: only for an SAE that was trained on features of unit norm and does not "
            f"scale them itself (normalize_activations={plain.cfg.normalize_activations!r})"
        )
    # SAELens scales to the square root of d_in; folding its inverse brings that back to 1.
    plain.fold_activation_norm_scaling_factor(plain.cfg.d_in**-0.5)
    plain.cfg.normalize_activations = "constant_norm_rescale"
    return plain


def _record(
    known: SAERecord,
    sae: SAE[Any],
    evaluation: Metrics | None,
    baseline: Metrics | None,
    features: FeatureSet | None,
) -> SAERecord:
    """Return what is known of an SAE: from the SAE, the features and the measurements."""
    own = record_in(sae)
    record = replace(
        known,
        losses=own.losses or known.losses,
        inputs=known.inputs or own.inputs,
        converted_from=own.converted_from or known.converted_from,
        versions={
            "monoloss_plugin": __version__,
            "sae_lens": version("sae-lens"),
            "torch": torch.__version__,
        },
    )
    if features is not None:
        known_of = features.record
        record = replace(record, encoder=known_of.encoder, dataset=known_of.source)
    if evaluation is None:
        if baseline is not None:
            raise ValueError("baseline: needs an evaluation to compare it with")
        return record
    on: dict[str, Any] = {}
    if features is not None:
        on = {"samples": len(features), "split": _split_of(record.dataset)}
    return replace(
        record,
        metrics=_numbers(evaluation, "evaluation"),
        baseline={} if baseline is None else _numbers(baseline, "baseline"),
        evaluated_on=on,
    )


def _inputs(known: SAERecord, unit_norm: bool | None) -> Inputs:
    """Return what the SAE takes, as it was said or is known."""
    if unit_norm is None:
        return known.inputs or "unit norm"
    said: Inputs = "unit norm" if unit_norm else "as they are"
    if known.inputs not in (None, said):
        raise ValueError(f"unit_norm: the SAE's own record says that it takes {known.inputs!r}")
    return said


def _require_features(features: Any) -> None:
    from monoloss_plugin.features import FeatureSet

    if not isinstance(features, FeatureSet):
        raise TypeError(f"features: expected a FeatureSet, got {features!r}")


def _require_folder(sae_id: str) -> str:
    """Return the name of an SAE's folder, which no file of a repository has."""
    if require_inside(sae_id, "sae_id").partition("/")[0] == CARD:
        raise ValueError(f"sae_id: {CARD} is the card's name")
    return sae_id


def _split_of(source: Mapping[str, Any]) -> str:
    return str(source.get("split") or source.get("name") or "not named")


def _numbers(metrics: Metrics, name: str) -> dict[str, float]:
    if isinstance(metrics, Evaluation):
        return finite(metrics.summary())
    if not isinstance(metrics, Mapping) or not all(isinstance(v, Real) for v in metrics.values()):
        raise TypeError(f"{name}: expected an Evaluation or numbers by name, got {metrics!r}")
    return finite({str(key): float(value) for key, value in metrics.items()})


def _draw(path: Path, record: SAERecord, evaluation: Evaluation, baseline: Metrics | None) -> None:
    from monoloss_plugin.report import curves_figure

    added = " + ".join(str(term["name"]) for term in record.losses)
    curves = {f"with {added}" if added else "MonoScore": [evaluation.monoscore.curve()]}
    if isinstance(baseline, Evaluation):
        curves = {f"without {added or 'the losses'}": [baseline.monoscore.curve()], **curves}
    # No time or version in it, so that the same curves make the same file.
    curves_figure(curves).savefig(path, dpi=110, metadata={"Software": None})


def _keep_picture(source: Path, target: Path) -> None:
    """Copy a PNG picture; another file of that name, or what a link leads to, is refused."""
    if source.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{source}: not a PNG picture")
    shutil.copyfile(source, target)


def _of_width(sparsity: Tensor, sae: SAE[Any]) -> Tensor:
    if sparsity.shape != (sae.cfg.d_sae,):
        raise ValueError(
            f"evaluation: of {len(sparsity)} latents, but this SAE has {sae.cfg.d_sae}"
        )
    return sparsity.float().contiguous()


def _named(folder: Path, sae: SAE[Any], record: SAERecord) -> str:
    trained_as = sae_folder.trained_as(read_json(folder / sae_folder.CONFIG))
    losses = (f"-{term['name']}-{term['lam']:g}" for term in record.losses)
    return re.sub(
        r"[^\w.+=-]", "-", f"{trained_as}-{sae.cfg.d_sae}{''.join(losses)}", flags=re.ASCII
    )

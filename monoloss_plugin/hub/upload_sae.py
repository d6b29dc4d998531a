"""Publish a trained SAE."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens import SAE

from monoloss_plugin._checks import require_text
from monoloss_plugin.gallery.samples import ActivatingSamples
from monoloss_plugin.hub.cards import hub_id
from monoloss_plugin.hub.illustrations import find_pictures, require_report
from monoloss_plugin.hub.model_card import model_card
from monoloss_plugin.hub.names import require_hub_name, require_texts
from monoloss_plugin.hub.record import read_record
from monoloss_plugin.hub.repository import Repository, repository_in
from monoloss_plugin.hub.sae_files import FILES, Metrics, SAEContent, write_sae
from monoloss_plugin.hub.saes import file_of, sae_ids
from monoloss_plugin.hub.upload import Destination, Plan, Publication, plan_upload, send

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet


def publish_sae(
    sae: SAE[Any] | str | Path,
    repo_id: str,
    *,
    sae_id: str | None = None,
    evaluation: Metrics | ActivatingSamples | None = None,
    baseline: Metrics | None = None,
    controls: Mapping[str, Metrics] | None = None,
    features: FeatureSet | None = None,
    images: Any = None,
    report: str | Path | None = None,
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
            measurements in a folder's record are published. With ``images``, you may pass what
            :func:`~monoloss_plugin.gallery.samples.activating_samples` returns instead, which
            saves a pass over the features.
        baseline: the same of an SAE trained without the losses, to compare with.
        controls: the same of SAEs that have learnt nothing, by name, such as the evaluations of
            :func:`~monoloss_plugin.saes.make_baseline`. The card shows them beside the SAE.
        features: the ``FeatureSet`` that you evaluated on. Its record names encoder and images.
        images: the images of ``features``, as
            :func:`~monoloss_plugin.gallery.pictures.open_pictures` takes or returns them. The card
            then shows six latents, each with the six images that activate it most. Without this
            argument, no image is published: check first that their licence allows it.
        report: a page that ``monoloss report`` wrote, to publish beside the SAE. It holds images
            too, and the names that you gave to the SAEs.
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
        FileNotFoundError: there is no such folder, report or images, or no SAE in the folder.
        PermissionError: ``private`` is asked for, but the repository is there and public.
        TypeError, ValueError: an argument is wrong; the SAE cannot be published as it is, such as
            the folder of a training checkpoint; the images do not fit the features; the report is
            a link, larger than 60 MB or no report; or the Hub rejects the card's metadata.
        Exception: what ``huggingface_hub`` raises, such as its ``HfHubHTTPError`` with status 412
            if somebody else commits at the same moment; run it again.
    """
    samples = None
    if isinstance(evaluation, ActivatingSamples):
        samples, evaluation = evaluation, evaluation.evaluation
    content = SAEContent(
        sae,
        evaluation,
        baseline,
        features,
        unit_norm,
        take_any_norm,
        controls,
        samples,
        pictures=None if images is None else find_pictures(images, features),
        report=None if report is None else require_report(report),
    )
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
        return send(plan_saes(repository_in(root, sae_id), to, metadata), sae_id)


def plan_saes(added: Repository, to: Destination, metadata: Mapping[str, Any]) -> Plan:
    """Plan to upload the SAEs of a local repository, beside those that are there.

    Args:
        added: their files, in a local folder.
        to: the repository of the Hub.
        metadata: license, tags, encoders and images for the card's metadata.
    """
    files = {file_of(sae_id, file) for sae_id in sae_ids(added) for file in FILES}

    def write_card(existing: str, there: Repository | None) -> str:
        return model_card(existing, to.repo_id, [there, added], metadata)

    return plan_upload(added, to, owns=files.__contains__, write_card=write_card)

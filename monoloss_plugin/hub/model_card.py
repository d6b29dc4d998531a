"""The card of a repository of SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import hf_hub_url

from monoloss_plugin._samples import compared_in_training
from monoloss_plugin.hub.cards import escape, merge_card, metadata_list, settings_table, table
from monoloss_plugin.hub.illustrations import CURVES, ILLUSTRATIONS, LATENTS, REPORT
from monoloss_plugin.hub.names import features_beside
from monoloss_plugin.hub.record import RECORD, SAERecord
from monoloss_plugin.hub.repository import Repository, api, page_of
from monoloss_plugin.hub.saes import Listed, file_of, list_saes
from monoloss_plugin.results import IMAGE_MEASURES, MEASURES

_TAGS = ["sparse-autoencoder", "monoloss", "monosemanticity", "interpretability", "saelens"]
_IN_OVERVIEW = ("r2", "monoscore", "monoscore_adjusted", "purity_binary", "l0", "dead_latents")

_ABOUT = """\
Sparse autoencoders in [SAELens](https://github.com/decoderesearch/SAELens)'s format, published with
monoloss_plugin. MonoLoss ([arXiv 2602.12403](https://arxiv.org/abs/2602.12403)) is a training
objective that rewards latents that respond to one thing; MonoScore measures it."""

_LOAD = """\
With SAELens alone:

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{sae_id}")
```

With monoloss_plugin, which also says what the SAE was trained with and what it scored:

```python
from monoloss_plugin import load_pretrained

loaded = load_pretrained("{repo_id}", "{sae_id}")
loaded.sae, loaded.record.lam, loaded.record.metrics
```"""


def model_card(
    existing: str,
    repo_id: str,
    repositories: Sequence[Repository | None],
    metadata: Mapping[str, Any],
) -> str:
    """Return the card of a repository of SAEs.

    Args:
        existing: the text of the card that is there; empty if there is none.
        repo_id: ``user/name``.
        repositories: the repository, if there is one, and then what is added to it.
        metadata: license, tags, encoder and images for the card's metadata.
    """
    listed: dict[str, Listed] = {}
    sizes: dict[str, int] = {}
    for repository in filter(None, repositories):
        here = list_saes(repository)
        listed |= {one.sae_id: one for one in here}
        replaced = {file_of(one.sae_id, file) for one in here for file in ILLUSTRATIONS}
        kept = {path: size for path, size in sizes.items() if path not in replaced}
        sizes = {**kept, **repository.sizes}
    saes = [listed[sae_id] for sae_id in sorted(listed)]
    parts = [_ABOUT, "## SAEs", _overview(saes)]
    for one in saes:
        parts += [_section(one), *_illustrations(one, repo_id, sizes), _origin(one)]
    linked, features = metadata_list(existing, "datasets"), features_beside(repo_id)
    if features in (*linked, *metadata["datasets"]):
        link = f"[`{features}`]({page_of(features, 'dataset')})"
        parts += ["## Features", f"The features that these SAEs take: {link}."]
    parts += ["## Load", _LOAD.format(repo_id=repo_id, sae_id=saes[0].sae_id)]
    tags = [*_TAGS, *metadata["tags"]]
    ours = {"library_name": "saelens", **metadata, "tags": tags}
    return merge_card(existing, repo_id, parts, ours)


def _overview(saes: Sequence[Listed]) -> str:
    header = ["SAE", "architecture", "latents", "losses", *(MEASURES[m] for m in _IN_OVERVIEW)]
    rows = []
    for one in saes:
        terms = (f"{term['name']} {term['lam']}" for term in one.record.losses)
        numbers = (_number(one.record.metrics.get(measure), measure) for measure in _IN_OVERVIEW)
        losses = escape(", ".join(terms)) or "none"
        rows.append([f"`{one.sae_id}`", escape(one.architecture), one.d_sae, losses, *numbers])
    return table(header, rows)


def _section(one: Listed) -> str:
    record = one.record
    parts = [f"### `{one.sae_id}`"]
    if record.inputs == "unit norm":
        parts.append(
            f"Takes features (N, {one.d_in}) **of unit norm**: divide each by its length first."
        )
    elif record.inputs == "as they are":
        parts.append(f"Takes features (N, {one.d_in}) as the encoder gives them.")
    if record.converted_from:
        parts.append(f"Converted from a checkpoint of {escape(record.converted_from)}.")
    if record.refit:
        before, after = (_number(record.refit.get(m), "r2") for m in ("r2_before", "r2_after"))
        parts.append(
            "The decoder was refitted after training, with the same latents: held-out R² "
            f"{after} instead of {before}."
        )
    if record.metrics:
        samples = (f"{escape(k)} {escape(v)}" for k, v in record.evaluated_on.items())
        if record.evaluated_on:
            parts.append(f"Measured on: {', '.join(samples)}.")
        if trained := compared_in_training(record.losses):
            parts.append(f"MonoLoss compared samples by {escape(trained)}.")
        parts.append(_measurements(record))
        if record.controls:
            names = ", ".join(escape(name) for name in record.controls)
            parts.append(f"These have learnt nothing, or no more than their name says: {names}.")
    return "\n\n".join(parts)


def _illustrations(one: Listed, repo_id: str, sizes: Mapping[str, int]) -> list[str]:
    """Return what the card shows of the files that the repository has."""
    curves, latents, report = (file_of(one.sae_id, file) for file in (CURVES, LATENTS, REPORT))
    parts = []
    if curves in sizes:
        parts.append(f"![MonoScore of every latent, sorted]({curves})")
    if latents in sizes and (shown := one.record.latents_shown):
        ranked = "above chance"
        if not shown["above_chance"]:
            ranked = "that have a score (none is above chance)"
        numbers, ranks = _listed(shown["latents"]), _listed(shown["ranks"])
        parts.append(f"![Images that activate latents {numbers} most]({latents})")
        parts.append(
            "You see latents with the images that activate them most, strongest first. They are "
            f"not only the best ones: of the {shown['of']} latents {ranked}, sorted by MonoScore "
            f"above chance, these are number {ranks}."
        )
    if report in sizes:
        # A relative link would lead to the Hub's view of the file, which shows no large file.
        link = hf_hub_url(repo_id, report, endpoint=api(None).endpoint)
        parts.append(
            f"A page with all latents and their images: [{REPORT}]({link}?download=true) "
            f"({sizes[report] / 1e6:.1f} MB). Download it, and open it in a browser."
        )
    return parts


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _origin(one: Listed) -> str:
    parts, record = [], one.record
    for name, settings in (("Encoder", record.encoder), ("Images", record.dataset)):
        if settings:
            parts.append(f"{name}:\n\n{settings_table(settings)}")
    parts.append(f"The full record is in `{file_of(one.sae_id, RECORD)}`.")
    return "\n\n".join(parts)


def _measurements(record: SAERecord) -> str:
    columns = {"": record.metrics}
    if record.baseline:
        names = " + ".join(str(term["name"]) for term in record.losses)
        added = escape(names or "the losses")
        columns = {f"without {added}": record.baseline, f"with {added}": record.metrics}
    columns |= {escape(name): numbers for name, numbers in record.controls.items()}
    labels = MEASURES | IMAGE_MEASURES
    usual = [measure for measure in labels if measure in record.metrics]
    others = [measure for measure in record.metrics if measure not in labels]
    rows = [
        [labels.get(m) or escape(m), *(_number(column.get(m), m) for column in columns.values())]
        for m in (*usual, *others)
    ]
    return table(("measure", *columns), rows)


def _number(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if measure in ("dead_latents", "num_images") else f"{value:.3f}"

"""The card of a repository of SAEs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.evaluation import MEASURES
from monoloss_plugin.hub.cards import escaped, images_on_hub, merged, settings_table, table
from monoloss_plugin.hub.pretrained import Listed, at
from monoloss_plugin.hub.record import RECORD, SAERecord

try:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

CURVES = "curves.png"

_TAGS = ["sparse-autoencoder", "monoloss", "monosemanticity", "interpretability", "saelens"]
_SHOWN = ("r2", "monoscore", "purity_binary", "l0", "dead_latents")

_ABOUT = """\
Sparse autoencoders in [SAELens](https://github.com/decoderesearch/SAELens)'s format, published with
monoloss_plugin. MonoLoss ([arXiv 2602.12403](https://arxiv.org/abs/2602.12403)) is a training
objective that rewards latents that respond to one thing; MonoScore measures it."""


def model_card(
    existing: str,
    repo_id: str,
    saes: Sequence[Listed],
    curves: Sequence[str],
    metadata: Mapping[str, Any],
) -> str:
    """Return the card of a repository with these SAEs.

    Args:
        existing: the card that is there, or nothing.
        repo_id: ``user/name``.
        saes: all that the repository holds.
        curves: names of those that have a picture of their curves.
        metadata: of the card, beside the metrics.
    """
    parts = [_ABOUT, "## SAEs", _overview(saes)]
    parts += [_section(one, one.sae_id in curves) for one in saes]
    parts += ["## Load", _loading(repo_id, saes[0])]
    index = [
        entry
        for one in saes
        if (results := _results(one))
        for entry in eval_results_to_model_index(one.sae_id, results)
    ]
    described = {
        "library_name": "saelens",
        **{key: value for key, value in metadata.items() if value},
        "tags": [*_TAGS, *metadata.get("tags", ())],
        **({"model-index": index} if index else {}),
    }
    return merged(existing, repo_id.partition("/")[2], "\n\n".join(parts), described)


def _overview(saes: Sequence[Listed]) -> str:
    header = ["SAE", "architecture", "latents", "losses", *(MEASURES[m] for m in _SHOWN)]
    rows = []
    for one in saes:
        metrics = one.record.metrics
        cells = [f"`{one.sae_id}`", escaped(one.architecture), one.d_sae, _losses(one.record)]
        rows.append([*cells, *(_number(metrics.get(m), m) for m in _SHOWN)])
    return table(header, rows)


def _section(one: Listed, has_curves: bool) -> str:
    record = one.record
    parts = [f"### `{one.sae_id}`"]
    if record.inputs == "unit norm":
        parts.append(
            f"Takes features (N, {one.d_in}) **of unit norm**: divide each by its length first."
        )
    elif record.inputs == "as they are":
        parts.append(f"Takes features (N, {one.d_in}) as the encoder gives them.")
    if record.converted_from:
        parts.append(f"Converted from a checkpoint of {escaped(record.converted_from)}.")
    if record.metrics:
        parts.append(_comparison(record))
    if has_curves:
        parts.append(f"![MonoScore of every latent, sorted]({at(one.sae_id, CURVES)})")
    for name, settings in (("Encoder", record.encoder), ("Images", record.dataset)):
        if settings:
            parts.append(f"{name}:\n\n{settings_table(settings)}")
    parts.append(f"Everything that is known of it: `{at(one.sae_id, RECORD)}`.")
    return "\n\n".join(parts)


def _comparison(record: SAERecord) -> str:
    names = _ordered(record.metrics)
    if not record.baseline:
        rows = [[_label(m), _number(record.metrics[m], m)] for m in names]
        return _on(record) + table(("measure", ""), rows)
    added = escaped(" + ".join(str(t.get("name", "loss")) for t in record.losses) or "the losses")
    rows = [
        [_label(m), _number(record.baseline.get(m), m), _number(record.metrics[m], m)]
        for m in names
    ]
    return _on(record) + table(("measure", f"without {added}", f"with {added}"), rows)


def _on(record: SAERecord) -> str:
    if not record.evaluated_on:
        return ""
    said = ", ".join(
        f"{escaped(k.replace('_', ' '))} {escaped(v)}" for k, v in record.evaluated_on.items()
    )
    return f"Measured on: {said}.\n\n"


def _ordered(metrics: Mapping[str, float]) -> list[str]:
    """Return the measures' names: those of an evaluation first, in their order."""
    known = [measure for measure in MEASURES if measure in metrics]
    return [*known, *(measure for measure in metrics if measure not in MEASURES)]


def _label(measure: str) -> str:
    return MEASURES.get(measure) or escaped(measure)


def _losses(record: SAERecord) -> str:
    said = [f"{term.get('name', 'loss')} {term.get('lam', '')}" for term in record.losses]
    return escaped(", ".join(said)) or "none"


def _number(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if measure == "dead_latents" else f"{value:.3f}"


def _results(one: Listed) -> list[EvalResult]:
    record = one.record
    named = str(record.dataset.get("name") or "not named")
    return [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=images_on_hub(record.dataset) or "features",
            dataset_name=named,
            metric_type=measure if which == "" else f"{measure}_baseline",
            metric_name=f"{MEASURES.get(measure, measure)}{which}",
            metric_value=metrics[measure],
        )
        for which, metrics in (("", record.metrics), (" (without the losses)", record.baseline))
        for measure in _ordered(metrics)
    ]


def _loading(repo_id: str, one: Listed) -> str:
    return f"""\
With SAELens alone:

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{one.sae_id}")
```

With monoloss_plugin, which also says what it was trained with and how it scored:

```python
from monoloss_plugin import load_pretrained

loaded = load_pretrained("{repo_id}", "{one.sae_id}")
loaded.sae, loaded.record.lam, loaded.record.metrics
```"""

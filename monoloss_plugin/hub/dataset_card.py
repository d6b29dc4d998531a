"""The card of a repository of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monoloss_plugin.features import FeatureRecord
from monoloss_plugin.hub.cards import escaped, merged, opened, settings_table, table

_TAGS = ["image-features", "embeddings", "sparse-autoencoder", "monoloss"]

_ABOUT = """\
Features of images from a frozen encoder, one vector an image, for training and measuring sparse
autoencoders. Extracted and published with monoloss_plugin; any reader of Parquet reads them."""


@dataclass(frozen=True)
class PublishedSplit:
    """What a card says of a split."""

    config: str
    split: str
    files: str
    """Pattern of its Parquet files."""
    record: FeatureRecord
    """Encoder, source, and how many rows of which width and type."""


def dataset_card(
    existing: str, repo_id: str, splits: Sequence[PublishedSplit], metadata: Mapping[str, Any]
) -> str:
    """Return the card of a repository with these splits.

    Args:
        existing: the card that is there, or nothing.
        repo_id: ``user/name``.
        splits: all that the repository holds.
        metadata: of the card, beside where the files of each split are.
    """
    configs: dict[str, list[dict[str, str]]] = {}
    for one in splits:
        files = {"split": one.split, "path": one.files}
        configs.setdefault(one.config, []).append(files)
    described = {
        "configs": [
            {"config_name": config, "data_files": files} for config, files in configs.items()
        ],
        "task_categories": ["image-feature-extraction"],
        **{key: value for key, value in metadata.items() if value},
        "tags": [*_TAGS, *metadata.get("tags", ())],
    }
    rows = [
        (
            f"`{one.config}`",
            f"`{one.split}`",
            escaped(f"{one.record.rows or '?'} x {one.record.width or '?'}"),
            escaped(one.record.dtype or ""),
            escaped(one.record.encoder.get("name", "not said")),
            escaped(one.record.source.get("name", "not said")),
        )
        for one in splits
    ]
    parts = [
        _ABOUT,
        "## Splits",
        table(("configuration", "split", "size", "type", "encoder", "images"), rows),
        *(_encoder(one) for one in _first_of_each_config(splits)),
        "## Columns",
        "`features`, the vectors, not normalised; `label` where the images have one; `image_id`.",
        "## Licence",
        "Features are made from images and with an encoder that have licences of their own. The "
        "licence in this card's metadata, where there is one, is the publisher's word for the "
        "features alone.",
        "## Load",
        _loading(repo_id, splits[0]),
    ]
    existing = _without_info(existing, set(configs))
    return merged(existing, repo_id.partition("/")[2], "\n\n".join(parts), described)


def _without_info(existing: str, configs: set[str]) -> str:
    """Return a card without its sizes of these splits, which ``datasets`` would insist on."""
    if not existing:
        return existing
    card = opened(existing)
    info = card.data.get("dataset_info")
    entries = info if isinstance(info, list) else [info] if isinstance(info, dict) else []
    kept = [e for e in entries if e.get("config_name", "default") not in configs]
    if len(kept) == len(entries):
        return existing
    if kept:
        card.data["dataset_info"] = kept
    else:
        card.data.pop("dataset_info")
    return str(card.content)


def _first_of_each_config(splits: Sequence[PublishedSplit]) -> list[PublishedSplit]:
    return list({one.config: one for one in reversed(splits)}.values())[::-1]


def _encoder(one: PublishedSplit) -> str:
    encoder = dict(one.record.encoder)
    preprocessing = encoder.pop("preprocessing", {})
    parts = [f"## Encoder of `{one.config}`", settings_table(encoder)]
    if isinstance(preprocessing, Mapping) and preprocessing:
        steps = {k: v for k, v in preprocessing.items() if v is not None}
        rows = [(escaped(key.replace("_", " ")), escaped(value)) for key, value in steps.items()]
        parts += ["Preprocessing, as its library names it:", table(("", ""), rows)]
    return "\n\n".join(parts)


def _loading(repo_id: str, one: PublishedSplit) -> str:
    config = "" if one.config == "default" else f', "{one.config}"'
    ours = "" if one.config == "default" else f', config="{one.config}"'
    return f"""\
```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}"{config}, split="{one.split}")
```

For training, as shuffled batches of unit norm:

```python
from monoloss_plugin import load_features
from monoloss_plugin.features import FeatureBatches

features = load_features("{repo_id}", "{one.split}"{ours})
batches = FeatureBatches(features, batch_size=2048)
```"""

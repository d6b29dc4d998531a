"""The card of a repository of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monoloss_plugin.features import FeatureRecord
from monoloss_plugin.hub.cards import escape, merge_card, parse_card, settings_table, table
from monoloss_plugin.hub.features import DEFAULT, Split

_TAGS = ["image-features", "embeddings", "sparse-autoencoder", "monoloss"]

_ABOUT = """\
Features of images from a frozen encoder, one vector per image, for training and measuring sparse
autoencoders. Published with monoloss_plugin; any reader of Parquet can read them.

## Splits"""

_COLUMNS_AND_LICENCE = """\
## Columns

`features`: the vectors, not normalised. `label`: if the images have labels. `image_id`.

## Licence

The images and the encoder have licences of their own. The licence in this card's metadata, if there
is one, is the publisher's word for the features alone.

## Load
"""

_LOAD = """\
```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}"{config}, split="{split}")
```

For training, as shuffled batches of unit norm:

```python
from monoloss_plugin import load_features
from monoloss_plugin.features import FeatureBatches

features = load_features("{repo_id}", "{split}"{config_argument})
batches = FeatureBatches(features, batch_size=2048)
```"""


def dataset_card(
    existing: str,
    repo_id: str,
    records: Mapping[Split, FeatureRecord],
    metadata: Mapping[str, Any],
) -> str:
    """Return the card of a repository of features.

    Args:
        existing: the text of the card that is there; empty if there is none.
        repo_id: ``user/name``.
        records: the record of every split that the repository will hold.
        metadata: license, tags and images for the card's metadata.
    """
    splits = sorted(records)
    first_of_config = {split.config: split for split in reversed(splits)}
    rows = [_row(split, records[split]) for split in splits]
    parts = [
        _ABOUT,
        table(("configuration", "split", "size", "type", "encoder", "images"), rows),
        *(_encoder(first_of_config[c], records) for c in sorted(first_of_config)),
        _COLUMNS_AND_LICENCE,
        _LOAD.format(
            repo_id=repo_id,
            split=splits[0].split,
            config="" if splits[0].config == DEFAULT else f', "{splits[0].config}"',
            config_argument="" if splits[0].config == DEFAULT else f', config="{splits[0].config}"',
        ),
    ]
    files: dict[str, list[dict[str, str]]] = {}
    for split in splits:
        files.setdefault(split.config, []).append({"split": split.split, "path": split.pattern})
    described = {
        "configs": [{"config_name": name, "data_files": paths} for name, paths in files.items()],
        "task_categories": ["image-feature-extraction"],
        **{key: value for key, value in metadata.items() if value},
        "tags": [*_TAGS, *metadata["tags"]],
    }
    if existing:
        card = parse_card(existing)
        # push_to_hub writes the splits' sizes there, and load_dataset fails when they are old.
        card.data.pop("dataset_info", None)
        existing = str(card.content)
    return merge_card(existing, repo_id.partition("/")[2], "\n\n".join(parts), described)


def _row(split: Split, record: FeatureRecord) -> list[str]:
    return [
        f"`{split.config}`",
        f"`{split.split}`",
        escape(f"{record.rows or '?'} x {record.width or '?'}"),
        escape(record.dtype or ""),
        escape(record.encoder.get("name", "not said")),
        escape(record.source.get("name", "not said")),
    ]


def _encoder(split: Split, records: Mapping[Split, FeatureRecord]) -> str:
    encoder = records[split].encoder
    parts = [f"## Encoder of `{split.config}`", settings_table(encoder)]
    preprocessing = encoder.get("preprocessing")
    if isinstance(preprocessing, Mapping) and preprocessing:
        steps = {name: str(step) for name, step in preprocessing.items() if step is not None}
        parts += ["Preprocessing, in the words of its library:", settings_table(steps)]
    return "\n\n".join(parts)

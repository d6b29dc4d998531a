"""The cards of repositories: our part of ``README.md``, beside what the owner has written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monoloss_plugin._optional import missing_extra

try:
    from huggingface_hub import RepoCard
    from yaml import YAMLError
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_NAMED = {"model-index": "name", "configs": "config_name"}
"""Lists in the metadata whose entries have names."""

_BEGIN, _END = "<!-- monoloss_plugin writes from here -->", "<!-- to here -->"
_OURS = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~>-])")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def escaped(text: object) -> str:
    """Return a text that a card shows as it is: no markup, links, tags or lines of its own."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    shown = shown.replace("&", "&amp;").replace("<", "&lt;")
    # Bare addresses become links by their colon or their www.
    shown = _MARKDOWN.sub(r"\\\1", shown).replace("://", "&#58;//").replace("www.", "www&#46;")
    return shown.replace("@", "&#64;")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; cells are shown as they are."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def opened(existing: str, title: str = "") -> RepoCard:
    """Read a card; make one, with a title, where there is none.

    Raises:
        ValueError: its metadata is not YAML.
    """
    content = existing or f"# {escaped(title)}\n"
    if not content.lstrip().startswith("---"):
        content = f"---\n{{}}\n---\n\n{content}"
    try:
        return RepoCard(content)
    except (YAMLError, ValueError) as error:
        raise ValueError(
            f"README.md: the metadata of the card that is there is not YAML; mend it first: {error}"
        ) from error


def merged(existing: str, title: str, ours: str, metadata: Mapping[str, Any]) -> str:
    """Return a card with our part in it, what the owner has written around it kept.

    Args:
        existing: the card that is there, or nothing.
        title: of a new card.
        ours: the part between our marks.
        metadata: of the card. Of ``configs`` and ``model-index`` the entries of our names replace
            those that are there; other lists are added to; of the rest what is there counts.

    Raises:
        ValueError: the existing card's metadata is not YAML.
    """
    card = opened(existing, title)
    part = f"{_BEGIN}\n\n{ours.strip()}\n\n{_END}"
    text = card.text
    if _OURS.search(text):
        text = _OURS.sub(lambda _: part, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{part}\n"
    for key, value in metadata.items():
        there = card.data.get(key)
        before = there if isinstance(there, list) else [] if there is None else [there]
        if key in _NAMED:
            names = {entry[_NAMED[key]] for entry in value}
            kept = [e for e in before if not isinstance(e, dict) or e.get(_NAMED[key]) not in names]
            card.data[key] = [*kept, *value]
        elif isinstance(value, list):
            card.data[key] = [*before, *(one for one in value if one not in before)]
        elif there is None:
            card.data[key] = value
    return f"---\n{card.data.to_yaml()}\n---\n{text}"


def encoder_on_hub(encoder: Mapping[str, Any]) -> str | None:
    """Return the Hub's repository of a record's encoder; None where its name does not tell it."""
    name = str(encoder.get("name", ""))
    on_hub = name.startswith(("hf-hub:", "hf_hub:"))  # as open_clip and timm write it
    if not on_hub and encoder.get("library") != "transformers":
        return None  # open_clip's ViT-L-14/openai only looks like one
    return _hub_id(name[len("hf-hub:") :].partition("@")[0] if on_hub else name)


def images_on_hub(source: Mapping[str, Any]) -> str | None:
    """Return the Hub's repository of a record's images; None where they are not from there."""
    return _hub_id(str(source.get("name", ""))) if source.get("kind") == "hub" else None


def _hub_id(name: str) -> str | None:
    return name if _HUB_ID.fullmatch(name) else None


def settings_table(settings: Mapping[str, Any]) -> str:
    """Return a table of a record's plain values; what is nested is left to the JSON file."""
    rows = [
        (escaped(key.replace("_", " ")), escaped(value))
        for key, value in settings.items()
        if isinstance(value, (str, int, float, bool)) and value != ""
    ]
    return table(("", ""), rows)

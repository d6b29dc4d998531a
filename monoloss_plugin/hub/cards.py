"""The cards of repositories: this package's part of ``README.md``, beside the owner's text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import RepoCard
from yaml import YAMLError

CARD = "README.md"

_BEGIN, _END = "<!-- monoloss_plugin writes from here -->", "<!-- to here -->"
_OUR_PART = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~>-])")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def escape(text: object) -> str:
    """Return a text that Markdown shows as it is, without markup, links, tags or line breaks."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    shown = shown.replace("&", "&amp;").replace("<", "&lt;")
    # The Hub makes links of bare addresses, by their colon or their www.
    shown = _MARKDOWN.sub(r"\\\1", shown).replace("://", "&#58;//").replace("www.", "www&#46;")
    return shown.replace("@", "&#64;")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table. Cells must be escaped already."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def settings_table(settings: Mapping[str, Any]) -> str:
    """Return a table of names and values, without nested and empty values."""
    return table(
        ("", ""),
        (
            (escape(name.replace("_", " ")), escape(value))
            for name, value in settings.items()
            if isinstance(value, (str, int, float, bool)) and value != ""
        ),
    )


def parse_card(text: str, title: str = "") -> RepoCard:
    """Read a card, or start one with a title if the text is empty."""
    content = text or f"# {escape(title)}\n"
    if not content.lstrip().startswith("---"):
        content = f"---\n{{}}\n---\n\n{content}"
    try:
        return RepoCard(content)
    except (YAMLError, ValueError) as error:
        raise ValueError(
            f"{CARD}: the metadata of the repository's card is not YAML; mend it first: {error}"
        ) from error


def metadata_list(card: str, key: str) -> list[Any]:
    """Return an entry of a card's metadata as a list; it may be one value, or none."""
    return _as_list(parse_card(card).data.get(key))


def merge_card(
    existing: str, repo_id: str, parts: Sequence[str], metadata: Mapping[str, Any]
) -> str:
    """Put this package's part into a card, and keep what the owner has written around it.

    Args:
        existing: the card's text; empty if there is none.
        repo_id: ``user/name``.
        parts: what to write between the two marks.
        metadata: what to add to the card's metadata, without empty values. An entry of ``configs``
            replaces the one of the same name. Other lists are extended. The owner's values stay.
    """
    card = parse_card(existing, repo_id.partition("/")[2])
    ours = "\n\n".join((_BEGIN, *parts, _END))
    text = card.text
    if _OUR_PART.search(text):
        text = _OUR_PART.sub(lambda _: ours, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{ours}\n"
    for key, value in metadata.items():
        value = [one for one in value if one] if isinstance(value, list) else value
        if not value:
            continue
        there = card.data.get(key)
        before = _as_list(there)
        if key == "configs":
            new = {config["config_name"] for config in value}
            kept = [c for c in before if not isinstance(c, dict) or c.get("config_name") not in new]
            card.data[key] = [*kept, *value]
        elif isinstance(value, list):
            card.data[key] = [*before, *(one for one in value if one not in before)]
        elif there is None:
            card.data[key] = value
    return f"---\n{card.data.to_yaml()}\n---\n{text}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def hub_id(origin: Mapping[str, Any]) -> str | None:
    """Return the Hub repository of an encoder or of images, if their record tells it."""
    name = str(origin.get("name", ""))
    if name.startswith(("hf-hub:", "hf_hub:")):  # as open_clip and timm write it
        name = name[len("hf-hub:") :].partition("@")[0]
    elif origin.get("library") != "transformers" and origin.get("kind") != "hub":
        return None  # open_clip's ViT-L-14/openai only looks like a repository
    return name if _HUB_ID.fullmatch(name) else None

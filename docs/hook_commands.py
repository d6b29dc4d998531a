"""Write what each command does, and its options, into the page of the command line.

The page marks the places with ``<!-- options of: monoloss demo -->``. All text comes from the
commands themselves, so the page says what ``--help`` says.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from typer import Context
from typer.main import get_command

from monoloss_plugin.cli import app

_PLACE = re.compile(r"^<!-- options of: (monoloss .+?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with each marked place filled in."""
    return _PLACE.sub(lambda found: describe_command(found[1]), markdown)


def describe_command(name: str) -> str:
    """Return the description, usage and options of a command such as ``monoloss demo``."""
    command: Any = get_command(app)
    for word in name.split()[1:]:
        command = command.commands[word]
    context = Context(command, info_name=name)
    rows = [param.get_help_record(context) for param in command.params]
    lines = [
        command.help,
        "",
        f"```\n{command.get_usage(context).removeprefix('Usage: ')}\n```",
        "",
        "| | |",
        "|---|---|",
        *(f"| `{option}` | {_as_cell(text)} |" for option, text in rows),
    ]
    return "\n".join(lines)


def _as_cell(text: str) -> str:
    """Return a help text for a table's cell, with ``[default: 3]`` in brackets of its own."""
    return escape(text, quote=False).replace("|", "\\|").replace("  [", "<br>[")

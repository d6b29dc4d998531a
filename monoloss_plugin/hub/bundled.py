"""The small dictionaries and features that come with the package, in the Hub's own layout."""

from __future__ import annotations

from pathlib import Path

from monoloss_plugin.hub.repository import Repository, of_folder

_FOLDER = Path(__file__).parent / "bundled_data"

BUNDLED = {"digits": "batchtopk-256-monoloss-0.003"}
"""Names that need no network, each with the dictionary that it stands for by default."""


def folder_of(name: str) -> Path:
    """Return where a name's repositories lie."""
    return _FOLDER / name


def bundled(name: str, kind: str) -> Repository:
    """Return what is bundled under a name: its "model" or its "dataset" repository."""
    return of_folder(folder_of(name) / f"{kind}s", name)

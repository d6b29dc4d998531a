"""Checks of names that become paths or links: repositories, SAEs, splits and configurations."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from monoloss_plugin._places import kind_of

DATA = "data"
"""The folder of a dataset's default configuration."""

# A shell, a glob or another operating system would read other signs as more than a name.
_PART = re.compile(r"[A-Za-z0-9_=+][A-Za-z0-9_=+.,@-]*")
_SPLIT = re.compile(r"\w+(\.\w+)*", re.ASCII)
_LONGEST, _LONGEST_SPLIT = 200, 64


def is_inside(path: str) -> bool:
    """Say whether a path consists of plain names, so that it cannot leave its root."""
    return len(path) <= _LONGEST and all(_PART.fullmatch(part) for part in path.split("/"))


def require_inside(path: str, argument: str) -> str:
    """Return a path; raise an error if it could leave its folder, or has unusual signs."""
    if not isinstance(path, str):
        raise TypeError(f"{argument}: expected a string, got {kind_of(path)}")
    if not is_inside(path):
        raise ValueError(
            f"{argument}: expected names of letters, digits and _=+.,@- with / between them, and "
            f"none that starts with a dot, got {path[:_LONGEST]!r}"
        )
    return path


def require_hub_name(name: str, argument: str) -> str:
    """Return the name of a repository, with or without its user; raise ValueError for another."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{argument}: {error}") from None
    return name


def require_repo_id(repo_id: str) -> str:
    """Return a repository's full name, ``user/name``; raise an error for something else."""
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id: expected 'user/name', got {kind_of(repo_id)}")
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: expected 'user/name', got {repo_id!r}")
    return require_hub_name(repo_id, f"repo_id: expected 'user/name', got {repo_id!r}")


def features_beside(repo_id: str) -> str:
    """Return the dataset repository that has the features of a repository of SAEs."""
    return f"{repo_id}-features"


def require_split(split: str) -> str:
    """Return the name of a split; raise ValueError for one that ``datasets`` does not accept."""
    plain = isinstance(split, str) and _SPLIT.fullmatch(split) and len(split) <= _LONGEST_SPLIT
    if not plain or split == "all":
        raise ValueError(
            "split: expected up to 64 letters a to z, digits and underscores, and not 'all'; got "
            f"{split!r}"
        )
    return split


def require_config(config: str) -> str:
    """Return the name of a configuration; raise ValueError if its folder cannot have that name."""
    if "/" in require_inside(config, "config") or config == DATA:
        raise ValueError(f"config: expected one name without /, and not {DATA!r}; got {config!r}")
    return config


def require_texts(texts: Any, argument: str) -> list[str]:
    """Return a list of strings; raise TypeError for something else, such as one string."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"{argument}: expected a list of strings, got {texts!r}")
    return list(texts)


def require_token(token: str | bool | None) -> str | bool | None:
    """Return a token without the blanks that files leave around it; raise an error for no token.

    The HTTP client would show a malformed token in its own error. This one does not.
    """
    if token is None or isinstance(token, bool):
        return token
    token = token.strip() if isinstance(token, str) else ""
    if not re.fullmatch(r"[\w.-]+", token, re.ASCII):
        raise ValueError("token: expected letters, digits and underscores; it is not shown here")
    return token

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
    """Return a path below a repository's root.

    Raises:
        TypeError: it is not a string.
        ValueError: it could leave its folder, or has a sign that a path should not have.
    """
    if not isinstance(path, str):
        raise TypeError(f"{argument}: expected a string, got {kind_of(path)}")
    if not is_inside(path):
        raise ValueError(
            f"{argument}: expected names of letters, digits and _=+.,@- with / between them, and "
            f"none that starts with a dot, got {path[:_LONGEST]!r}"
        )
    return path


def require_hub_name(name: str, argument: str) -> str:
    """Return a name that a repository on the Hub can have, with or without its user.

    Raises:
        ValueError: the Hub has no such names.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{argument}: {error}") from None
    return name


def require_repo_id(repo_id: str) -> str:
    """Return a repository's full name, ``user/name``.

    Raises:
        TypeError: it is not a string.
        ValueError: it is not such a name.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id: expected 'user/name', got {kind_of(repo_id)}")
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: expected 'user/name', got {repo_id!r}")
    return require_hub_name(repo_id, f"repo_id: expected 'user/name', got {repo_id!r}")


def require_split(split: str) -> str:
    """Return the name of a split that ``datasets`` accepts.

    Raises:
        ValueError: it has other signs than letters, digits and underscores, or means all splits.
    """
    plain = isinstance(split, str) and _SPLIT.fullmatch(split) and len(split) <= _LONGEST_SPLIT
    if not plain or split == "all":
        raise ValueError(
            "split: expected up to 64 letters a to z, digits and underscores, and not 'all'; got "
            f"{split!r}"
        )
    return split


def require_config(config: str) -> str:
    """Return the name of a configuration; its folder has the same name.

    Raises:
        ValueError: it is more than one name, or the folder of the default configuration.
    """
    if "/" in require_inside(config, "config") or config == DATA:
        raise ValueError(f"config: expected one name without /, and not {DATA!r}; got {config!r}")
    return config


def require_texts(texts: Any, argument: str) -> list[str]:
    """Return a list of strings.

    Raises:
        TypeError: it is something else, such as one string.
    """
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"{argument}: expected a list of strings, got {texts!r}")
    return list(texts)


def require_token(token: str | bool | None) -> str | bool | None:
    """Return a token without the blanks that files and environments leave around it.

    The Hub's client would print a malformed token in its error. This function does not.

    Raises:
        TypeError: it is not a string, True, False or None.
        ValueError: it has signs that no token has.
    """
    if token is None or isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise TypeError(f"token: expected a string, got {kind_of(token)}")
    token = token.strip()
    if not re.fullmatch(r"[\w.-]+", token, re.ASCII):
        raise ValueError("token: expected letters, digits and underscores; it is not shown here")
    return token

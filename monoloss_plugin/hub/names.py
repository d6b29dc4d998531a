"""Names that may become paths or links: of repositories, SAEs and files."""

from __future__ import annotations

import re
from typing import Any

from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of

try:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that may hold pickled objects, which run code when they are opened."""

DATA = "data"
"""Folder of a dataset's default configuration."""

# Without what a shell, a glob or another system's path would read as more than a name.
_PART = re.compile(r"[A-Za-z0-9_=+][A-Za-z0-9_=+.,@-]*")
_SPLIT = re.compile(r"\w+(\.\w+)*", re.ASCII)
_LONGEST, _LONGEST_SPLIT = 200, 64


def require_texts(texts: Any, argument: str) -> list[str]:
    """Return a list of strings.

    Raises:
        TypeError: a string alone, or something else.
    """
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"{argument}: expected a list of strings, got {texts!r}")
    return list(texts)


def require_repo_id(repo_id: str) -> str:
    """Return the name of a repository, ``user/name``.

    Raises:
        TypeError: not a string.
        ValueError: not such a name.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id: expected 'user/name', got {kind_of(repo_id)}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id: expected 'user/name', got {repo_id!r}: {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: expected 'user/name', got {repo_id!r}")
    return repo_id


def require_inside(name: str, argument: str) -> str:
    """Return a path below a repository's root, of plain names and ``/``.

    Raises:
        TypeError: not a string.
        ValueError: it could leave its folder, or holds what a path should not.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a string, got {kind_of(name)}")
    if not is_inside(name):
        raise ValueError(
            f"{argument}: expected names of letters, digits and _=+.,@- with / between them, and "
            f"none that starts with a dot, got {name[:_LONGEST]!r}"
        )
    return name


def require_hub_name(name: str, argument: str) -> str:
    """Return a name under which the Hub may have a repository, with or without a user.

    Raises:
        ValueError: it cannot be one.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{argument}: {error}") from None
    return name


def require_token(token: str | bool | None) -> str | bool | None:
    """Return a token without the blanks around it that files and environments leave.

    Raises:
        TypeError: not a string, True or False.
        PermissionError: signs that no token has; they are not shown.
    """
    if token is None or isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise TypeError(f"token: expected a string, got {kind_of(token)}")
    token = token.strip()
    if not re.fullmatch(r"[\w.-]+", token, re.ASCII):
        raise PermissionError("token: expected letters, digits and underscores; it is not shown")
    return token


def is_inside(path: str) -> bool:
    """Say whether a path is made of plain names, and so stays below its root."""
    return len(path) <= _LONGEST and all(_PART.fullmatch(part) for part in path.split("/"))


def require_split(split: str) -> str:
    """Return the name of a split as ``datasets`` takes it.

    Raises:
        ValueError: other signs than a to z, digits and underscores, or a word that means all.
    """
    plain = isinstance(split, str) and _SPLIT.fullmatch(split) and len(split) <= _LONGEST_SPLIT
    if not plain or split == "all":
        raise ValueError(
            "split: expected up to 64 letters a to z, digits and underscores, and not 'all'; got "
            f"{split!r}"
        )
    return split


def require_config(config: str) -> str:
    """Return the name of a configuration, which is its folder's too.

    Raises:
        ValueError: more than one plain name, or the folder of the default configuration.
    """
    if "/" in require_inside(config, "config") or config == DATA:
        raise ValueError(f"config: expected one name without /, and not {DATA!r}; got {config!r}")
    return config


def is_pickle(path: str) -> bool:
    """Say whether a file's name is one under which pickled objects are kept."""
    return path.lower().endswith(PICKLES)

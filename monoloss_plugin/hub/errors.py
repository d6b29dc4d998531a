"""The Hub's refusals, in words that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from monoloss_plugin._checks import visible
from monoloss_plugin._optional import missing_extra

try:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class ChangedMeanwhileError(OSError):
    """Somebody else has committed to the repository since it was looked at."""


@contextmanager
def explained(repo_id: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what the Hub's client raises into Python's own errors, with what the user can do.

    Raises:
        FileNotFoundError: no such repository, or not for this token.
        ValueError: no such revision, or the Hub finds the request wrong.
        PermissionError: no token, one that the Hub does not accept, or one that may not do this.
        ChangedMeanwhileError: the repository is no longer what it was.
        ConnectionError: the Hub cannot be reached, or fails.
    """
    client = logging.getLogger("huggingface_hub.utils._http")
    level = client.level
    client.setLevel(logging.ERROR)  # two lines for each of its tries; the error says it in one
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"repo_id: {repo_id} asks for its conditions to be accepted on its page first; then "
            f"{_LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"revision: {repo_id} has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        if writing:
            raise PermissionError(_may_not_write(repo_id)) from error
        raise FileNotFoundError(
            f"repo_id: the Hub knows no repository {repo_id}, or does not show it without the "
            f"right token; for a private one {_LOG_IN}"
        ) from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"token: there is none on this machine; {_LOG_IN}") from error
    except HfHubHTTPError as error:
        raise _of_status(error, repo_id, writing) from error
    except Exception as error:
        # A file's upload that fails is a RuntimeError about what has failed.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(reason, HfHubHTTPError):
            raise _of_status(reason, repo_id, writing) from error
        # The client, or its library of transfer, which is another by its version; one of them,
        # written in Rust, raises plain RuntimeErrors.
        library = type(reason).__module__.partition(".")[0]
        broken = library in ("hf_xet", "httpx", "httpx2", "huggingface_hub", "requests")
        if type(reason) is RuntimeError or (broken and not isinstance(reason, ValueError)):
            raise _unreachable(reason, writing) from error
        raise
    finally:
        client.setLevel(level)


def _status_of(error: HfHubHTTPError) -> int:
    """Return the status that the Hub answered with; 0 where there was no answer."""
    response = getattr(error, "response", None)
    return 0 if response is None else int(response.status_code)


def _of_status(error: HfHubHTTPError, repo_id: str, writing: bool) -> Exception:
    status = _status_of(error)
    if status == 401:
        return PermissionError(
            f"token: the Hub does not accept it for {repo_id} (401); it is missing, wrong or "
            f"expired: {_LOG_IN}"
        )
    if status == 403:
        return PermissionError(f"{_may_not_write(repo_id)} (403{_said(error)})")
    if status == 412:
        return ChangedMeanwhileError(
            f"repo_id: somebody else has committed to {repo_id} in the meantime; run it again"
        )
    if status == 429:
        return ConnectionError("the Hub asks to wait (429, too many requests); run it again later")
    if status == 0 or status >= 500:
        return _unreachable(error, writing, f" (it answered {status})" if status else "")
    return ValueError(f"repo_id: the Hub refuses this for {repo_id}: {visible(error)}")


def _said(error: HfHubHTTPError) -> str:
    message = getattr(error, "server_message", None)
    return f": {visible(message)}" if message else ""


def _may_not_write(repo_id: str) -> str:
    return (
        f"token: it is missing, or may not write to {repo_id}; {_LOG_IN} with a token that has "
        "write access to this user or organization"
    )


def _unreachable(error: BaseException, writing: bool, answered: str = "") -> ConnectionError:
    outcome = "; run it again: what has arrived is not sent twice" if writing else ""
    said = answered or f": {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ConnectionError(f"the Hub could not be reached{said}{outcome}")

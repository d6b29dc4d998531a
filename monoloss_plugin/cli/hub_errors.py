"""Explain the Hub's errors to a user of the command line."""

from __future__ import annotations

import re

from monoloss_plugin._places import local_hint

_HTTP_LIBRARIES = ("httpx", "httpx2", "requests", "hf_xet", "huggingface_hub")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def explain(error: BaseException) -> str | None:
    """Return one line that says what to do about an error of the Hub's client; else None."""
    if type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__  # the client says "Error while uploading" and gives the reason
    if type(error).__module__.partition(".")[0] not in _HTTP_LIBRARIES:
        return None
    from huggingface_hub import errors

    name = _repository(error)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its conditions on its page; then {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no such branch, tag or commit"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"there is no token on this machine; {_LOG_IN}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub could not be reached, and what you asked for is not in the cache"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    server = getattr(error, "server_message", None)
    said = f" ({status}: {server})" if server else f" ({status})"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hub knows no repository {name}, or does not show it to you; for a private one "
            f"{_LOG_IN}{local_hint(name)}"
        )
    if status == 401:
        return f"the Hub does not accept your token{said}; {_LOG_IN}"
    if status == 403:
        return f"your token may not write to {name}{said}; {_LOG_IN} with one that may"
    if status in (409, 412):
        return f"somebody else has changed {name} in the meantime; run it again"
    if status == 429:
        return "the Hub asks you to wait (429, too many requests); run it again later"
    if 400 <= status < 500 or isinstance(error, ValueError):
        return f"the Hub rejects this: {error}"
    reason = f"it answered {status}" if status else str(error) or type(error).__name__
    return (
        f"the Hub could not be reached ({reason.splitlines()[0]}); run it again: files that "
        "have arrived are not transferred again"
    )


def _repository(error: BaseException) -> str:
    """Return the name of the repository that the Hub's answer is about."""
    url = getattr(getattr(error, "response", None), "url", "")
    match = re.search(r"/(?:models|datasets)/([^/?]+/[^/?]+)", str(url))
    return match[1] if match else "this repository"

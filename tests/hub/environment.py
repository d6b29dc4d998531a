"""An environment that knows one Hub, on loopback, and nothing of the user's own."""

from __future__ import annotations

import os

_LOCAL = "127.0.0.1,localhost"


def only_hub(url: str, home: str) -> None:
    """Point the Hub's clients to ``url``, with their caches in ``home``.

    They read this when they are imported; what the user has set (a cache, a token, a proxy) must
    neither be used nor come between.
    """
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_")) or name.endswith("_OFFLINE"):
            del os.environ[name]
    os.environ.update(
        HF_ENDPOINT=url,
        HF_HOME=home,
        HF_HUB_DISABLE_XET="1",  # its storage speaks a protocol of its own
        HF_HUB_DISABLE_TELEMETRY="1",
        NO_PROXY=_LOCAL,
        no_proxy=_LOCAL,
    )

"""How the commands end where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def readable_errors() -> Iterator[None]:
    """End with a message instead of a traceback where the caller can do something about it."""
    try:
        yield
    except (ModuleNotFoundError, OSError, ValueError) as error:
        sys.exit(f"monoloss: {error}")
    except KeyboardInterrupt:
        sys.exit("monoloss: stopped; start it again to go on")
    except RuntimeError as error:
        if type(error).__module__.startswith("monoloss_plugin"):
            sys.exit(f"monoloss: {error}")
        raise

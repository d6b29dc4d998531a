"""How a library may load an encoder: no questions, no waiting for a dead network, short errors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import local_hint, local_path, require_folder

try:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

LOCAL = "local-dir:"
"""What timm and open_clip put before a folder."""

_WAIT = 5  # seconds for the Hub to answer at all

_WRITTEN = {
    "open_clip": ("open_clip_config.json", "model_cfg"),
    "transformers": ("config.json", "model_type"),
    "timm": ("config.json", "architecture"),
}
"""By which file, and which key in it, a library knows its own folders."""


def local_folder(library: str, name: str) -> Path | None:
    """Return the folder that a library's name stands for; None for a name on the Hub.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder.
        ValueError: a folder of another library, or a name of which it is not clear where it is.
    """
    folder = local_path(name)
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL)).expanduser()
    if folder is None:
        # transformers would take the folder for the name.
        if library == "transformers" and (hint := local_hint(name)):
            raise ValueError(f"encoder: {name!r} is a name on the Hub{hint}")
        return None
    require_folder(folder, "encoder")
    if not _is_of(library, folder):
        others = [other for other in _WRITTEN if _is_of(other, folder)]
        advice = f"; {others[0]} has written it: {others[0]}:{folder}" if others else ""
        file, key = _WRITTEN[library]
        raise ValueError(
            f"encoder: {folder} is no folder of {library}, whose {file} says {key!r}{advice}"
        )
    return folder.absolute()


def _is_of(library: str, folder: Path) -> bool:
    file, key = _WRITTEN[library]
    try:
        return key in json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return False


@contextmanager
def loading(library: str, name: str, *, is_local: bool) -> Iterator[None]:
    """Load an encoder in this context, and it fails with one line.

    Raises:
        ConnectionError: the Hub cannot be reached, and its cache does not have the encoder.
        ValueError: the library cannot load it.
    """
    unreachable = not is_local and not _hub_answers()
    with ExitStack() as undo:
        # The libraries would ask a Hub that is not there again and again.
        _set(undo, constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE or unreachable)
        # open_clip logs to the root, which prints what the error says too.
        undo.callback(logging.root.removeHandler, silent := logging.NullHandler())
        logging.root.addHandler(silent)
        _set(undo, logging.root, "disabled", True)
        if library != "timm" and find_spec("transformers"):
            _quieten_transformers(undo)
        try:
            yield
        except ModuleNotFoundError:
            raise
        except Exception as error:  # damaged files make the libraries raise all kinds
            said = " ".join(str(error).split()) or type(error).__name__
            if said.startswith(("encoder: ", "revision: ")):
                raise
            if "trust_remote_code" in said:
                said = "it needs code of its own repository, which is not run"
            elif unreachable:
                raise ConnectionError(
                    f"encoder: the Hub cannot be reached, and {library} does not have {name} in a "
                    f"cache{local_hint(name)}"
                ) from error
            elif not isinstance(error, (OSError, RuntimeError, ValueError)):
                said = f"{type(error).__name__}: {said}"
            hint = local_hint(name)
            raise ValueError(f"encoder: {library} cannot load {name}: {said}{hint}") from error


def _quieten_transformers(undo: ExitStack) -> None:
    from transformers import dynamic_module_utils
    from transformers.utils import logging as of_transformers

    # It lists weights that are not wanted here, such as the text tower's.
    undo.callback(of_transformers.set_verbosity, of_transformers.get_verbosity())
    of_transformers.set_verbosity_error()
    # open_clip loads text towers through it, and does not tell it to run no code: without time for
    # an answer, it does not ask "run this code? [y]", and fails.
    _set(undo, dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _hub_answers() -> bool:
    try:
        return bool(get_session().head(constants.ENDPOINT, timeout=_WAIT).status_code < 500)
    except Exception:  # of whichever client huggingface_hub uses
        return False

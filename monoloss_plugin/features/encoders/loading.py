"""Load an encoder by its name: a short name, or a library and its own name or folder."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, get_args
from unittest.mock import patch

from monoloss_plugin._checks import require_choice
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of, local_hint, local_path, require_folder
from monoloss_plugin.features.encoders.encoder import Encoder, Output, encoder_of


class PinnedEncoder(NamedTuple):
    """An encoder with its exact weights."""

    name: str
    revision: str | None
    width: int
    """Length of its pooled features."""
    about: str


SHORT_NAMES = {
    "clip-vit-l14": PinnedEncoder(
        "transformers:openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        768,
        "CLIP ViT-L/14 (Radford et al. 2021), the projected image embedding",
    ),
    "siglip2-so400m": PinnedEncoder(
        "transformers:google/siglip2-so400m-patch14-384",
        "e8e487298228002f3d8a82e0cd5c8ea9c567f57f",
        1152,
        "SigLIP 2 So400m/14 at 384 px (Tschannen et al. 2025), its attention-pooled embedding",
    ),
    "vit-l16": PinnedEncoder(
        "timm:vit_large_patch16_224.augreg_in21k_ft_in1k",
        None,
        1024,
        "supervised ViT-L/16 (Dosovitskiy et al. 2021), ImageNet-21k then ImageNet-1k",
    ),
}
"""The encoders of the MonoLoss paper's section 4.1.

The paper names the families but no checkpoints. These are the usual ones. timm's own names fix the
weights and have no revisions.
"""

_LOCAL = "local-dir:"  # timm and open_clip write this before a folder
_FOLDERS = {
    "open_clip": ("open_clip_config.json", "model_cfg"),
    "transformers": ("config.json", "model_type"),
    "timm": ("config.json", "architecture"),
}
"""The libraries. Each writes this file into a model's folder, with this key in it."""
_WAIT = 5  # seconds for the Hub to answer


def load_encoder(
    name: str,
    *,
    revision: str | None = None,
    output: Output | None = None,
    layer: str | None = None,
) -> Encoder:
    """Load a frozen encoder and its preprocessing from the library that it comes from.

    Args:
        name: a short name of :data:`SHORT_NAMES`, or ``LIBRARY:NAME``:

            - ``open_clip:ViT-L-14/openai`` (an architecture, then a tag or a file of weights) or
              ``open_clip:hf-hub:org/name``;
            - ``transformers:org/name``, for CLIP, SigLIP, SigLIP 2, ViT, DINOv2, Swin and other
              image models with a pooled output;
            - ``timm:NAME`` or ``timm:hf-hub:org/name``.

            For a local folder, write ``LIBRARY:./folder`` or ``LIBRARY:/a/folder``. For timm and
            open_clip you can also write ``local-dir:`` before any path. Code in a repository is
            never run.
        revision: a commit, tag or branch, if the name is one of a Hub repository.
        output: ``"pooled"`` is the library's own image embedding. ``"cls"`` is the class token,
            and ``"mean"`` the mean over the patches, of the last hidden state or of ``layer``. The
            default is ``"pooled"``, or ``"mean"`` with a layer.
        layer: take the output of this module, such as ``blocks.9``.

    Returns:
        The encoder in evaluation mode, on the CPU, in float32.

    Raises:
        TypeError: ``name`` is not a string.
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: the name, output or layer does not exist, or the library cannot load it.
        ConnectionError: the Hub cannot be reached, and the encoder is not in the cache.
        ModuleNotFoundError: the library is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"encoder: expected a name, got {kind_of(name)}")
    if output is not None:
        require_choice(output, "output", get_args(Output))
    if name in SHORT_NAMES:
        if revision is not None:
            raise ValueError(
                f"revision: {name!r} has its own; to take another one, pass "
                f"{SHORT_NAMES[name].name!r} with a revision"
            )
        name, revision, *_ = SHORT_NAMES[name]
    library, _, of_library = name.partition(":")
    if library not in _FOLDERS or not of_library:
        raise ValueError(
            f"encoder: expected one of {', '.join(SHORT_NAMES)}, or LIBRARY:NAME with one of "
            f"{', '.join(_FOLDERS)}, got {name!r}"
        )
    folder = _local_folder(library, of_library)
    if folder is not None:
        of_library = str(folder) if library == "transformers" else f"{_LOCAL}{folder}"
    try:
        from huggingface_hub import constants

        module = import_module(f"monoloss_plugin.features.encoders.from_{library}")
    except ModuleNotFoundError as error:
        raise missing_extra(error, "vision") from error
    unreachable = folder is None and not _hub_answers()
    # Offline, a library looks into its cache at once; online it would try for half a minute.
    with patch.object(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE or unreachable):
        try:
            tower = module.load(of_library, revision)
        except Exception as error:  # the libraries raise all kinds of errors for damaged files
            reason = " ".join(str(error).split())
            if reason.startswith(("encoder: ", "revision: ")):
                raise
            hint = local_hint(of_library) if folder is None else ""
            if unreachable:
                raise ConnectionError(
                    f"encoder: the Hub cannot be reached, and {library} does not have {of_library} "
                    f"in its cache{hint}"
                ) from error
            if "trust_remote_code" in reason:  # the library's advice, which does not hold here
                reason = "it needs code of its own repository, and such code is never run"
            raise ValueError(
                f"encoder: {library} cannot load {of_library}: {type(error).__name__}: {reason}"
                f"{hint}"
            ) from error
    encoder = encoder_of(tower, output, layer)
    encoder.model.requires_grad_(False)
    return encoder


def _local_folder(library: str, name: str) -> Path | None:
    """Return the folder that a library's name stands for; None for a name on the Hub.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: another library wrote the folder, or the name could mean two things.
    """
    folder = local_path(name)
    if name.startswith(_LOCAL):
        folder = Path(name.removeprefix(_LOCAL)).expanduser()
    if folder is None:
        if library == "transformers" and (hint := local_hint(name)):
            # transformers itself would load the folder of that name.
            raise ValueError(f"encoder: {name!r} is a name on the Hub{hint}")
        return None
    require_folder(folder, "encoder")
    writers = [one for one, (file, key) in _FOLDERS.items() if _has_key(folder / file, key)]
    if library not in writers:
        advice = "".join(f"; for {one}, write {one}:{folder}" for one in writers)
        raise ValueError(
            f"encoder: {folder} is not a model that {library} saved: it has no "
            f"{_FOLDERS[library][0]} with {_FOLDERS[library][1]!r} in it{advice}"
        )
    return folder.absolute()


def _has_key(file: Path, key: str) -> bool:
    try:
        return key in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return False


def _hub_answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        return bool(get_session().head(constants.ENDPOINT, timeout=_WAIT).status_code < 500)
    except Exception:  # of the HTTP client that huggingface_hub uses
        return False

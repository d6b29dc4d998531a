"""Encoders by name: which library loads it, which weights, which revision."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple, get_args

from monoloss_plugin._checks import require_choice
from monoloss_plugin._places import kind_of
from monoloss_plugin.features.encoders.encoder import Encoder, Output, encoder_of


class Pinned(NamedTuple):
    """An encoder with its exact weights."""

    name: str
    revision: str | None
    width: int
    """Of its pooled features."""
    about: str


SHORT_NAMES = {
    "clip-vit-l14": Pinned(
        "transformers:openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        768,
        "CLIP ViT-L/14 (Radford et al. 2021), the projected image embedding",
    ),
    "siglip2-so400m": Pinned(
        "transformers:google/siglip2-so400m-patch14-384",
        "e8e487298228002f3d8a82e0cd5c8ea9c567f57f",
        1152,
        "SigLIP 2 So400m/14 at 384 px (Tschannen et al. 2025), its attention-pooled embedding",
    ),
    "vit-l16": Pinned(
        "timm:vit_large_patch16_224.augreg_in21k_ft_in1k",
        None,
        1024,
        "supervised ViT-L/16 (Dosovitskiy et al. 2021), ImageNet-21k then ImageNet-1k",
    ),
}
"""The encoders of the MonoLoss paper's section 4.1.

The paper names the families, not the checkpoints; these are the usual ones of each. timm names
weights, and has no revision for a name of its registry.
"""

_LIBRARIES = ("open_clip", "transformers", "timm")


def load_encoder(
    name: str,
    *,
    revision: str | None = None,
    output: Output | None = None,
    layer: str | None = None,
) -> Encoder:
    """Load a frozen encoder through its own library, with its own preprocessing.

    Args:
        name: a short name of :data:`SHORT_NAMES`, or ``LIBRARY:NAME`` with

            - ``open_clip:ViT-L-14/openai`` (architecture, then weights' tag or file),
              ``open_clip:hf-hub:org/name``;
            - ``transformers:org/name`` (CLIP, SigLIP, SigLIP 2, ViT, DINOv2, Swin and other image
              models with a pooled output);
            - ``timm:NAME``, ``timm:hf-hub:org/name``.

            For a local folder, write ``LIBRARY:./folder`` or ``LIBRARY:/a/folder``; timm's and
            open_clip's own ``local-dir:`` before any path means the same. Code of a repository is
            never run.
        revision: a commit of a Hub repository, where the name is of one.
        output: ``"pooled"``, the library's own image embedding (the default); ``"cls"``, the class
            token, or ``"mean"``, the mean over patches, of the last hidden state or of ``layer``.
        layer: name of a module whose output to take, such as ``blocks.9``; ``output`` is then
            ``"mean"`` unless it is ``"cls"``.

    Returns:
        The encoder in evaluation mode, on the CPU, in float32.

    Raises:
        TypeError: a name that is no string.
        FileNotFoundError, NotADirectoryError: no such folder.
        ValueError: a name, output or layer that is not there, a folder of another library, or
            files that the library cannot load.
        ConnectionError: the Hub cannot be reached, and the encoder is not in its cache.
        ModuleNotFoundError: the library is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"encoder: expected a name, got {kind_of(name)}")
    if output is not None:
        require_choice(output, "output", get_args(Output))
    if name in SHORT_NAMES:
        if revision is not None:
            raise ValueError(
                f"revision: {name!r} has its own; to take another, give "
                f"{SHORT_NAMES[name].name!r} with a revision"
            )
        name, revision, *_ = SHORT_NAMES[name]
    library, _, of_library = name.partition(":")
    if library not in _LIBRARIES or not of_library:
        raise ValueError(
            f"encoder: expected one of {', '.join(SHORT_NAMES)}, or LIBRARY:NAME with one of "
            f"{', '.join(_LIBRARIES)}, got {name!r}"
        )
    from monoloss_plugin.features.encoders.loading import LOCAL, loading, local_folder

    folder = local_folder(library, of_library)
    if folder is not None:
        of_library = str(folder) if library == "transformers" else f"{LOCAL}{folder}"
    module = import_module(f"monoloss_plugin.features.encoders.from_{library}")
    with loading(library, of_library, is_local=folder is not None):
        tower = module.load(of_library, revision)
    encoder = encoder_of(tower, output, layer)
    for parameter in encoder.model.parameters():
        parameter.requires_grad_(False)
    return encoder

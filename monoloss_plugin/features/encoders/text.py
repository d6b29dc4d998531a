"""The text side of an encoder of images and texts, such as CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_texts, require_at_least
from monoloss_plugin._places import kind_of
from monoloss_plugin.features.encoders.encoder import Encoder
from monoloss_plugin.features.encoders.loading import load_part, locate, record_of

_WITH_TEXT = "models of open_clip, and CLIP, SigLIP and SigLIP 2 models of transformers, have one"


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts into the space of an encoder's pooled image features.

    :func:`load_text_encoder` makes one from a name. Call it with a list of texts.
    """

    model: nn.Module
    """The module that holds the weights; texts are encoded on its device."""
    encode: Callable[[list[str]], Tensor]
    """Takes a batch of T texts and returns their embeddings (T, d)."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The library, its version, the name and the revision."""

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Return the embeddings (T, d) of T texts, as float32 on the CPU. Lengths differ from 1.

        A text that is longer than the model allows is cut.

        Raises:
            TypeError: not a list of strings.
            ValueError: no texts, or ``batch_size`` below 1.
        """
        require_at_least(1, batch_size, "batch_size")
        given = as_texts(texts, "texts")
        batches = (given[start : start + batch_size] for start in range(0, len(given), batch_size))
        return torch.cat([self.encode(batch).float().cpu() for batch in batches])


def load_text_encoder(
    encoder: str | Encoder | TextEncoder, *, revision: str | None = None
) -> TextEncoder:
    """Load the text side of an encoder, from the library that it comes from.

    Code in a repository is never run.

    Args:
        encoder: a name that :func:`~monoloss_plugin.features.load_encoder` takes, of a model of
            images and texts; or an encoder that it gave. A ``TextEncoder`` is returned as it is.
        revision: a commit, tag or branch, if the name is one of a Hub repository. By default that
            of the short name.

    Returns:
        The text encoder in evaluation mode, on the CPU, in float32.

    Raises:
        TypeError: neither a name nor an encoder.
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: the encoder has no text side, its features are not in the space of the texts,
            or the library cannot load it.
        ModuleNotFoundError: the library is not installed.
    """
    if isinstance(encoder, TextEncoder):
        return encoder
    if isinstance(encoder, Encoder):
        return text_encoder_of(encoder.record)
    if not isinstance(encoder, str):
        raise TypeError(f"encoder: expected a name or an encoder, got {kind_of(encoder)}")
    located = locate(encoder, revision)
    if located.library == "timm":
        raise ValueError(f"encoder: {encoder!r} has no text side; {_WITH_TEXT}")
    found: TextEncoder = load_part(located, "load_text")
    found.model.requires_grad_(False)
    return replace(found, record={**record_of(located), **found.record})


def text_encoder_of(record: Mapping[str, Any]) -> TextEncoder:
    """Load the text side of the encoder that a record is of.

    Args:
        record: an encoder's ``record``, which is also the ``record.encoder`` of its feature set.

    Raises:
        ValueError: as :func:`load_text_encoder`; or the record does not say which encoder it is, or
            it is one from a local folder, whose path a record does not hold.
    """
    library, name, revision = (record.get(key) for key in ("library", "name", "revision"))
    if not name:
        raise ValueError("encoder: the features do not say which encoder made them; give its name")
    if library not in ("open_clip", "transformers"):
        raise ValueError(f"encoder: {name!r} has no text side that is known; {_WITH_TEXT}")
    require_text_space(record)
    if "/" not in name:  # names on the Hub and names of weights have one
        raise ValueError(
            f"encoder: {name!r} is of a local folder, and its path is not known; give the encoder "
            f"as {library}:/the/folder"
        )
    return load_text_encoder(f"{library}:{name}", revision=revision)


def require_text_space(record: Mapping[str, Any]) -> None:
    """Raise ValueError if an encoder's features are not in the space of its texts' embeddings."""
    output, layer = record.get("output", "pooled"), record.get("layer")
    if output != "pooled" or layer is not None:
        made = f"output {output!r}" + ("" if layer is None else f" of layer {layer!r}")
        raise ValueError(
            f"encoder: texts can be compared with its output 'pooled' alone, and the features are "
            f"{made}; extract them again with output='pooled'"
        )

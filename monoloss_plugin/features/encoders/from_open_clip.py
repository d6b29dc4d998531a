"""Encoders from open_clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import local_hint
from monoloss_plugin.features.encoders.encoder import Tower, name_of, plain

try:
    import open_clip
    from huggingface_hub import snapshot_download
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

_HUB, _FOLDER = "hf-hub:", "local-dir:"


def load(name: str, revision: str | None) -> Tower:
    """Load the image tower of an open_clip model.

    Args:
        name: ``ARCHITECTURE/WEIGHTS`` with one of open_clip's tags or a file of weights, or
            ``hf-hub:org/name``, or ``local-dir:/a/folder``.
        revision: of the Hub repository, for ``hf-hub:`` names.
    """
    architecture, weights = name, None
    if not name.startswith((_HUB, _FOLDER)):
        if revision is not None:
            raise ValueError("revision: open_clip takes one for hf-hub: names only")
        architecture, _, weights = name.partition("/")
        _check_weights(architecture, weights)
    if revision is not None:
        folder = snapshot_download(name.removeprefix(_HUB), revision=revision)
        architecture = f"{_FOLDER}{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    visual = model.visual.eval()
    tokens, prefix_tokens = _tokens_of(visual)
    return Tower(
        model=visual,
        preprocess=preprocess,
        pooled=_Pooled(visual),
        tokens=tokens,
        prefix_tokens=prefix_tokens,
        record={
            "library": "open_clip",
            "library_version": open_clip.__version__,
            "name": name_of(name),
            "revision": revision,
            "preprocessing": plain(open_clip.get_model_preprocess_cfg(model)),
        },
    )


def _check_weights(architecture: str, weights: str) -> None:
    if architecture not in open_clip.list_models():
        raise ValueError(
            f"encoder: open_clip knows no architecture {architecture!r}; "
            f"open_clip.list_models() lists them{local_hint(architecture)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags and not Path(weights).is_file():
        raise ValueError(
            f"encoder: expected open_clip:{architecture}/WEIGHTS with a file or one of "
            f"{', '.join(tags) or 'no published weights'}, got {weights!r}"
        )


@dataclass(frozen=True)
class _Pooled:
    visual: nn.Module

    def __call__(self, inputs: Tensor) -> Tensor:
        embedding = self.visual(inputs)
        # A tower that also gives its tokens gives the embedding first.
        return embedding if isinstance(embedding, Tensor) else embedding[0]


def _tokens_of(visual: nn.Module) -> tuple[Callable[[Any], Tensor] | None, int | None]:
    if isinstance(visual, VisionTransformer):
        return _LastTokens(visual), 1
    if isinstance(visual, TimmModel):
        return visual.trunk.forward_features, getattr(visual.trunk, "num_prefix_tokens", 0)
    return None, None


@dataclass(frozen=True)
class _LastTokens:
    """Every token after the last norm."""

    visual: nn.Module

    def __call__(self, inputs: Tensor) -> Tensor:
        found = self.visual.forward_intermediates(  # type: ignore[operator]
            inputs,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefix = found["image_intermediates_prefix"][-1]
        return torch.cat((prefix, found["image_intermediates"][-1]), dim=1)

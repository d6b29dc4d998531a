"""Encoders from open_clip."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from monoloss_plugin._places import local_hint
from monoloss_plugin.features.encoders.encoder import Tower, name_of, with_lists


def load(name: str, revision: str | None) -> Tower:
    """Load the image part of an open_clip model.

    Args:
        name: ``ARCHITECTURE/WEIGHTS`` with a tag of open_clip or a file of weights,
            ``hf-hub:org/name``, or ``local-dir:/a/folder``.
        revision: of the Hub repository, for ``hf-hub:`` names.
    """
    architecture, weights = name, None
    if not name.startswith(("hf-hub:", "local-dir:")):
        if revision is not None:
            raise ValueError("revision: only hf-hub: names of open_clip have one")
        architecture, _, weights = name.partition("/")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        # Without weights, open_clip would make up random ones.
        if weights not in tags and not Path(weights).is_file():
            raise ValueError(
                f"encoder: expected open_clip:{architecture}/WEIGHTS with a file of weights or a "
                f"tag of open_clip ({', '.join(tags) or 'it has none for this architecture'}), got "
                f"{name!r}{local_hint(architecture)}"
            )
    if revision is not None:
        folder = snapshot_download(name.removeprefix("hf-hub:"), revision=revision)
        architecture = f"local-dir:{folder}"
    with _no_remote_code():
        model, _, preprocess = open_clip.create_model_and_transforms(
            architecture, pretrained=weights
        )
    visual = model.visual.eval()

    def pooled(inputs: Tensor) -> Tensor:
        embedding = visual(inputs)
        # A model that also gives its tokens gives the embedding first.
        return embedding if isinstance(embedding, Tensor) else embedding[0]

    tokens, prefix_tokens = _tokens_of(visual)
    return Tower(
        model=visual,
        preprocess=preprocess,
        pooled=pooled,
        tokens=tokens,
        prefix_tokens=prefix_tokens,
        record={
            "library": "open_clip",
            "library_version": open_clip.__version__,
            "name": name_of(name),
            "revision": revision,
            "preprocessing": with_lists(open_clip.get_model_preprocess_cfg(model)),
        },
    )


def _no_remote_code() -> Any:
    """Return a context in which transformers refuses a repository's code, and asks nobody.

    open_clip loads some text models through transformers, and does not forbid their code.
    """
    if not find_spec("transformers"):
        return nullcontext()
    from transformers import dynamic_module_utils

    return patch.object(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)


def _tokens_of(visual: nn.Module) -> tuple[Callable[[Any], Tensor] | None, int | None]:
    """Return how to get every token after the last norm, and the number before the patches."""
    if isinstance(visual, TimmModel):
        return visual.trunk.forward_features, getattr(visual.trunk, "num_prefix_tokens", 0)
    if not isinstance(visual, VisionTransformer):
        return None, None

    def tokens(inputs: Tensor) -> Tensor:
        found = visual.forward_intermediates(
            inputs,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefix = found["image_intermediates_prefix"][-1]
        return torch.cat((prefix, found["image_intermediates"][-1]), dim=1)

    return tokens, 1

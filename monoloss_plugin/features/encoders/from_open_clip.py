"""Encoders from open_clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import dynamic_module_utils

from monoloss_plugin.features.encoders.encoder import Tower, as_pair
from monoloss_plugin.features.encoders.from_timm import has_class_token, patch_size_of
from monoloss_plugin.features.encoders.text import TextEncoder


def load(name: str, revision: str | None) -> Tower:
    """Load the image part of an open_clip model.

    Args:
        name: ``ARCHITECTURE/WEIGHTS`` with a tag of open_clip or a file of weights,
            ``hf-hub:org/name``, or ``local-dir:/a/folder``.
        revision: of the Hub repository, for ``hf-hub:`` names.
    """
    model, preprocess, _, of_weights = _load(name, revision)
    visual = model.visual.eval()

    def pooled(inputs: Tensor) -> Tensor:
        embedding = visual(inputs)
        # A model that also gives its tokens gives the embedding first.
        return embedding if isinstance(embedding, Tensor) else embedding[0]

    tokens, prefix_tokens = _tokens_of(visual)
    trunk = visual.trunk if isinstance(visual, TimmModel) else None
    patch_size = as_pair(getattr(visual, "patch_size", None))
    return Tower(
        model=visual,
        preprocess=preprocess,
        pooled=pooled,
        tokens=tokens,
        prefix_tokens=prefix_tokens,
        channels_last=getattr(trunk, "output_fmt", "NCHW") == "NHWC",
        class_token=trunk is None or has_class_token(trunk),
        patch_size=patch_size if trunk is None else patch_size_of(trunk),
        record={**of_weights, "preprocessing": open_clip.get_model_preprocess_cfg(model)},
    )


def load_text(name: str, revision: str | None) -> TextEncoder:
    """Load an open_clip model and its tokenizer, to encode texts. Names are those of ``load``."""
    model, _, name, of_weights = _load(name, revision)
    with _no_remote_code():
        tokenizer = open_clip.get_tokenizer(name)

    def encode(texts: list[str]) -> Tensor:
        embeddings: Tensor = model.encode_text(tokenizer(texts).to(next(model.parameters()).device))
        return embeddings

    return TextEncoder(model.eval(), encode, of_weights)


def _load(name: str, revision: str | None) -> tuple[Any, Any, str, dict[str, str]]:
    """Return a model, its preprocessing, what open_clip calls it, and what to record of weights."""
    weights, of_weights = None, {}
    if revision is not None:
        name = f"local-dir:{snapshot_download(name.removeprefix('hf-hub:'), revision=revision)}"
    elif not name.startswith(("hf-hub:", "local-dir:")):
        name, _, weights = name.partition("/")
        of_weights = {"name": f"{name}/{Path(weights).name}"}
    with _no_remote_code():
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=weights)
    return model, preprocess, name, of_weights


@contextmanager
def _no_remote_code() -> Iterator[None]:
    """Let transformers refuse a repository's code, and ask nobody.

    open_clip loads some text models through transformers, and does not forbid their code.
    """
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # with 0 it raises instead of asking
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


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

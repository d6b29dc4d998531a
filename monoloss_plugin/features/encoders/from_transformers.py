"""Encoders from transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import logging

from monoloss_plugin.features.encoders.encoder import Inputs, Tower

_TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
}
"""For models of images and text, the class of the image part."""
_PREFIX_TOKENS = {
    "clip": 1,
    "siglip": 0,
    "siglip2": 0,
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "swin": 0,
    "swinv2": 0,
}
"""Number of class and distillation tokens before the patches. The config counts registers."""


def load(name: str, revision: str | None) -> Tower:
    """Load an image model, or the image part of a model of images and text."""
    given: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(name, **given)
    kind = config.model_type.removesuffix("_vision_model")
    model_class = getattr(transformers, _TOWERS[kind]) if kind in _TOWERS else AutoModel
    tower_config = getattr(config, "vision_config", config)
    if tower_config is not config and hasattr(config, "projection_dim"):
        tower_config.projection_dim = config.projection_dim  # the tower's own may be a default
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise it lists every weight of the text part as unexpected
    try:
        model, loading = model_class.from_pretrained(
            name, config=tower_config, output_loading_info=True, **given
        )
    finally:
        logging.set_verbosity(verbosity)
    # Classifiers are saved without a pooler; transformers then adds one with random weights.
    no_pooler = any(key.startswith("pooler") for key in loading["missing_keys"])
    absent = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler"))
    absent += [str(mismatch[0]) for mismatch in loading["mismatched_keys"]]
    if absent:
        raise ValueError(
            f"it has no fitting weights for {absent[0]} ({len(absent)} in all); "
            f"is it a {kind} image encoder?"
        )
    model = model.float().eval()
    processor = AutoImageProcessor.from_pretrained(name, **given)
    prefix_tokens = _PREFIX_TOKENS.get(kind)
    if prefix_tokens is not None:
        prefix_tokens += getattr(config, "num_register_tokens", 0)

    def pooled(inputs: Inputs) -> Tensor:
        outputs = model(**inputs)
        if no_pooler:
            outputs = {"pooler_output": outputs.last_hidden_state[:, 0]}
        embedding: Tensor | None = outputs.get("image_embeds", outputs.get("pooler_output"))
        if embedding is None:
            raise ValueError("output: this encoder has no pooled output; take 'cls' or 'mean'")
        return embedding

    def tokens(inputs: Inputs) -> Tensor:
        states: Tensor = model(**inputs).last_hidden_state
        return states

    return Tower(
        model=model,
        preprocess=_Preprocess(processor),
        pooled=pooled,
        tokens=tokens,
        prefix_tokens=prefix_tokens,
        record={
            "revision": getattr(config, "_commit_hash", None) or revision,
            "pooling": "class token" if no_pooler else "the model's own",
            "preprocessing": {
                name: value
                for name, value in processor.to_dict().items()
                if isinstance(value, (str, int, float, list, dict))
            },
        },
    )


@dataclass(frozen=True)
class _Preprocess:  # a class, since processes that decode images get it pickled
    processor: Any

    def __call__(self, image: Any) -> dict[str, Tensor]:
        inputs = self.processor(images=image, return_tensors="pt")
        return {name: tensor[0] for name, tensor in inputs.items()}

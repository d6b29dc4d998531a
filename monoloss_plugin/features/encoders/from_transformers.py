"""Encoders from transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging

from monoloss_plugin.features.encoders.encoder import Inputs, Tower, as_pair
from monoloss_plugin.features.encoders.text import TextEncoder

_TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
}
"""For models of images and text, the class of the image part."""
_TEXT_TOWERS = {
    "clip": "CLIPTextModelWithProjection",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}
"""For the same models, the class of the text part."""
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
    model, missing, misfits = _load_part(model_class, name, config, "vision_config", given)
    # Classifiers are saved without a pooler; transformers then adds one with random weights.
    no_pooler = any(key.startswith("pooler") for key in missing)
    absent = [key for key in missing if not key.startswith("pooler")] + misfits
    if absent:
        raise ValueError(
            f"it has no fitting weights for {absent[0]} ({len(absent)} in all); "
            f"is it a {kind} image encoder?"
        )
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
        patch_size=as_pair(getattr(model.config, "patch_size", None)),
        record={
            "revision": _commit_of(name, revision),
            "pooling": "class token" if no_pooler else "the model's own",
            "preprocessing": {
                name: value
                for name, value in processor.to_dict().items()
                if isinstance(value, (str, int, float, list, dict))
            },
        },
    )


def load_text(name: str, revision: str | None) -> TextEncoder:
    """Load the text part of a model of images and text, with its tokenizer.

    Its embeddings are those of the model's ``get_text_features``.
    """
    given: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(name, **given)
    kind = config.model_type
    if kind not in _TEXT_TOWERS:
        raise ValueError(f"a {kind} model has no text side; {', '.join(_TEXT_TOWERS)} have one")
    model_class = getattr(transformers, _TEXT_TOWERS[kind])
    model, missing, misfits = _load_part(model_class, name, config, "text_config", given)
    if absent := missing + misfits:
        raise ValueError(f"it has no fitting weights for {absent[0]} ({len(absent)} in all)")
    tokenizer = AutoTokenizer.from_pretrained(name, **given)
    # SigLIP was trained on texts that are padded to its full length, without a mask.
    padding, names = "max_length", ["input_ids"]
    if kind == "clip":
        padding, names = "longest", ["input_ids", "attention_mask"]
    length = config.text_config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        outputs = model(**{name: tokens[name].to(model.device) for name in names})
        embeddings: Tensor = outputs.get("text_embeds", outputs.get("pooler_output"))
        return embeddings

    return TextEncoder(model, encode, {"revision": _commit_of(name, revision)})


def _load_part(
    model_class: Any, name: str, config: Any, part: str, given: dict[str, Any]
) -> tuple[Any, list[str], list[str]]:
    """Load a model, or the part of it that ``config`` has a config for.

    Returns:
        The part in evaluation mode; the names of weights that the checkpoint does not have; and of
        those that it has in another shape.
    """
    part_config = getattr(config, part, config)
    if part_config is not config and hasattr(config, "projection_dim"):
        part_config.projection_dim = config.projection_dim  # the part's own may be a default
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise it lists every weight of other parts as unexpected
    try:
        model, loading = model_class.from_pretrained(
            name, config=part_config, output_loading_info=True, **given
        )
    finally:
        logging.set_verbosity(verbosity)
    misfits = [str(mismatch[0]) for mismatch in loading["mismatched_keys"]]
    return model.float().eval(), sorted(loading["missing_keys"]), misfits


def _commit_of(name: str, revision: str | None) -> str | None:
    """Return the commit that was loaded from the Hub; None for a local folder."""
    if Path(name).is_absolute():
        return None
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else revision


@dataclass(frozen=True)
class _Preprocess:  # a class, since processes that decode images get it pickled
    processor: Any

    def __call__(self, image: Any) -> dict[str, Tensor]:
        inputs = self.processor(images=image, return_tensors="pt")
        return {name: tensor[0] for name, tensor in inputs.items()}

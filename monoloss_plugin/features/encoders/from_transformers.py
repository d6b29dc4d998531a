"""Encoders from Hugging Face transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features.encoders.encoder import Inputs, Tower, name_of

try:
    import transformers
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        CLIPVisionModelWithProjection,
        SiglipVisionModel,
    )
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

_TEXT_AND_IMAGE: dict[str, Any] = {
    "clip": CLIPVisionModelWithProjection,
    "clip_vision_model": CLIPVisionModelWithProjection,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2": getattr(transformers, "Siglip2VisionModel", None),
    "siglip2_vision_model": getattr(transformers, "Siglip2VisionModel", None),
}
"""Model types whose image tower is loaded alone."""

_PREFIX_TOKENS = {
    "clip": 1,
    "clip_vision_model": 1,
    "siglip": 0,
    "siglip_vision_model": 0,
    "siglip2": 0,
    "siglip2_vision_model": 0,
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "swin": 0,
    "swinv2": 0,
}
"""Class and distillation tokens before the patches; registers are counted from the config."""


def load(name: str, revision: str | None) -> Tower:
    """Load an image model, or the image tower of a text-and-image model.

    Args:
        name: of a Hub repository, or a folder.
        revision: a commit, tag or branch of the Hub repository.
    """
    given: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(name, **given)
    kind = config.model_type
    model_class = _TEXT_AND_IMAGE.get(kind, AutoModel)
    if model_class is None:
        raise ValueError(f"encoder: {kind} needs a newer transformers than this one")
    tower_config = getattr(config, "vision_config", config)
    if tower_config is not config and hasattr(config, "projection_dim"):
        tower_config.projection_dim = config.projection_dim  # the tower's own may be a default
    model, loading = model_class.from_pretrained(
        name, config=tower_config, output_loading_info=True, **given
    )
    # Classifiers are saved without a pooler; transformers then makes one up at random.
    no_pooler = any(key.startswith("pooler") for key in loading["missing_keys"])
    absent = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler"))
    absent += [str(mismatch[0]) for mismatch in loading["mismatched_keys"]]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ValueError(
            f"encoder: {name} has no fitting weights for {absent[0]}{more}; "
            f"is it a {kind} image encoder?"
        )
    model = model.float().eval()
    processor = AutoImageProcessor.from_pretrained(name, **given)
    prefix_tokens = _PREFIX_TOKENS.get(kind)
    if prefix_tokens is not None:
        prefix_tokens += getattr(config, "num_register_tokens", 0)
    return Tower(
        model=model,
        preprocess=_Preprocess(processor),
        pooled=_Pooled(model, from_class_token=no_pooler),
        tokens=_LastHiddenState(model),
        prefix_tokens=prefix_tokens,
        record={
            "library": "transformers",
            "library_version": transformers.__version__,
            "name": name_of(name),
            "revision": getattr(config, "_commit_hash", None) or revision,
            "pooling": "class token" if no_pooler else "the model's own",
            "preprocessing": _json_only(processor.to_dict()),
        },
    )


@dataclass(frozen=True)
class _Preprocess:
    processor: Any

    def __call__(self, image: Any) -> dict[str, Tensor]:
        inputs = self.processor(images=image, return_tensors="pt")
        return {name: tensor[0] for name, tensor in inputs.items()}


@dataclass(frozen=True)
class _Pooled:
    model: nn.Module
    from_class_token: bool

    def __call__(self, inputs: Inputs) -> Tensor:
        outputs = self.model(**inputs)
        if self.from_class_token:
            state: Tensor = outputs.last_hidden_state
            return state[:, 0]
        embedding = outputs.get("image_embeds")
        pooled = outputs.get("pooler_output") if embedding is None else embedding
        if pooled is None:
            raise ValueError("output: this encoder has no pooled output; take 'cls' or 'mean'")
        return pooled  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _LastHiddenState:
    model: nn.Module

    def __call__(self, inputs: Inputs) -> Tensor:
        return self.model(**inputs).last_hidden_state  # type: ignore[no-any-return]


def _json_only(settings: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold of a processor's settings."""
    return {k: v for k, v in settings.items() if isinstance(v, (str, int, float, list, dict))}

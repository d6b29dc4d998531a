"""Tiny models of images and texts, with tokenizers, saved as their libraries save them."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SIZE = 16
"""Pixels of the models' inputs."""
WORDS = ["a", "photo", "of", "zero", "one", "two", "three", "four", "five"]
_VOCABULARY = {"<pad>": 0, "<unk>": 1, "<bos>": 2, **{w: 3 + i for i, w in enumerate(WORDS)}}
_VOCABULARY["<eos>"] = len(_VOCABULARY)
_SIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def save_transformers(kind: str, folder: Path) -> Path:
    """Save a CLIP, SigLIP or SigLIP 2 model of random weights: kind is its model type."""
    t = transformers
    ends = {"bos_token_id": 2, "eos_token_id": _VOCABULARY["<eos>"], "pad_token_id": 0}
    text = {**_SIDE, **ends, "vocab_size": len(_VOCABULARY), "max_position_embeddings": 8}
    vision = {**_SIDE, "image_size": SIZE, "patch_size": 4}
    processor: transformers.ImageProcessingMixin
    size = {"height": SIZE, "width": SIZE}
    torch.manual_seed(0)
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        processor = t.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    elif kind == "siglip":
        model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision))
        processor = t.SiglipImageProcessor(size=size)
    else:
        vision = {**_SIDE, "patch_size": 4, "num_patches": 16}
        model = t.Siglip2Model(t.Siglip2Config(text_config=text, vision_config=vision))
        processor = t.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    _spread_out(model)
    for part in (model, processor, _tokenizer()):
        part.save_pretrained(folder)
    return folder


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(t, _VOCABULARY[t]) for t in ("<bos>", "<eos>")]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "patch_size": 4, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def save_open_clip(folder: Path) -> Path:
    """Save an open_clip model of random weights, with open_clip's own tokenizer."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = open_clip.CLIP(**OPEN_CLIP)
    _spread_out(model)
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    described = {"model_cfg": OPEN_CLIP, "preprocess_cfg": cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def _spread_out(model: torch.nn.Module) -> None:
    """Enlarge the weights, or every image and every text gets nearly the same embedding."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)


def files_of(folder: Path) -> dict[str, bytes]:
    """What a repository of the Hub holds of a model."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}

"""Frozen encoders from open_clip, timm and transformers."""

from monoloss_plugin.features.encoders.encoder import Encoder, Output, PatchTokens
from monoloss_plugin.features.encoders.loading import SHORT_NAMES, PinnedEncoder, load_encoder
from monoloss_plugin.features.encoders.text import TextEncoder, load_text_encoder

__all__ = [
    "SHORT_NAMES",
    "Encoder",
    "Output",
    "PatchTokens",
    "PinnedEncoder",
    "TextEncoder",
    "load_encoder",
    "load_text_encoder",
]

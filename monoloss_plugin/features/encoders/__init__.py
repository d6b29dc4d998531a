"""Frozen image encoders, through the libraries they come from."""

from monoloss_plugin.features.encoders.encoder import Encoder, Output
from monoloss_plugin.features.encoders.names import SHORT_NAMES, Pinned, load_encoder

__all__ = ["SHORT_NAMES", "Encoder", "Output", "Pinned", "load_encoder"]

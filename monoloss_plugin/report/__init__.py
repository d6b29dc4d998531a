"""Figures about an SAE: MonoScore curves, and the images that activate a latent."""

from monoloss_plugin.report.bands import ActivationBands, activation_bands
from monoloss_plugin.report.figures import LatentRow, activating_images_figure, curves_figure

__all__ = [
    "ActivationBands",
    "LatentRow",
    "activating_images_figure",
    "activation_bands",
    "curves_figure",
]

"""The weights of MonoLoss in its paper: Nasiri-Sarvi et al. 2026, appendix B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from monoloss_plugin._checks import require_choice
from monoloss_plugin.features.encoders import SHORT_NAMES

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

_CLIP = "clip-vit-l14"


class PaperLam(NamedTuple):
    """A weight of MonoLoss, and what it is for."""

    dataset: str
    encoder: str
    """A short name of :data:`monoloss_plugin.features.encoders.SHORT_NAMES`."""
    architecture: str
    lam: float
    """In the units "nmse" for topk, "mse" for the others."""


def _paper_lams() -> tuple[PaperLam, ...]:
    encoders = (_CLIP, "siglip2-so400m", "vit-l16")
    table = {
        ("openimages", "topk"): (0.5, 0.3, 0.9),
        ("openimages", "batchtopk"): (5e-4, 2e-4, 7e-4),
        ("openimages", "standard"): (1e-4, 3e-5, 1e-4),
        ("openimages", "jumprelu"): (5e-4, 1e-4, 5e-4),
        ("imagenet", "topk"): (0.09, 0.14, 0.09),
        ("imagenet", "batchtopk"): (3e-4, 1e-4, 4e-4),
        ("imagenet", "standard"): (1e-4, 3e-5, 9e-5),
        ("imagenet", "jumprelu"): (5e-4, 1e-4, 7e-4),
    }
    return tuple(
        PaperLam(dataset, encoder, architecture, lam)
        for (dataset, architecture), lams in table.items()
        for encoder, lam in zip(encoders, lams, strict=True)
    )


PAPER_LAMS = _paper_lams()
"""The 24 weights of the MonoLoss paper: two data sets, three encoders, four architectures."""


def paper_lam(features: FeatureSet, architecture: str) -> PaperLam:
    """Return the paper's weight of MonoLoss for a feature set and an architecture.

    The feature set's record says its encoder and its source. For an encoder that the paper does not
    have, take its ImageNet weight for CLIP ViT-L/14; with "mse" units, times 768/d, so that it
    means the same (see docs/lam.md).

    Raises:
        ValueError: the paper does not have the architecture.
    """
    require_choice(architecture, "architecture", ("batchtopk", "topk", "jumprelu", "standard"))
    record = features.record
    dataset = "openimages" if record.source.get("kind") == "open-images" else "imagenet"
    encoder = _short_name(record.encoder)
    lams = {one[:3]: one for one in PAPER_LAMS}
    if encoder is not None:
        return lams[dataset, encoder, architecture]
    found = lams["imagenet", _CLIP, architecture]
    scale = 1.0 if architecture == "topk" else SHORT_NAMES[_CLIP].width / features.width
    return found._replace(lam=found.lam * scale)


def _short_name(encoder: Mapping[str, Any]) -> str | None:
    """Return the short name of an encoder's record; None if the paper does not have it."""
    named = f"{encoder.get('library')}:{encoder.get('name')}"
    return next((one.encoder for one in PAPER_LAMS if SHORT_NAMES[one.encoder].name == named), None)

"""Which part of a photograph an encoder sees: it resizes an image, and crops it or pads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

_CROP_PCT = 0.875
"""timm's own, where its record says none."""


class Part(NamedTuple):
    """A rectangle, in shares of an image's width and height.

    It reaches beyond the image where the encoder pads.
    """

    left: float
    top: float
    width: float
    height: float


WHOLE = Part(0.0, 0.0, 1.0, 1.0)


def covered_part(preprocessing: Mapping[str, Any], size: tuple[int, int]) -> Part | None:
    """Return the part of an image that the encoder sees, which the grid of its patches covers.

    Rounding to whole pixels of the encoder's input is left out.

    Args:
        preprocessing: what a feature set's record says, ``record.encoder["preprocessing"]``, in the
            words of timm, transformers or open_clip.
        size: width and height of the image, upright, or of a smaller copy.

    Returns:
        The part; None if the record does not say enough.

    Examples:
        >>> covered_part({"size": 224, "resize_mode": "shortest"}, (640, 480))
        Part(left=0.125, top=0.0, width=0.75, height=1.0)
    """
    try:
        steps = _steps_of(preprocessing)
    except (KeyError, TypeError, ValueError):  # a record may come from anyone
        return None
    if steps is None or min(size) < 1:
        return None
    width, height = steps.resized
    if steps.keeps != "neither":
        ratios = size[0] / width, size[1] / height
        ratio = min(ratios) if steps.keeps == "shorter" else max(ratios)
        width, height = size[0] / ratio, size[1] / ratio
    if steps.seen is None:
        return WHOLE
    seen = steps.seen[0] / width, steps.seen[1] / height
    return Part((1 - seen[0]) / 2, (1 - seen[1]) / 2, *seen)


class _Steps(NamedTuple):
    """An image is resized to a width and a height, and what is seen is the middle."""

    resized: tuple[float, float]
    keeps: Literal["shorter", "longer", "neither"]
    """Which side gets its length, with the image's proportions; neither if both do."""
    seen: tuple[float, float] | None
    """Pixels after the resize; None for all of them."""


def _steps_of(said: Mapping[str, Any]) -> _Steps | None:
    """Return the steps; None if the words are not known."""
    if "input_size" in said:
        return _of_timm(said)
    if "resize_mode" in said:
        return _of_open_clip(said)
    return _of_transformers(said) if "do_resize" in said else None


def _of_timm(said: Mapping[str, Any]) -> _Steps | None:
    """As ``timm.data.transforms_factory.transforms_imagenet_eval`` does."""
    if said.get("crop_border_pixels"):
        return None
    height, width = said["input_size"][-2:]
    share = said.get("crop_pct") or _CROP_PCT
    resized = int(width / share), int(height / share)
    modes: dict[str, Any] = {"center": "shorter", "border": "longer", "squash": "neither"}
    return _Steps(resized, modes[said.get("crop_mode") or "center"], (width, height))


def _of_open_clip(said: Mapping[str, Any]) -> _Steps:
    """As ``open_clip.transform.image_transform`` does."""
    size = said["size"]
    height, width = (size, size) if isinstance(size, int) else size
    modes: dict[str, Any] = {"shortest": "shorter", "longest": "longer", "squash": "neither"}
    return _Steps((width, height), modes[said["resize_mode"] or "shortest"], (width, height))


def _of_transformers(said: Mapping[str, Any]) -> _Steps | None:
    """As the image processors of transformers do, but for those that pad or have own steps."""
    kind = str(said.get("image_processor_type"))
    if said.get("do_pad") or kind.startswith("Levit"):
        return None
    crops, size = said.get("do_center_crop"), said.get("size")
    if not said["do_resize"] or not size:  # SigLIP 2 has no size, and keeps every part
        return None if crops else _Steps((1, 1), "neither", None)
    seen = (said["crop_size"]["width"], said["crop_size"]["height"]) if crops else None
    if set(size) == {"height", "width"}:
        return _Steps((size["width"], size["height"]), "neither", seen)
    if set(size) != {"shortest_edge"}:
        return None
    side = size["shortest_edge"]
    if kind.startswith("ConvNext"):  # crops small inputs, and squashes large ones
        if side >= 384:
            return _Steps((side, side), "neither", None)
        resized = int(side / said["crop_pct"])
        return _Steps((resized, resized), "shorter", (side, side))
    return _Steps((side, side), "shorter", seen)

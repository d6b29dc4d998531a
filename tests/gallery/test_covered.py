"""Where an encoder's grid lies on a photograph, against the real transforms of three libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from monoloss_plugin.gallery.covered import WHOLE, Part, covered_part

SIZES = ((640, 480), (300, 900), (400, 400))


def timm_steps(**said: Any) -> tuple[dict[str, Any], Callable[[Image.Image], Tensor]]:
    said = {"input_size": (3, 224, 224), "mean": (0.0,) * 3, "std": (1.0,) * 3, **said}
    return said, create_transform(**said, is_training=False)


def open_clip_steps(**said: Any) -> tuple[dict[str, Any], Callable[[Image.Image], Tensor]]:
    of = PreprocessCfg(mean=(0.0,) * 3, std=(1.0,) * 3, **said)
    return vars(of), image_transform_v2(of, is_train=False)


def transformers_steps(kind: str, **said: Any) -> tuple[dict[str, Any], Callable[..., Tensor]]:
    processor = getattr(transformers, kind)(do_normalize=False, **said)
    return processor.to_dict(), lambda image: processor(image, return_tensors="pt").pixel_values[0]


CASES = {
    "timm": timm_steps(crop_pct=0.9),
    "timm, its own share": timm_steps(),
    "timm, squash": timm_steps(crop_pct=0.8, crop_mode="squash"),
    "timm, border": timm_steps(crop_pct=1.0, crop_mode="border"),
    "timm, not square": timm_steps(input_size=(3, 160, 224), crop_pct=0.9),
    "open_clip": open_clip_steps(),
    "open_clip, squash": open_clip_steps(size=192, resize_mode="squash"),
    "open_clip, longest": open_clip_steps(resize_mode="longest"),
    "open_clip, not square": open_clip_steps(size=(160, 224)),
    "CLIP": transformers_steps("CLIPImageProcessor"),
    "ViT": transformers_steps("ViTImageProcessor"),
    "DINOv2": transformers_steps("BitImageProcessor", size={"shortest_edge": 256}),
    "DeiT": transformers_steps("DeiTImageProcessor"),
    "ConvNext": transformers_steps("ConvNextImageProcessor", size={"shortest_edge": 224}),
    "ConvNext, large": transformers_steps("ConvNextImageProcessor"),
    "MobileViT": transformers_steps("MobileViTImageProcessor"),
    "whole": transformers_steps("CLIPImageProcessor", do_center_crop=False),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_marker_is_seen_at_the_place_that_lies_over_it(case: str, size: tuple[int, int]) -> None:
    said, transform = CASES[case]
    part = covered_part(said, size)
    assert part is not None
    for x, y in ((0.5, 0.5), (0.3, 0.45), (0.72, 0.61)):
        # A place of the photograph that is seen, if (x, y) of the part is.
        across, down = part.left + x * part.width, part.top + y * part.height
        if not (0.05 < across < 0.95 and 0.05 < down < 0.95):
            continue
        pixels = np.zeros((size[1], size[0], 3), "uint8")
        box = [round(down * size[1]), round(across * size[0])]
        pixels[box[0] - 7 : box[0] + 7, box[1] - 7 : box[1] + 7] = 255
        seen = transform(Image.fromarray(pixels)).float().mean(0)
        seen = seen - seen.median()  # timm pads with a colour
        rows, columns = (seen > seen.max() / 2).nonzero().unbind(1)
        found = (columns.float().mean() + 0.5) / seen.shape[1]
        assert float(found) == pytest.approx(x, abs=0.01)
        found = (rows.float().mean() + 0.5) / seen.shape[0]
        assert float(found) == pytest.approx(y, abs=0.01)


def test_the_part_does_not_depend_on_how_large_a_copy_is() -> None:
    for said, _ in CASES.values():
        large, small = covered_part(said, (640, 480)), covered_part(said, (128, 96))
        assert large == pytest.approx(small)


def test_a_crop_of_the_middle_and_a_padded_image() -> None:
    said = {"size": (224, 224), "resize_mode": "shortest"}
    assert covered_part(said, (480, 640)) == pytest.approx(Part(0, 0.125, 1, 0.75))
    padded = covered_part({**said, "resize_mode": "longest"}, (200, 100))
    assert padded == pytest.approx(Part(0, -0.5, 1, 2))
    assert covered_part(transformers.ViTImageProcessor().to_dict(), (640, 480)) == WHOLE
    assert covered_part(transformers.Siglip2ImageProcessor().to_dict(), (640, 480)) == WHOLE


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"resize": 224},
        {"input_size": "large"},
        {"input_size": (3, 224, 224), "crop_mode": "random"},
        {"input_size": (3, 224, 224), "crop_border_pixels": 4},
        {"size": None, "resize_mode": "shortest"},
        {"do_resize": True, "size": {"longest_edge": 224}},
        {"do_resize": True, "size": {"shortest_edge": 224}, "do_pad": True},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 2, "width": 2}},
        transformers.LevitImageProcessor().to_dict(),
    ],
    ids=str,
)
def test_a_record_that_does_not_say_enough_gives_none(said: dict[str, Any]) -> None:
    assert covered_part(said, (640, 480)) is None

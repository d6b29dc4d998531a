"""Patches of encoders against what their own libraries give: hooks and forward_features."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from monoloss_plugin.features.encoders import Encoder, PatchTokens, load_encoder
from monoloss_plugin.features.encoders.encoder import Tower, encoder_of


def inputs_of(encoder: Encoder, images: list[Image.Image]):
    return default_collate([encoder.preprocess(image.convert(encoder.mode)) for image in images])


def patches_of(encoder: Encoder, images: list[Image.Image]) -> PatchTokens:
    with torch.no_grad():
        found = encoder.forward(inputs_of(encoder, images))
    assert isinstance(found, PatchTokens)
    return found


@pytest.mark.parametrize(
    ("kind", "prefix", "grid"),
    [
        ("clip", 1, (4, 4)),
        ("siglip", 0, (4, 4)),
        ("vit", 1, (4, 4)),
        ("dinov2", 1, (4, 4)),
        ("swin", 0, (4, 4)),
    ],
)
def test_transformers_patches_are_tokens_of_the_last_state(
    kind, prefix, grid, encoders, digit_images
) -> None:
    name = f"transformers:{encoders}/transformers/{kind}"
    encoder = load_encoder(name, output="patches")
    images = digit_images[:3]
    with torch.no_grad():
        states = encoder.model(**inputs_of(encoder, images)).last_hidden_state
    found = patches_of(encoder, images)
    assert torch.equal(found.features, states[:, prefix:])
    assert (found.grid, found.present, found.class_token) == (grid, None, None)
    assert encoder.record["output"] == "patches"
    mean = load_encoder(name, output="mean")
    with torch.no_grad():
        torch.testing.assert_close(found.features.mean(1), mean.forward(inputs_of(mean, images)))
    both = load_encoder(name, output="cls+patches")
    if prefix:
        assert torch.equal(patches_of(both, images).class_token, states[:, 0])
        assert torch.equal(patches_of(both, images).features, states[:, prefix:])
    else:
        with pytest.raises(ValueError, match="no class token here; take 'patches'"):
            patches_of(both, images)


@pytest.mark.parametrize("kind", ["vit", "resnet18", "swin"])
def test_timm_patches_are_those_of_forward_features(kind, encoders, digit_images) -> None:
    name = f"timm:local-dir:{encoders}/timm/{kind}"
    encoder = load_encoder(name, output="patches")
    images = digit_images[:3]
    with torch.no_grad():
        states = encoder.model.forward_features(inputs_of(encoder, images))
    found = patches_of(encoder, images)
    if kind == "vit":
        assert torch.equal(found.features, states[:, 1:])
        both = patches_of(load_encoder(name, output="cls+patches"), images)
        assert torch.equal(both.class_token, states[:, 0])
    else:
        # Of a map, place i of the grid is row i // width and column i % width.
        height, width = states.shape[1:3] if kind == "swin" else states.shape[2:]
        for place in range(height * width):
            row, column = divmod(place, width)
            at = states[:, row, column] if kind == "swin" else states[:, :, row, column]
            assert torch.equal(found.features[:, place], at)
        with pytest.raises(ValueError, match="no class token"):
            patches_of(load_encoder(name, output="cls+patches"), images)
    assert found.grid == {"vit": (4, 4), "resnet18": (1, 1), "swin": (4, 4)}[kind]


def test_registers_are_no_patches_and_no_class_token() -> None:
    images = torch.randn(2, 3, 16, 16)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    without = {"reg_tokens": 3, "class_token": False, "global_pool": "avg"}
    for name, options, prefix in (
        ("vit_small_patch16_224", {"reg_tokens": 4}, 5),
        ("vit_small_patch16_rope_224", {"num_reg_tokens": 2}, 3),
        ("vit_tiny_patch16_224", without, 3),
    ):
        model = timm.create_model(name, num_classes=0, **small, **options).eval()
        tower = tower_of(model)
        found = encoder_of(tower, "patches", None).forward(images)
        assert torch.equal(found.features, model.forward_features(images)[:, prefix:])
        assert found.grid == (4, 4)
        for output in ("cls", "cls+patches"):
            encoder = encoder_of(tower, output, None)
            if options is without:
                with pytest.raises(ValueError, match="no class token"):
                    encoder.forward(images)
            else:
                encoder.forward(images)


def tower_of(model: nn.Module) -> Tower:
    """A timm model as its library's file makes a tower of it."""
    from monoloss_plugin.features.encoders.from_timm import has_class_token, patch_size_of

    return Tower(
        model,
        lambda image: image,
        model,
        model.forward_features,
        getattr(model, "num_prefix_tokens", 0),
        {"name": "mine"},
        channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC",
        class_token=has_class_token(model),
        patch_size=patch_size_of(model),
    )


@torch.no_grad()
def test_rectangular_images_have_rectangular_grids() -> None:
    small = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(8, 24), **small).eval()
    images = torch.randn(2, 3, 8, 24)
    assert encoder_of(tower_of(vit), "patches", None).forward(images).grid == (2, 6)
    long = {**small, "patch_size": (4, 8)}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(8, 24), **long).eval()
    assert encoder_of(tower_of(vit), "patches", None).forward(images).grid == (2, 3)
    # 14 pixels do not divide the height: the rest of the image is not seen.
    odd = timm.create_model("vit_tiny_patch16_224", img_size=(9, 26), **small).eval()
    found = encoder_of(tower_of(odd), "patches", None).forward(torch.randn(2, 3, 9, 26))
    assert found.grid == (2, 6)


@torch.no_grad()
def test_a_grid_that_is_not_known_is_said_and_not_guessed() -> None:
    class Tokens(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.zeros(len(inputs), 16, 3)

    model = Tokens()
    tower = Tower(model, lambda image: image, model, model, 0, {"name": "mine"})
    encoder = encoder_of(tower, "patches", None)
    assert encoder.forward(torch.zeros(2, 3, 20, 20)).grid == (4, 4)
    assert encoder.forward(torch.zeros(2, 3, 16, 64)).grid == (2, 8)
    with pytest.raises(ValueError, match="grid of 16 patches of an image of 20 x 44 pixels is not"):
        encoder.forward(torch.zeros(2, 3, 20, 44))


def test_open_clip_patches(encoders, digit_images) -> None:
    name = f"open_clip:local-dir:{encoders / 'open_clip' / 'vit'}"
    both = load_encoder(name, output="cls+patches")
    images = digit_images[:3]
    found = patches_of(both, images)
    visual = both.model
    visual.output_tokens = True
    with torch.no_grad():
        pooled, tokens = visual(inputs_of(both, images))
    visual.output_tokens = False
    torch.testing.assert_close(found.features, tokens)
    torch.testing.assert_close(found.class_token @ visual.proj, pooled)
    assert found.grid == (4, 4)


def test_open_clip_with_a_trunk_of_timm_whose_maps_have_channels_last() -> None:
    from monoloss_plugin.features.encoders import from_open_clip

    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "image_size": 32}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    small = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1)}
    model.visual.trunk = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, num_heads=(1, 2), **small
    ).eval()

    def load(name: str, revision: str | None):
        return model, lambda image: image, name, {"name": name}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(from_open_clip, "_load", load)
        patched.setattr(open_clip, "get_model_preprocess_cfg", lambda _: {})
        tower = from_open_clip.load("swin", None)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = model.visual.trunk.forward_features(images)
        found = encoder_of(tower, "patches", None).forward(images)
        mean = encoder_of(tower, "mean", None).forward(images)
    assert torch.equal(found.features, states.flatten(1, 2))
    assert found.grid == (4, 4)
    torch.testing.assert_close(mean, states.mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "layer", "prefix", "grid"),
    [
        ("transformers:{}/transformers/vit", "layers.0", 1, (4, 4)),
        ("transformers:{}/transformers/swin", "encoder.layers.0", 0, (4, 4)),
        ("timm:local-dir:{}/timm/vit", "blocks.0", 1, (4, 4)),
        ("timm:local-dir:{}/timm/vit", "patch_embed", 0, (4, 4)),
        ("timm:local-dir:{}/timm/swin", "layers.0", None, (8, 8)),
        ("timm:local-dir:{}/timm/resnet18", "layer1", None, (4, 4)),
    ],
)
def test_a_layers_patches_are_that_modules_output(
    name, layer, prefix, grid, encoders, digit_images
) -> None:
    encoder = load_encoder(name.format(encoders), layer=layer, output="patches")
    seen: list[Tensor] = []
    handle = encoder.model.get_submodule(layer).register_forward_hook(
        lambda _, __, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        inputs = inputs_of(encoder, digit_images[:3])
        encoder.model(**inputs) if isinstance(inputs, dict) else encoder.model(inputs)
    handle.remove()
    found = patches_of(encoder, digit_images[:3])
    if prefix is None:
        nested = seen[0] if layer == "layers.0" else seen[0].permute(0, 2, 3, 1)
        expected = nested.flatten(1, 2)
    else:
        expected = seen[0][:, prefix:]
    assert torch.equal(found.features, expected)
    assert found.grid == grid


def test_padding_and_the_shape_of_each_image_are_told(encoders) -> None:
    """SigLIP 2 takes images of any shape, and pads what is left."""
    encoder = load_encoder(f"transformers:{encoders}/transformers/siglip2", output="patches")
    images = [Image.new("RGB", (24, 8), "red"), Image.new("RGB", (12, 12), "blue")]
    inputs = inputs_of(encoder, images)
    found = patches_of(encoder, images)
    with torch.no_grad():
        states = encoder.model(**inputs).last_hidden_state
    assert torch.equal(found.features, states)
    assert torch.equal(found.grid, inputs["spatial_shapes"])
    assert torch.equal(found.grid.prod(1), found.present.sum(1))
    assert found.grid[0, 1] > found.grid[0, 0]


def test_one_vector_for_each_image_is_refused(encoders, digit_images) -> None:
    name = f"transformers:{encoders}/transformers/vit"
    encoder = load_encoder(name, layer="pooler", output="patches")
    with pytest.raises(ValueError, match="'patches' needs tokens or a map, got shape"):
        patches_of(encoder, digit_images[:2])


def test_models_without_a_known_number_of_first_tokens_are_refused(tmp_path: Path) -> None:
    config = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
    )
    transformers.BeitModel(config).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    transformers.BeitImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path)
    encoder = load_encoder(f"transformers:{tmp_path}", output="patches")
    with pytest.raises(ValueError, match="not known which tokens are patches"):
        patches_of(encoder, [Image.new("RGB", (20, 20))])

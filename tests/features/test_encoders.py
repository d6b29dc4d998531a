"""Encoders through their own libraries: the same features as the library itself gives."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import default_collate

from monoloss_plugin.features.encoders import SHORT_NAMES, Encoder, load_encoder


def features_of(encoder: Encoder, images: list[Image.Image]) -> Tensor:
    inputs = default_collate([encoder.preprocess(image.convert(encoder.mode)) for image in images])
    with torch.no_grad():
        return encoder.forward(inputs)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "vit", "dinov2", "swin"])
def test_transformers_pooled_is_the_models_own_image_embedding(
    kind, encoders, digit_images
) -> None:
    folder = encoders / "transformers" / kind
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [image.convert("RGB") for image in digit_images[:5]]
    with torch.no_grad():
        inputs = processor(images=images, return_tensors="pt")
        if hasattr(model, "get_image_features"):
            expected = model.get_image_features(**inputs).pooler_output
        else:
            expected = model(**inputs).pooler_output
    encoder = load_encoder(f"transformers:{folder}")
    torch.testing.assert_close(features_of(encoder, digit_images[:5]), expected)
    assert encoder.record["pooling"] == "the model's own"
    assert encoder.record["name"] == kind


def test_a_classifier_without_a_pooler_gives_what_its_head_reads(
    encoders, digit_images, caplog
) -> None:
    folder = encoders / "transformers" / "vit-classifier"
    classifier = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    read: list[Tensor] = []
    classifier.classifier.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    images = [image.convert("RGB") for image in digit_images[:5]]
    with torch.no_grad():
        classifier(**processor(images=images, return_tensors="pt"))
    caplog.clear()
    encoder = load_encoder(f"transformers:{folder}")
    assert not caplog.records  # such as a list of weights that are not wanted
    torch.testing.assert_close(features_of(encoder, digit_images[:5]), read[0])
    assert encoder.record["pooling"] == "class token"


@pytest.mark.parametrize("kind", ["vit", "resnet18", "swin"])
def test_timm_pooled_is_what_the_classifier_reads(kind, encoders, digit_images) -> None:
    folder = encoders / "timm" / kind
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    pixels = torch.stack([transform(image.convert("RGB")) for image in digit_images[:5]])
    with torch.no_grad():
        features = model.forward_features(pixels)
        expected = model.forward_head(features, pre_logits=True)
    encoder = load_encoder(f"timm:local-dir:{folder}")
    torch.testing.assert_close(features_of(encoder, digit_images[:5]), expected)
    assert encoder.record["preprocessing"]["input_size"] == [3, 16, 16]

    mean = load_encoder(f"timm:local-dir:{folder}", output="mean")
    by_hand = {
        "vit": features[:, 1:].mean(1) if features.ndim == 3 else None,
        "resnet18": features.flatten(2).mean(2),
        "swin": features.flatten(1, -2).mean(1),
    }[kind]
    torch.testing.assert_close(features_of(mean, digit_images[:5]), by_hand)


def test_open_clip_pooled_is_encode_image(encoders, digit_images) -> None:
    name = f"local-dir:{encoders / 'open_clip' / 'vit'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    pixels = torch.stack([transform(image.convert("RGB")) for image in digit_images[:5]])
    with torch.no_grad():
        expected = model.eval().encode_image(pixels)
    encoder = load_encoder(f"open_clip:{name}")
    torch.testing.assert_close(features_of(encoder, digit_images[:5]), expected)
    assert encoder.record["preprocessing"]["mean"] == [0.5, 0.5, 0.5]

    # The class token is what the projection reads.
    class_token = features_of(load_encoder(f"open_clip:{name}", output="cls"), digit_images[:5])
    torch.testing.assert_close(class_token @ model.visual.proj, expected)


def test_open_clip_takes_a_file_of_weights_for_a_known_architecture(tmp_path) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-resnet.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-resnet")
    weights = tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    encoder = load_encoder(f"open_clip:tiny-resnet/{weights}")
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    with torch.no_grad():
        expected = model.eval().encode_image(encoder.preprocess(image)[None])
    torch.testing.assert_close(features_of(encoder, [image]), expected)
    with pytest.raises(ValueError, match="offers no last hidden state"):
        load_encoder(f"open_clip:tiny-resnet/{weights}", output="mean")


@pytest.mark.parametrize("name", ["transformers:{}/transformers/vit", "timm:local-dir:{}/timm/vit"])
def test_a_named_layer_gives_that_modules_output(name, encoders, digit_images) -> None:
    encoder = load_encoder(name.format(encoders))
    layer = "layers.0" if "transformers" in name else "blocks.0"
    seen: list[Tensor] = []
    handle = encoder.model.get_submodule(layer).register_forward_hook(
        lambda _, __, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    features_of(encoder, digit_images[:5])
    handle.remove()
    for output, expected in (("cls", seen[0][:, 0]), ("mean", seen[0][:, 1:].mean(1))):
        tapped = load_encoder(name.format(encoders), layer=layer, output=output)
        torch.testing.assert_close(features_of(tapped, digit_images[:5]), expected)
        assert tapped.record["layer"] == layer
        assert not any(m._forward_hooks for m in tapped.model.modules())
    default = load_encoder(name.format(encoders), layer=layer)
    assert default.record["output"] == "mean"


def test_padding_is_left_out_of_the_mean_of_patches(encoders) -> None:
    """SigLIP 2 pads an image of another shape; its mean is over the patches that are there."""
    encoder = load_encoder(f"transformers:{encoders}/transformers/siglip2", output="mean")
    inputs = {k: v[None] for k, v in encoder.preprocess(Image.new("RGB", (24, 8))).items()}
    assert 0 < int(inputs["pixel_attention_mask"].sum()) < 16
    with torch.no_grad():
        hidden = encoder.model(**inputs).last_hidden_state
        given = encoder.forward(inputs)
    torch.testing.assert_close(given, hidden[inputs["pixel_attention_mask"].bool()].mean(0)[None])


def test_the_checksum_of_weights_tells_encoders_apart(encoders, tmp_path) -> None:
    name = f"timm:local-dir:{encoders}/timm/vit"
    assert load_encoder(name).record == load_encoder(name).record
    other = timm.create_model(f"local-dir:{encoders}/timm/vit", pretrained=True)
    with torch.no_grad():
        other.norm.weight[0] += 1e-6
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    timm.models.save_for_hf(other, tmp_path / "vit", model_args=args)
    changed = load_encoder(f"timm:local-dir:{tmp_path}/vit")
    assert changed.record["weights_sha256"] != load_encoder(name).record["weights_sha256"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "clip"}, "expected one of clip-vit-l14"),
        ({"name": "keras:vit"}, "LIBRARY:NAME with one of open_clip"),
        ({"name": "timm:"}, "LIBRARY:NAME"),
        ({"name": "open_clip:ViT-L-14/openai", "revision": "abc"}, "write open_clip:hf-hub:ORG"),
        ({"name": "timm:resnet18", "revision": "abc"}, "revision: only a repository of the Hub"),
        ({"revision": "abc"}, "revision: only a repository of the Hub has one, got 'timm:local"),
        ({"name": "vit-l16", "revision": "abc"}, "revision: only a repository of the Hub"),
        ({"output": "max"}, "output: expected one of"),
        ({"layer": "block.1"}, "no module 'block.1' in this encoder; near: blocks.1"),
        ({"layer": "blocks.1", "output": "pooled"}, "a layer takes 'cls' or 'mean'"),
    ],
)
def test_what_is_not_there_is_named(arguments, said, encoders: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_encoder(**{"name": f"timm:local-dir:{encoders}/timm/vit", **arguments})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:resnet_of_mine", "timm cannot load resnet_of_mine: .*Unknown model"),
        ("open_clip:ViT-Z-1/openai", "Model config for 'ViT-Z-1' not found"),
        ("open_clip:ViT-L-14/mine", "'mine' is not a known tag or valid file path"),
        ("open_clip:RN50", "Required pretrained weights .* could not be loaded"),
    ],
)
def test_a_library_says_that_it_does_not_know_a_name(name, said) -> None:
    with pytest.raises(ValueError, match=said):
        load_encoder(name)


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(library, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(
        sys.modules, f"monoloss_plugin.features.encoders.from_{library}", raising=False
    )
    with pytest.raises(ModuleNotFoundError, match=f"needs {library}, .*: pip install '"):
        load_encoder(f"{library}:hf-hub:alice/vit")


def test_a_class_token_where_there_is_none_is_refused(encoders, digit_images) -> None:
    encoder = load_encoder(f"transformers:{encoders}/transformers/siglip", output="cls")
    with pytest.raises(ValueError, match="no class token"):
        features_of(encoder, digit_images[:2])


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
def test_a_string_with_a_beginning_of_a_path_is_a_folder(library, encoders, monkeypatch) -> None:
    monkeypatch.chdir(encoders / library)
    short = load_encoder(f"{library}:./vit")
    own = "" if library == "transformers" else "local-dir:"
    assert short.record == load_encoder(f"{library}:{own}{encoders}/{library}/vit").record
    assert short.record["name"] == "vit"
    with pytest.raises(FileNotFoundError, match="encoder: no such folder: none"):
        load_encoder(f"{library}:./none")
    with pytest.raises(NotADirectoryError, match=r"config.json is a file; give a folder"):
        load_encoder(f"{library}:{encoders}/timm/vit/config.json")


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
def test_a_folder_here_does_not_change_what_a_name_means(library, encoders, monkeypatch) -> None:
    monkeypatch.chdir(encoders / library)
    with pytest.raises((ValueError, OSError), match=r"for the local 'vit', write '\./vit'"):
        load_encoder(f"{library}:vit")


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
def test_the_folder_of_another_library_is_refused(library, encoders, tmp_path) -> None:
    others = {"transformers", "timm", "open_clip"} - {library}
    for folder in (tmp_path, *(encoders / other / "vit" for other in others)):
        with pytest.raises(ValueError, match=f"encoder: {library} cannot load"):
            load_encoder(f"{library}:{folder}")


def damaged(source: Path, folder: Path, endings: tuple[str, ...], content: bytes | None) -> Path:
    """A copy of an encoder's folder in which files hold something else, or half of themselves."""
    shutil.copytree(source, folder)
    for file in folder.iterdir():
        if file.name.endswith(endings):
            there = file.read_bytes()
            file.write_bytes(there[: len(there) // 2] if content is None else content)
    return folder


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
@pytest.mark.parametrize("content", [None, b"", b"\0" * 64], ids=["half", "empty", "zeros"])
def test_damaged_weights_are_one_line(library, content, encoders, tmp_path) -> None:
    folder = damaged(
        encoders / library / "vit", tmp_path / "bad", (".safetensors", ".bin"), content
    )
    with pytest.raises(ValueError, match=f"encoder: {library} cannot load") as refused:
        load_encoder(f"{library}:{folder}")
    assert "\n" not in str(refused.value)


def with_code(folder: Path, config: dict[str, object]) -> None:
    """A repository that asks for code of its own to be run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("open('ran', 'w')\nclass C: pass\n")


@pytest.fixture
def answers_yes(tmp_path, monkeypatch) -> Iterator[None]:
    """Somebody who says yes to every question; none may be asked, and no code be run."""
    asked: list[object] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    yield
    assert not asked
    assert not (tmp_path / "ran").exists()


AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "code.C")


def test_code_of_a_repository_is_not_run_and_nobody_is_asked(
    encoders, tmp_path, answers_yes
) -> None:
    with_code(tmp_path / "mine", {"model_type": "mine", "auto_map": AUTO})
    with pytest.raises(
        ValueError, match="needs code of its own repository, and such code is never run"
    ):
        load_encoder("transformers:./mine")
    # A known type is loaded by the library's own code.
    known = tmp_path / "vit"
    shutil.copytree(encoders / "transformers" / "vit", known)
    for name in ("config.json", "preprocessor_config.json"):
        config = json.loads((known / name).read_text())
        (known / name).write_text(json.dumps({**config, "auto_map": AUTO}))
    assert load_encoder("transformers:./vit").record["name"] == "vit"


def test_code_of_open_clips_text_tower_is_not_run(encoders, tmp_path, answers_yes) -> None:
    with_code(tmp_path / "text", {"model_type": "mine", "auto_map": AUTO})
    source = encoders / "open_clip" / "vit"
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": str(tmp_path / "text")}
    content = json.dumps(config).encode()
    damaged(source, tmp_path / "bad", ("open_clip_config.json",), content)
    with pytest.raises(
        ValueError, match="needs code of its own repository, and such code is never run"
    ):
        load_encoder("open_clip:./bad")


@pytest.mark.parametrize(
    "name",
    ["transformers:alice/vit", "timm:hf-hub:alice/vit", "timm:resnet18", "open_clip:RN50/openai"],
)
def test_without_the_hub_an_encoder_fails_in_one_line(name, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"encoder: .* cannot load") as failed:
        load_encoder(name)
    assert "\n" not in str(failed.value)


def test_names_that_are_none() -> None:
    for wrong in (None, 3, b"vit-l16", Path("vit"), ["vit"], SHORT_NAMES.__class__):
        with pytest.raises(TypeError, match="encoder: expected a name, got"):
            load_encoder(wrong)
    for wrong in ("", "timm", ":", "timm:"):
        with pytest.raises(ValueError, match="encoder: expected one of"):
            load_encoder(wrong)


def test_a_checkpoint_without_the_image_tower_is_refused(tmp_path, encoders) -> None:
    folder = tmp_path / "text"
    source = encoders / "transformers" / "clip"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text((source / name).read_text())
    text = transformers.CLIPTextModel.from_pretrained(source)
    from safetensors.torch import save_file

    weights = {f"text_model.{k}": v for k, v in text.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no fitting weights for"):
        load_encoder(f"transformers:{folder}")


def test_the_papers_encoders_have_short_names() -> None:
    of_the_hub = {name: one.width for name, one in SHORT_NAMES.items() if one.package is None}
    assert of_the_hub == {
        "clip-vit-l14": 768,
        "siglip2-so400m": 1152,
        "vit-l16": 1024,
    }
    for pinned in SHORT_NAMES.values():
        assert pinned.name.split(":")[0] in ("transformers", "timm")
    assert timm.is_model(SHORT_NAMES["vit-l16"].name.removeprefix("timm:"))

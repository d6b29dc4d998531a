"""Text encoders: the same embeddings as the library itself gives, and no others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from monoloss_plugin.features import TextEncoder, load_encoder, load_text_encoder
from tests.text_models import OPEN_CLIP, files_of, save_open_clip, save_transformers

TEXTS = ["a photo of one", "two", "a photo of a photo of a photo of five", "", "a zebra"]
KINDS = ["clip", "siglip", "siglip2"]


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models of images and texts: clip, siglip, siglip2, open_clip."""
    root = tmp_path_factory.mktemp("with_text")
    for kind in KINDS:
        save_transformers(kind, root / kind)
    save_open_clip(root / "open_clip")
    return root


@torch.no_grad()
def by_transformers(folder: Path) -> Tensor:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:  # one by one: nothing is padded for the sake of others
        padding = {} if folder.name == "clip" else {"padding": "max_length"}
        tokens = tokenizer(
            [text], truncation=True, max_length=8, return_tensors="pt", **padding
        ).input_ids
        rows.append(model.get_text_features(tokens).pooler_output)
    return torch.cat(rows)


@torch.no_grad()
def by_open_clip(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer) -> Tensor:
    return torch.cat([model.eval().encode_text(tokenizer([text])) for text in TEXTS])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [2, 256])
def test_embeddings_of_transformers_are_those_of_get_text_features(
    kind, batch_size, with_text
) -> None:
    encoder = load_text_encoder(f"transformers:{with_text / kind}")
    expected = by_transformers(with_text / kind)
    assert expected.std(0).min() > 1e-3  # texts differ
    found = encoder(TEXTS, batch_size=batch_size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert encoder.record["library"] == "transformers"
    assert encoder.record["name"] == kind
    assert load_text_encoder(encoder) is encoder
    images = load_encoder(f"transformers:{with_text / kind}")
    assert images.model.config.model_type.startswith(kind)
    assert found.shape[1] == {"clip": 24}.get(kind, 32)


def test_embeddings_of_open_clip_are_those_of_encode_text(with_text) -> None:
    name = f"local-dir:{with_text / 'open_clip'}"
    expected = by_open_clip(open_clip.create_model(name), open_clip.get_tokenizer(name))
    assert expected.std(0).min() > 1e-3
    for given in (f"open_clip:{name}", f"open_clip:{with_text / 'open_clip'}"):
        encoder = load_text_encoder(given)
        torch.testing.assert_close(encoder(TEXTS, batch_size=2), expected, atol=1e-5, rtol=1e-4)
        assert encoder.record["name"] == "open_clip"


def test_an_architecture_with_a_file_of_weights_is_known_again_from_its_record(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "tiny-clip.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-clip")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    images = load_encoder("open_clip:tiny-clip/weights.pt")
    encoder = load_text_encoder(images)
    expected = by_open_clip(model, open_clip.get_tokenizer("tiny-clip"))
    torch.testing.assert_close(encoder(TEXTS), expected)
    assert encoder.record["name"] == images.record["name"] == "tiny-clip/weights.pt"


@pytest.mark.parametrize(
    ("name", "kind", "asked"),
    [
        ("transformers:", "clip", "the commit"),
        ("transformers:", "clip", "what is there"),
        ("open_clip:hf-hub:", "open_clip", "the commit"),
    ],
)
def test_an_encoder_of_the_hub_is_known_again_from_its_record(
    name, kind, asked, hub, with_text
) -> None:
    commit = hub.put("alice/clip", files_of(with_text / kind))
    images = load_encoder(f"{name}alice/clip", revision=commit if asked == "the commit" else None)
    hub.put("alice/clip", {"config.json": b"{}", "open_clip_config.json": b"{}"})  # a later commit
    encoder = load_text_encoder(images)
    assert encoder.record["revision"] == images.record["revision"] == commit
    own = "transformers:" if kind == "clip" else "open_clip:"
    expected = load_text_encoder(f"{own}{with_text / kind}")(TEXTS)
    torch.testing.assert_close(encoder(TEXTS), expected)


def test_encoders_without_a_text_side_say_which_have_one(with_text, tmp_path) -> None:
    have_one = "models of open_clip, and CLIP, SigLIP and SigLIP 2 models of transformers"
    for name in ("vit-l16", "timm:resnet18"):
        with pytest.raises(ValueError, match=f"'{name}' has no text side; {have_one}"):
            load_text_encoder(name)
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="a vit model has no text side; clip, siglip, siglip2"):
        load_text_encoder(f"transformers:{tmp_path / 'vit'}")
    config = transformers.CLIPVisionConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "images")
    with pytest.raises(ValueError, match="a clip_vision_model model has no text side"):
        load_text_encoder(f"transformers:{tmp_path / 'images'}")


def test_weights_without_a_text_side_are_refused(with_text, tmp_path) -> None:
    whole = load_file(with_text / "clip" / "model.safetensors")
    images = {name: weight for name, weight in whole.items() if name.startswith("vis")}
    save_file(images, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((with_text / "clip" / name).read_bytes())
    with pytest.raises(ValueError, match="has no fitting weights for"):
        load_text_encoder(f"transformers:{tmp_path}")


def test_outputs_that_are_not_in_the_space_of_texts_are_refused(with_text) -> None:
    for options, said in (({"output": "cls"}, "'cls'"), ({"output": "mean"}, "'mean'")):
        images = load_encoder(f"open_clip:{with_text / 'open_clip'}", **options)
        with pytest.raises(ValueError, match=f"output 'pooled' alone, .* are output {said}"):
            load_text_encoder(images)
    images = load_encoder(f"open_clip:{with_text / 'open_clip'}", layer="transformer")
    with pytest.raises(ValueError, match="are output 'mean' of layer 'transformer'"):
        load_text_encoder(images)


@pytest.mark.parametrize(("library", "kind"), [("transformers", "clip"), ("open_clip",) * 2])
def test_an_encoder_of_a_local_folder_must_be_named_again(library, kind, with_text) -> None:
    images = load_encoder(f"{library}:{with_text / kind}")
    with pytest.raises(ValueError, match=f"'{kind}' is of a local folder.*as {library}:/the/fold"):
        load_text_encoder(images)


def test_code_of_a_repository_is_not_run(with_text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    folder = tmp_path / "mine"
    folder.mkdir()
    auto = dict.fromkeys(("AutoConfig", "AutoModel"), "code.C")
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    (folder / "code.py").write_text("open('ran', 'w')\nclass C: pass\n")
    with pytest.raises(ValueError, match="such code is never run"):
        load_text_encoder("transformers:./mine")
    # A tokenizer may ask for code too; the library has its own for a model of a known type.
    save_transformers("clip", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.C", "code.C"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_text_encoder("transformers:./mine")(["one"]).shape == (1, 24)
    assert not asked
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(library, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(
        sys.modules, f"monoloss_plugin.features.encoders.from_{library}", raising=False
    )
    with pytest.raises(ModuleNotFoundError, match=f"needs {library}, .*: pip install '"):
        load_text_encoder(f"{library}:hf-hub:alice/clip")


def test_names_and_texts_that_are_none() -> None:
    for wrong in (None, 3, b"clip", Path("clip"), ["clip"], TextEncoder):
        with pytest.raises(TypeError, match="encoder: expected a name or an encoder, got"):
            load_text_encoder(wrong)
    for name, said in (("clip", "encoder: expected one of"), ("open_clip:RN50/a", "cannot load")):
        with pytest.raises(ValueError, match=said):
            load_text_encoder(name)
    encoder = TextEncoder(torch.nn.Identity(), lambda texts: torch.zeros(len(texts), 2))
    assert encoder(["a", "b"]).shape == (2, 2)
    for texts, error in (
        ("a", TypeError),
        (["a", 1], TypeError),
        (None, TypeError),
        ([], ValueError),
    ):
        with pytest.raises(error, match=r"^texts: expected"):
            encoder(texts)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        encoder(["a"], batch_size=0)

"""Repositories of strangers: nothing is run, nothing leaves its folder, no memory is taken."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sae_lens
import torch
from datasets import Dataset
from markdown_it import MarkdownIt
from safetensors.torch import load, save

from monoloss_plugin import (
    list_pretrained,
    load_features,
    load_pretrained,
    publish_features,
    publish_sae,
)
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub.cards import escape
from monoloss_plugin.hub.repository import bundled_folder

REPO = "mallory/saes"
DIGITS = bundled_folder("digits") / "models" / "batchtopk-256-monoloss-0.003"
FILES = {path.name: path.read_bytes() for path in DIGITS.iterdir()}
CONFIG = json.loads(FILES["cfg.json"])


class Bomb:
    """What a pickle can do."""

    def __reduce__(self):
        return open, ("exploded", "w")


BOMB = pickle.dumps(Bomb())


@pytest.fixture(autouse=True)
def _in_a_folder_that_stays_empty(tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    yield
    assert not list(place.iterdir())


@pytest.fixture
def never_loaded(monkeypatch):
    """Fail where weights are read into memory."""

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(sae_lens.SAE, "load_from_disk", refuse)


def put(hub, **changed: bytes | None) -> None:
    """Put the digits' SAE with other files, by their names with _ for dots."""
    files = {**FILES, **{name.replace("__", "."): content for name, content in changed.items()}}
    hub.put(REPO, {f"one/{name}": c for name, c in files.items() if c is not None})


BAD_IDS = [
    "../one",
    "one/../../two",
    "/etc",
    "one/",
    "",
    "..",
    ".hidden",
    "one\\two",
    "C:one",
    "one\0",
    "one\ntwo",
    "o*e",
    "~",
    "a" * 300,
]


@pytest.mark.parametrize("sae_id", BAD_IDS)
def test_an_sae_id_cannot_leave_its_folder(sae_id, hub) -> None:
    put(hub)
    said = "sae_id: expected (names of letters|a string, got an empty one)"
    with pytest.raises(ValueError, match=said):
        load_pretrained(REPO, sae_id)
    with pytest.raises(ValueError, match=said):
        publish_sae(DIGITS, "alice/saes", sae_id=sae_id)
    assert ("model", "alice/saes") not in hub.repos


def test_files_whose_paths_leave_the_repository_are_not_seen(hub, tmp_path) -> None:
    put(hub)
    for folder in ("../evil", "a/../../evil", "/evil", "e vil"):
        hub.put(REPO, {f"{folder}/{name}": content for name, content in FILES.items()})
    assert [one.sae_id for one in list_pretrained(REPO)] == ["one"]
    assert load_pretrained(REPO).sae_id == "one"
    assert not list(tmp_path.rglob("*evil*"))
    hub.put("mallory/sets", {"../x/train-00000-of-00001.parquet": b"PAR1"}, "dataset")
    with pytest.raises(FileNotFoundError, match="holds no features"):
        load_features("mallory/sets")


def test_a_pickle_is_refused_by_name_and_not_even_fetched(hub) -> None:
    hub.put(REPO, {"one/ae.pt": BOMB, "one/cfg.json": FILES["cfg.json"]})
    said = "one/ae.pt would have to be unpickled.*monoloss convert"
    with pytest.raises(FileNotFoundError, match=said):
        load_pretrained(REPO)
    with pytest.raises(FileNotFoundError, match=said):
        load_pretrained(REPO, "one")
    put(hub, sae_weights__bin=BOMB, trainer_state__pt=BOMB)
    assert load_pretrained(REPO, "one").record.lam == 0.003
    fetched = {path for method, path in hub.requests if "/resolve/" in path}
    assert fetched
    assert not [path for path in fetched if path.endswith((".pt", ".bin"))]


def test_names_that_a_terminal_would_obey_are_escaped_in_errors(hub) -> None:
    evil = "\x1b[2J\x9b\u202e\n"
    hub.put(REPO, {f"one/{evil}.pt": BOMB})
    hub.put("mallory/more", {f"one/{k}": v for k, v in FILES.items()})
    tensors = load(FILES["sae_weights.safetensors"])
    weights = save({**tensors, evil: torch.zeros(1)})
    hub.put("mallory/more", {"one/sae_weights.safetensors": weights})
    for repo in (REPO, "mallory/more"):
        with pytest.raises((FileNotFoundError, ValueError), match=r"\\x1b\[2J\\x9b") as refused:
            load_pretrained(repo)
        assert str(refused.value).isprintable()


def test_a_pickle_under_another_name_is_not_unpickled(hub) -> None:
    put(hub, sae_weights__safetensors=BOMB)
    with pytest.raises(ValueError, match=r"sae_weights.safetensors: not a safetensors file"):
        load_pretrained(REPO)
    put(hub, sparsity__safetensors=BOMB)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_pretrained(REPO)
    for tensors in ({"sparsity": torch.ones(3, 7)}, {"other": torch.ones(256)}):
        put(hub, sparsity__safetensors=save(tensors))
        with pytest.raises(ValueError, match=r"expected sparsity of \(256,\), found"):
            load_pretrained(REPO)
    put(hub, cfg__json=BOMB)
    with pytest.raises(ValueError, match=r"cfg.json: not JSON"):
        load_pretrained(REPO)


def config(**changed) -> bytes:
    return json.dumps({**CONFIG, **changed}).encode()


BAD_CONFIGS = {
    "far too many latents": (config(d_sae=2**30), r"says d_sae = 1073741824.*W_dec of \(256, 64\)"),
    "too wide": (config(d_in=10**7), r"d_in = 10000000.*W_dec of \(256, 64\)"),
    "more than any": (config(d_sae=2**80), "d_sae = 1208925819614629174706176; expected a pos"),
    "negative": (config(d_in=-64), "d_in = -64; expected a positive integer"),
    "a float": (config(d_in=64.5), "d_in = 64.5; expected"),
    "no size": (config(d_in=None), "d_in = None; expected"),
    "another architecture": (config(architecture="topk", k=4), "holds threshold|threshold of no"),
    "an unknown architecture": (config(architecture="os.system"), "architecture 'os.system'"),
    "a training architecture": (config(architecture="batchtopk"), "training checkpoint"),
    "settings of another type": (config(normalize_activations=["x"]), "cannot make this jumprelu"),
    "a list": (b"[1]", "expected a JSON object, got list"),
    "deep": (b"[" * 100_000, "cfg.json: not JSON"),
    "not text": (b"\xff\xfe\x00", "cfg.json: not JSON"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_settings_that_do_not_fit_the_weights(case, hub, never_loaded) -> None:
    content, said = BAD_CONFIGS[case]
    put(hub, cfg__json=content)
    with pytest.raises(ValueError, match=said):
        load_pretrained(REPO)


def test_settings_from_before_sae_lens_6(hub) -> None:
    old = {"d_in": 64, "d_sae": 256, "architecture": "jumprelu", "dtype": "float32"}
    old |= {"hook_name": "x", "hook_layer": 0}
    put(hub, cfg__json=json.dumps(old).encode())
    assert load_pretrained(REPO).sae.cfg.d_sae == 256
    for changed in ({"dtype": "float31"}, {"architecture": "topk"}):
        put(hub, cfg__json=json.dumps({**old, **changed}).encode())
        with pytest.raises(ValueError, match="mallory/saes/one: SAELens cannot load it"):
            load_pretrained(REPO)


def test_weights_that_do_not_fit_the_settings(hub, never_loaded) -> None:
    tensors = {
        "W_enc": torch.zeros(64, 256),
        "W_dec": torch.zeros(256, 64),
        "b_enc": torch.zeros(256),
        "b_dec": torch.zeros(64),
    }
    for changed, said in (
        ({}, "threshold of .256,., but .* holds none"),
        ({"threshold": torch.zeros(255)}, r"threshold of \(256,\).* holds \(255,\)"),
        ({"threshold": torch.zeros(256), "more": torch.zeros(9)}, "more of no shape"),
    ):
        put(hub, sae_weights__safetensors=save({**tensors, **changed}))
        with pytest.raises(ValueError, match=said):
            load_pretrained(REPO)
    put(hub, sae_weights__safetensors=FILES["sae_weights.safetensors"][:-5])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_pretrained(REPO)


def test_settings_of_many_megabytes_are_not_fetched(hub, caplog) -> None:
    put(hub, cfg__json=b" " * (17 << 20), monoloss__json=b" " * (17 << 20))
    with pytest.raises(FileNotFoundError, match=r"no cfg.json in it"):
        load_pretrained(REPO)
    assert list_pretrained(REPO) == []
    assert "one/cfg.json is left out: 17825792 bytes" in caplog.text
    assert not [path for _, path in hub.requests if path.endswith(".json") and "/resolve/" in path]


def test_settings_of_many_megabytes_in_a_folder_are_not_read(tmp_path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(b" " * (17 << 20) if name == "cfg.json" else content)
    with pytest.raises(ValueError, match="bytes, more than any settings take"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        {"losses": "all"},
        {"losses": ["x"]},
        {"losses": [{"lam": "much"}]},
        {"metrics": {"r2": "high"}},
        {"metrics": []},
        {"encoder": "clip"},
        {"inputs": 3},
        {"inputs": "any"},
    ],
)
def test_a_record_of_other_types_is_named(record, hub) -> None:
    put(hub, monoloss__json=json.dumps(record).encode())
    with pytest.raises(ValueError, match=r"mallory/saes/one/monoloss.json: "):
        load_pretrained(REPO)


HOSTILE = [
    "<script>alert(1)</script>",
    "[click](http://evil.example)",
    "![x](http://evil.example/x.png)",
    "http://evil.example www.evil.example me@evil.example",
    "a | b | c",
    "line\n\n# heading\n\n- item",
    "`code` **bold** _em_ ~~s~~",
    "<!-- to here --> text <!-- monoloss_plugin writes from here -->",
    "---\nlicense: evil\n---",
    "</td><img src=x onerror=alert(1)>",
    "&lt;b&gt;",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_shown_in_a_card_as_they_are(text, hub) -> None:
    render = MarkdownIt("commonmark", {"html": True}).enable("table").render
    (row,) = (
        line
        for line in render(f"| a | b |\n|---|---|\n| {escape(text)} | end |").splitlines()
        if line.startswith("<td>") and "end" not in line
    )
    shown = row.removeprefix("<td>").removesuffix("</td>")
    assert "<" not in shown
    for sign, name in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        shown = shown.replace(sign, name)
    assert shown.split() == text.split()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_record_changes_nothing_but_its_own_cells(text, hub) -> None:
    features = load_features("digits", "held_out")
    record = {
        "encoder": {"name": text, text: text, "preprocessing": {text: text}},
        "source": {"kind": "folder", "name": text},
    }
    hostile = FeatureSet(features.dataset, record)
    publish_features(hostile, "alice/set", split="train")
    publish_sae(DIGITS, "alice/saes", features=hostile, evaluation={"r2": 1.0})
    publish_sae(DIGITS, "alice/saes", sae_id="second")
    for repo, kind in (("alice/set", "dataset"), ("alice/saes", "model")):
        card = hub.files(repo, kind)["README.md"].decode()
        metadata, body = card.split("---\n")[1], "---\n".join(card.split("---\n")[2:])
        assert body.count("<!-- to here -->") == 1
        assert "license: evil" not in metadata.splitlines()
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
        inline = [child for token in tokens for child in token.children or ()]
        html = [t.content.strip() for t in (*tokens, *inline) if t.type.startswith("html")]
        assert all(one.startswith("<!-- ") for one in html)
        links = {t.attrs.get("href") or t.attrs.get("src") for t in inline if t.attrs}
        assert not [link for link in links if "evil" in str(link)]
        headings = [t for t in tokens if t.type == "heading_open"]
        assert len(headings) == {"model": 5, "dataset": 6}[kind]


def test_labels_beyond_the_classes_are_refused_before_anything_counts_them(hub, tmp_path) -> None:
    features = load_features("digits", "held_out")
    labels = np.full(len(features), 10**12)
    table = features.dataset.data.table
    column = table.column_names.index("label")
    path = tmp_path / "evil.parquet"
    pq.write_table(table.set_column(column, table.field("label"), pa.array(labels)), path)
    hub.put("mallory/sets", {"data/train-00000-of-00001.parquet": path.read_bytes()}, "dataset")
    said = r"mallory/sets: .*label: expected numbers below 10, .* got 1000000000000"
    with pytest.raises(ValueError, match=said):
        load_features("mallory/sets")
    evil = Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="label: expected numbers below 10"):
        publish_features(evil, "alice/sets")
    assert ("dataset", "alice/sets") not in hub.repos


def test_a_parquet_file_that_is_none(hub) -> None:
    hub.put("mallory/sets", {"data/train-00000-of-00001.parquet": BOMB}, "dataset")
    with pytest.raises(ValueError, match="mallory/sets"):
        load_features("mallory/sets")


def test_bundled_names_are_no_paths() -> None:
    for name in ("../digits", "digits/models", "bundled_data"):
        with pytest.raises((OSError, ValueError)):
            load_pretrained(name)
    assert Path(bundled_folder("digits")).is_dir()

"""Features, published and loaded by the real clients."""

from __future__ import annotations

import re

import datasets
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import DatasetCard
from huggingface_hub.errors import HTTPError
from PIL import Image
from timm.models import save_for_hf

from monoloss_plugin import load_features, load_pretrained, publish_features
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches, FeatureSet, extract
from monoloss_plugin.features.shards import features_schema
from monoloss_plugin.hub import features as hub_features
from tests.hub.server import Fault

REPO = "alice/digit-features"


@pytest.fixture(scope="session")
def digits() -> dict[str, FeatureSet]:
    return {split: load_features("digits", split) for split in ("train", "held_out")}


def made(rows=60, width=4, record=None, **columns) -> FeatureSet:
    content = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float16)
    given = {"features": content.tolist(), "image_id": [f"{n}.png" for n in range(rows)], **columns}
    schema = features_schema(width, "float16", "label" in columns, ["cat", "dog"])
    return FeatureSet(datasets.Dataset.from_dict(given, features=schema), record or {})


def assert_equal(found: FeatureSet, expected: FeatureSet) -> None:
    assert torch.equal(found.tensor(), expected.tensor())
    assert found.dtype == expected.dtype
    assert found.classes == expected.classes
    everything = torch.arange(len(expected))
    assert found.ids_of(everything) == expected.ids_of(everything)
    if expected.labels is None:
        assert found.labels is None
    else:
        assert torch.equal(found.labels, expected.labels)


def test_datasets_alone_gives_them_back(digits, tmp_path) -> None:
    for split, features in digits.items():
        publish_features(features, REPO, split=split)
    both = datasets.load_dataset(REPO, cache_dir=str(tmp_path))
    assert set(both) == {"train", "held_out"}
    for split, features in digits.items():
        assert both[split].features == features.dataset.features
        assert_equal(FeatureSet(both[split]), features)
    streamed = datasets.load_dataset(REPO, split="train", streaming=True)
    first = next(iter(streamed))
    assert first["features"] == digits["train"].tensor()[0].tolist()


def test_load_features_brings_the_record_and_feeds_training(digits, tmp_path, hub) -> None:
    done = publish_features(digits["train"], REPO, split="train", license="cc-by-4.0")
    assert done.url == f"{hub.url}/datasets/{REPO}"
    loaded = load_features(REPO, cache_dir=tmp_path)
    assert_equal(loaded, digits["train"])
    for part in ("encoder", "source"):
        assert getattr(loaded.record, part) == getattr(digits["train"].record, part)
    batches = FeatureBatches(loaded, shuffle="none", drop_last=False)
    expected = FeatureBatches(digits["train"], shuffle="none", drop_last=False)
    found = [evaluate(load_pretrained("digits").sae, b).summary() for b in (batches, expected)]
    assert found[0] == found[1]


def test_a_folder_that_extract_made(tmp_path, hub) -> None:
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_heads=2, **size)
    model.pretrained_cfg |= {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    save_for_hf(model, tmp_path / "encoder", model_args={"num_heads": 2, **size})
    images = tmp_path / "images"
    for number in range(12):
        path = images / f"class {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), 20 * number).save(path)
    folder = tmp_path / "features"
    extract(images, f"timm:local-dir:{tmp_path / 'encoder'}", folder, workers=0, progress=False)
    publish_features(folder, REPO)
    loaded, expected = load_features(REPO), FeatureSet.open(folder)
    assert_equal(loaded, expected)
    assert loaded.record.encoder == expected.record.encoder
    for content in hub.files(REPO, "dataset").values():
        assert str(tmp_path).encode() not in content


def test_sets_of_several_encoders_share_a_repository(tmp_path, hub) -> None:
    clip = made(width=4, record={"encoder": {"name": "openai/clip"}, "source": {"split": "test"}})
    siglip = made(width=6, label=[n % 2 for n in range(60)], record={"encoder": {"name": "siglip"}})
    publish_features(clip, REPO, config="clip")
    publish_features(siglip, REPO, config="siglip", split="test")
    publish_features(siglip, REPO, config="siglip", split="train")
    assert load_features(REPO, config="clip", cache_dir=tmp_path).width == 4
    assert load_features(REPO, "train", cache_dir=tmp_path).classes == ["cat", "dog"]
    for arguments, error, said in (
        ({"split": "test"}, ValueError, "config: .* has several: test of clip, test of siglip"),
        ({"config": "siglip"}, ValueError, "split: .* has several"),
        ({"split": "val"}, FileNotFoundError, "has no val; it has test of clip"),
        ({"split": "train", "config": "clip"}, FileNotFoundError, "has no train of clip"),
    ):
        with pytest.raises(error, match=said):
            load_features(REPO, cache_dir=tmp_path, **arguments)
    assert datasets.load_dataset(REPO, "siglip", cache_dir=str(tmp_path)).num_rows == {
        "test": 60,
        "train": 60,
    }
    card = DatasetCard(hub.files(REPO, "dataset")["README.md"].decode())
    assert [config["config_name"] for config in card.data.configs] == ["clip", "siglip"]
    assert "## Encoder of `clip`" in card.text
    assert "| name | openai/clip |" in card.text


def test_the_card(digits, tmp_path, hub) -> None:
    record = {**digits["train"].record.to_dict(), "source": {"kind": "hub", "name": "ylecun/mnist"}}
    named = FeatureSet(digits["train"].dataset, record)
    publish_features(named, REPO, license="mit", tags=["digits"])
    card = DatasetCard(hub.files(REPO, "dataset")["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.source_datasets == ["ylecun/mnist"]
    assert {"digits", "monoloss"} <= set(card.data.tags)
    assert "| `default` | `train` | 1198 x 64 | float16 |" in card.text
    assert record["encoder"]["weights_sha256"] in card.text
    assert "| interpolation | bicubic |" in card.text
    for snippet in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        names: dict = {}
        exec(snippet.replace("2048", "256"), names)
        found = names["dataset"].num_rows if "dataset" in names else len(names["features"])
        assert found == 1198


def of_patches(rows: int = 12, **record) -> FeatureSet:
    x = torch.randn(rows, 6, 4, generator=torch.Generator().manual_seed(0)).half()
    names = [f"{n}.png" for n in range(rows)]
    labels = ["cat", "dog"] * (rows // 2)
    return FeatureSet.from_tensors(x, labels, names, grid=(2, 3), record=record)


@pytest.mark.parametrize("size", [1 << 30, 200])
def test_patches_come_back_with_their_places_and_means(size, tmp_path, hub, monkeypatch) -> None:
    features = of_patches(encoder={"name": "vit", "output": "patches"})
    with monkeypatch.context() as smaller:
        smaller.setattr(hub_features, "_SHARD", size)
        done = publish_features(features, REPO)
    parquet = [file for file in done.files if file.path.endswith(".parquet")]
    assert len(parquet) == (1 if size > 200 else 3)
    loaded = load_features(REPO, cache_dir=tmp_path / "a")
    assert_equal(loaded, features)
    assert_equal(loaded.images, features.images)
    assert torch.equal(loaded.patches.places, features.patches.places)
    assert torch.equal(loaded.patches.grids, features.patches.grids)
    assert loaded.patches.are_whole
    assert loaded.record.patches == {"grid": [2, 3], "kept": None, "class_token": False}
    assert (loaded.record.rows, loaded.num_images) == (12, 12)
    plain = datasets.load_dataset(REPO, split="train", cache_dir=str(tmp_path / "b"))
    assert plain.features == features.dataset.features
    assert plain[5]["features"] == features.tensor().view(12, 6, 4)[5].tolist()
    assert_equal(FeatureSet(plain), features)
    some = features.select(torch.tensor([7, 2]))
    publish_features(some, REPO, split="some")
    assert_equal(load_features(REPO, "some", cache_dir=tmp_path / "a"), some)


def test_the_card_of_patches(tmp_path, hub) -> None:
    publish_features(of_patches(encoder={"name": "vit"}), REPO, config="patches")
    card = DatasetCard(hub.files(REPO, "dataset")["README.md"].decode())
    assert "one vector per patch" in card.text
    assert "| `patches` | `train` | 12 x 6 x 4 | float16 | vit |" in card.text
    assert "Patches of each image: a grid of 2 x 3." in card.text
    assert "`places`: where each patch lies" in card.text
    publish_features(made(), REPO)
    card = DatasetCard(hub.files(REPO, "dataset")["README.md"].decode())
    assert "one vector per image or patch" in card.text
    for snippet in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(snippet, {})
    publish_features(of_patches(), "alice/other", split="x")
    with pytest.raises(ValueError, match="their columns are not those of x"):
        publish_features(made(), "alice/other", split="y")


def test_other_columns_are_not_published(hub, tmp_path) -> None:
    """Even if they have the name of a column of patches."""
    features = made()
    more = FeatureSet(features.dataset.add_column("grid", [[1, 2]] * len(features)), {})
    publish_features(more, REPO)
    loaded = load_features(REPO, cache_dir=tmp_path)
    assert loaded.dataset.column_names == ["features", "image_id"]


def test_large_sets_are_several_files(tmp_path, monkeypatch, hub) -> None:
    monkeypatch.setattr(hub_features, "_SHARD", 60 * 4 * 2 // 3 + 1)
    features = made(label=[n % 2 for n in range(60)])
    done = publish_features(features, REPO)
    parquet = [f.path for f in done.files if f.path.endswith(".parquet")]
    assert parquet == [f"data/train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert_equal(load_features(REPO, cache_dir=tmp_path / "a"), features)
    monkeypatch.undo()


def test_publishing_again_and_overwriting(tmp_path, monkeypatch, hub) -> None:
    features = made()
    with monkeypatch.context() as smaller:
        smaller.setattr(hub_features, "_SHARD", 200)
        first = publish_features(features, REPO)
        again = publish_features(features, REPO)
    assert {file.change for file in again.files} == {"same"}
    assert again.commit == first.commit
    other = made(rows=30)
    with pytest.raises(FileExistsError, match=r"has another data/train"):
        publish_features(other, REPO)
    publish_features(other, REPO, split="train2")
    done = publish_features(other, REPO, overwrite=True)
    assert sum(file.change == "gone" for file in done.files) == 3
    assert_equal(load_features(REPO, "train", cache_dir=tmp_path), other)
    assert set(datasets.load_dataset(REPO, cache_dir=str(tmp_path))) == {"train", "train2"}
    old = load_features(REPO, "train", revision=first.commit, cache_dir=tmp_path)
    assert_equal(old, features)


def test_a_dry_run(hub) -> None:
    planned = publish_features(made(), REPO, dry_run=True)
    assert not hub.repos
    done = publish_features(made(), REPO)
    assert done.files == planned.files
    assert sorted(hub.files(REPO, "dataset")) == [
        ".gitattributes",
        "README.md",
        "data/train-00000-of-00001.parquet",
        "data/train.json",
    ]


def test_the_cache_serves_where_the_hub_does_not(tmp_path, hub) -> None:
    features = made()
    publish_features(features, REPO)
    load_features(REPO, cache_dir=tmp_path)
    hub.faults.append(Fault("GET", "", "drop", times=99))
    assert_equal(load_features(REPO, "train", cache_dir=tmp_path), features)
    assert_equal(load_features(REPO, cache_dir=tmp_path, local_files_only=True), features)
    with pytest.raises(HTTPError):
        load_features("alice/other", cache_dir=tmp_path)


def test_a_set_that_is_not_there_completely_is_not_loaded(tmp_path, hub) -> None:
    publish_features(made(), REPO)
    content = hub.files(REPO, "dataset")["data/train-00000-of-00001.parquet"]
    hub.put("bob/half", {"data/train-00000-of-00002.parquet": content}, "dataset")
    with pytest.raises(FileNotFoundError, match="bob/half holds no features as Parquet files"):
        load_features("bob/half", cache_dir=tmp_path)


def test_bad_arguments_are_named(tmp_path, hub) -> None:
    features = made()
    for arguments, error, said in (
        ({"split": "held-out"}, ValueError, "split: expected up to 64 letters"),
        ({"split": "../train"}, ValueError, "split: expected up to 64 letters"),
        ({"split": "all"}, ValueError, "and not 'all'; got 'all'"),
        ({"split": "Prüfung"}, ValueError, "split: expected up to 64 letters"),
        ({"split": "x" * 65}, ValueError, "split: expected up to 64 letters"),
        ({"source_dataset": "a b"}, ValueError, "source_dataset: "),
        ({"tags": "abc"}, TypeError, "tags: expected a list"),
        ({"config": "../clip"}, ValueError, "config: expected names"),
        ({"config": "data"}, ValueError, "config: expected one name without /, and not .data."),
        ({"config": "a/b"}, ValueError, "config: expected one name without /"),
    ):
        with pytest.raises(error, match=said):
            publish_features(features, REPO, **arguments)
    for repo in ("digits", "a/b/c", "alice/", "alice/--x..y", ""):
        with pytest.raises(ValueError, match="repo_id: expected 'user/name'"):
            publish_features(features, repo)
    with pytest.raises(TypeError, match=r"features: expected a feature set, got list"):
        publish_features([1, 2], REPO)
    with pytest.raises(FileNotFoundError, match="no feature dataset in"):
        publish_features(tmp_path, REPO)
    assert not hub.requests


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> bytes:
    """A Parquet file of somebody else's."""
    path = tmp_path_factory.mktemp("raw") / "x.parquet"
    datasets.Dataset.from_dict({"a": [1], "b": [2]}).to_parquet(path)
    return path.read_bytes()


def test_other_data_of_a_repository_still_loads(raw, hub) -> None:
    card = b"---\nconfigs:\n- config_name: raw\n  data_files: raw/x.parquet\n---\n# Mine\n"
    hub.put(REPO, {"README.md": card, "raw/x.parquet": raw}, "dataset")
    publish_features(made(), REPO)
    publish_features(made(), REPO, split="test")
    assert datasets.load_dataset(REPO, "raw", split="train")[0] == {"a": 1, "b": 2}
    assert datasets.load_dataset(REPO, "default").num_rows == {"train": 60, "test": 60}


def test_data_that_datasets_finds_by_itself_is_not_hidden(raw, hub) -> None:
    hub.put(REPO, {"README.md": b"# Mine\n", "raw.parquet": raw}, "dataset")
    with pytest.raises(
        ValueError, match=r"holds raw.parquet, which datasets could not read any more"
    ):
        publish_features(made(), REPO)
    assert datasets.load_dataset(REPO, split="train")[0] == {"a": 1, "b": 2}
    hub.put("alice/tables", {"raw.csv": b"a,b\n1,2\n"}, "dataset")
    with pytest.raises(ValueError, match=r"holds raw.csv, which datasets could not read any more"):
        publish_features(made(), "alice/tables")


def test_a_repository_that_push_to_hub_made_is_added_to(tmp_path, hub) -> None:
    features = made()
    features.dataset.push_to_hub(REPO, split="train")
    assert b"dataset_info" in hub.files(REPO, "dataset")["README.md"]
    publish_features(features, REPO, split="test")
    assert datasets.load_dataset(REPO).num_rows == {"train": 60, "test": 60}
    assert_equal(load_features(REPO, "train"), features)


def test_splits_of_other_columns_need_a_configuration_of_their_own(hub) -> None:
    publish_features(made(label=[n % 2 for n in range(60)]), REPO)
    for other in (made(), made(width=5, label=[n % 2 for n in range(60)])):
        with pytest.raises(
            ValueError, match=r"their columns are not those of train.*another config"
        ):
            publish_features(other, REPO, split="test")
    publish_features(made(), REPO, split="test", config="unlabelled")
    assert datasets.load_dataset(REPO, "unlabelled").num_rows == {"test": 60}


def test_only_the_columns_that_the_card_names_are_published(hub) -> None:
    dataset = made().dataset.add_column("path", ["/home/me/secret.png"] * 60)
    publish_features(dataset, REPO)
    assert datasets.load_dataset(REPO, split="train").column_names == ["features", "image_id"]
    for content in hub.files(REPO, "dataset").values():
        assert b"secret" not in content


def test_sets_without_rows_or_with_records_of_other_kinds(hub) -> None:
    with pytest.raises(ValueError, match="features: expected at least one row"):
        publish_features(made().dataset.select([]), REPO)
    sliced = made(record={"source": {"split": "train[:10%]"}})
    with pytest.raises(ValueError, match=r"got 'train\[:10%\]'"):
        publish_features(sliced, REPO)
    for number, record in enumerate(({"source": None}, {"source": "x", "encoder": "y"}, {"a": 1})):
        publish_features(made(record=record), REPO, split=f"split{number}")
        assert load_features(REPO, f"split{number}").record.source == {}
    plain = made().dataset.select_columns(["features"]).shuffle(seed=1).select(range(7))
    publish_features(plain, "alice/plain")
    assert load_features("alice/plain").tensor().tolist() == plain["features"][:]


def test_anothers_broken_record_is_only_said(hub, caplog) -> None:
    publish_features(made(), REPO)
    for broken in (b"{oops", b"[]", b'{"encoder": "x", "rows": "<img src=x>"}'):
        hub.put(REPO, {"data/train.json": broken}, "dataset")
        publish_features(made(), REPO, split="test", overwrite=True)
        assert len(load_features(REPO, "train")) == 60
        assert "<img" not in hub.files(REPO, "dataset")["README.md"].decode()
    assert "a record of features is left out" in caplog.text


def test_a_folder_named_default_is_not_the_default_features(digits, hub) -> None:
    held_out = digits["held_out"]
    publish_features(held_out, REPO, split="held_out")
    shard = next(content for name, content in hub.files(REPO, "dataset").items() if "-of-" in name)
    foreign = "default/held_out-00000-of-00001.parquet"
    hub.put(REPO, {foreign: shard}, "dataset")
    assert len(load_features(REPO)) == len(held_out)
    planned = publish_features(held_out, REPO, split="held_out", overwrite=True, dry_run=True)
    assert foreign not in [file.path for file in planned.files]

"""A folder of SAEs and features, published as two repositories and a page in one go."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import RepoCard
from huggingface_hub.errors import HfHubHTTPError
from sae_lens import SAE
from safetensors.torch import save_file
from typer.testing import CliRunner

from monoloss_plugin import (
    cli,
    list_pretrained,
    load_features,
    load_pretrained,
    publish_features,
    publish_sae,
)
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub import CollectionPageError, publish_all
from monoloss_plugin.hub.features import Split, write_features
from monoloss_plugin.hub.repository import bundled_folder
from tests.hub.server import OWNER_TOKEN, Fault
from tests.hub.test_security import BOMB

REPO, FEATURES = "alice/vision", "alice/vision-features"
WITH, WITHOUT = "batchtopk-256-monoloss-0.003", "batchtopk-256"
SPLITS = (("default", "train"), ("default", "held_out"), ("small", "held_out"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """The bundled SAEs and features, and features of another encoder."""
    place = tmp_path / "collection"
    shutil.copytree(bundled_folder("digits"), place)
    small = FeatureSet.from_tensors(load_features("digits", "held_out").tensor()[:, :16])
    write_features(small, place / "datasets", Split("small", "held_out"))
    return place


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["publish", "all", *map(str, arguments)])


def content_of(place: Path) -> dict[str, bytes]:
    files = (path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


def on_the_hub(hub, repo_id: str, kind: str = "model") -> dict[str, bytes]:
    files = hub.files(repo_id, kind)
    return {path: c for path, c in files.items() if path not in ("README.md", ".gitattributes")}


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_one_command_makes_two_repositories_and_a_page_that_links_to_both(folder, hub) -> None:
    before = content_of(folder)
    done = run(folder, REPO, "--license", "mit", "--tag", "digits")
    assert done.exit_code == 0, done.output
    assert content_of(folder) == before
    assert OWNER_TOKEN not in done.output
    assert on_the_hub(hub, REPO) == content_of(folder / "models")
    assert on_the_hub(hub, FEATURES, "dataset") == content_of(folder / "datasets")
    assert hub.repos["model", REPO].messages == ["initial", "Publish 2 SAEs"]
    assert hub.repos["dataset", FEATURES].messages == ["initial", "Publish 3 splits"]
    ((slug, page),) = hub.collections.items()
    assert (page["title"], page["private"]) == ("vision", False)
    assert [(item["type"], item["id"]) for item in page["items"]] == [
        ("model", REPO),
        ("dataset", FEATURES),
    ]
    assert all(0 < len(item["note"]["text"]) <= 500 for item in page["items"])
    assert len(page["description"]) <= 150
    for link in (REPO, f"datasets/{FEATURES}", f"collections/{slug}"):
        assert f"{hub.url}/{link}" in done.stdout
    for repo_id, kind in ((REPO, "model"), (FEATURES, "dataset")):
        data = RepoCard(hub.files(repo_id, kind)["README.md"].decode()).data
        assert (data.license, "digits" in data.tags) == ("mit", True)


def test_what_is_published_is_loaded_bit_for_bit(folder, hub) -> None:
    publish_all(folder, REPO)
    local = folder / "models"
    assert [one.sae_id for one in list_pretrained(REPO)] == [WITHOUT, WITH]
    assert list_pretrained(REPO) == list_pretrained(local) == list_pretrained("digits")
    for sae_id in (WITHOUT, WITH):
        bundled = load_pretrained("digits", sae_id)
        expected = bundled.sae.state_dict()
        published, unpublished = load_pretrained(REPO, sae_id), load_pretrained(local, sae_id)
        assert published.record == bundled.record
        assert torch.equal(published.sparsity, bundled.sparsity)
        by_sae_lens_alone = SAE.from_pretrained(REPO, sae_id)
        for sae in (published.sae, unpublished.sae, by_sae_lens_alone):
            found = sae.state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    for config, split in SPLITS:
        found = load_features(FEATURES, split, config=config)
        expected = load_features("digits", split).tensor()
        expected = expected[:, :16] if config == "small" else expected
        assert torch.equal(found.tensor(), expected)
        unpublished = load_features(folder / "datasets", split, config=config)
        assert torch.equal(unpublished.tensor(), expected)
        alone = load_dataset(FEATURES, config, split=split).with_format("torch")
        assert torch.equal(alone["features"][:], expected)
    assert load_features(FEATURES, "train").record == load_features("digits", "train").record


def test_the_cards_link_to_each_other_and_keep_the_links(folder, hub, tmp_path) -> None:
    publish_all(folder, REPO)
    publish_sae(folder / "models" / WITH, REPO, sae_id="another")
    publish_features(load_features("digits", "train"), FEATURES, split="more", config="new")
    card = RepoCard(hub.files(REPO)["README.md"].decode())
    assert card.data.datasets == [FEATURES]
    assert f"[`{FEATURES}`]({hub.url}/datasets/{FEATURES})" in card.text
    assert all(f"### `{sae_id}`" in card.text for sae_id in (WITH, WITHOUT, "another"))
    card = RepoCard(hub.files(FEATURES, "dataset")["README.md"].decode())
    assert card.text.count(f"[`{REPO}`]({hub.url}/{REPO})") == 1
    assert {one["config_name"] for one in card.data.configs} == {"default", "small", "new"}
    publish_sae(folder / "models" / WITH, "alice/alone")
    assert "## Features" not in hub.files("alice/alone")["README.md"].decode()


def test_a_second_run_sends_nothing_and_makes_no_second_page(folder, hub) -> None:
    first = publish_all(folder, REPO)
    hub.requests.clear()
    shown = run(folder, REPO)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("has all files already") == 2
    assert f"page: {first.page}" in shown.stdout
    about_files = [(m, path) for m, path in hub.requests if not path.startswith("/api/collections")]
    assert {method for method, _ in about_files} == {"GET", "HEAD"}
    ((_, page),) = hub.collections.items()
    assert len(page["items"]) == 2
    again = publish_all(folder, REPO)
    assert again.size == 0
    assert {file.change for one in again.repositories for file in one.files} == {"same"}
    assert [one.commit for one in again.repositories] == [one.commit for one in first.repositories]


def test_only_what_is_new_is_sent(folder, hub) -> None:
    publish_all(folder, REPO)
    shutil.copytree(folder / "models" / WITH, folder / "models" / "new")
    shutil.rmtree(folder / "models" / WITHOUT)
    done = publish_all(folder, REPO)
    assert {file.path for file in done.saes.files if file.change == "new"} == {
        f"new/{path.name}" for path in (folder / "models" / "new").iterdir()
    }
    assert done.features.size == 0
    assert [one.sae_id for one in list_pretrained(REPO)] == [WITHOUT, WITH, "new"]


def test_another_sae_of_the_name_stops_it_before_the_features_are_sent(folder, hub) -> None:
    publish_all(folder, REPO, features=False)
    edit(folder / "models" / WITH / "monoloss.json", metrics={"r2": 0.5})
    with pytest.raises(FileExistsError, match=f"has another {WITH}/monoloss.json"):
        publish_all(folder, REPO)
    assert ("dataset", FEATURES) not in hub.repos
    (folder / "models" / WITH / "curves.png").unlink()
    publish_all(folder, REPO, overwrite=True)
    assert load_pretrained(REPO, WITH).record.metrics == {"r2": 0.5}
    assert f"{WITH}/curves.png" not in hub.files(REPO)


def test_a_dry_run_lists_every_file_with_totals_and_only_looks(folder, hub) -> None:
    shown = run(folder, REPO, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert {method for method, _ in hub.requests} == {"GET"}
    assert not hub.repos
    assert not hub.collections
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.stdout.splitlines()]
    listed = {(row[1], row[2]): row[3] for row in rows if len(row) == 6}
    places = {REPO: folder / "models", FEATURES: folder / "datasets"}
    files = {(repo_id, path) for repo_id, place in places.items() for path in content_of(place)}
    assert set(listed) == files | {(repo_id, "README.md") for repo_id in places}
    weights = folder / "models" / WITH / "sae_weights.safetensors"
    assert listed[REPO, f"{WITH}/{weights.name}"] == f"{weights.stat().st_size / 1000:.1f} kB"
    planned = json.loads(run(folder, REPO, "--dry-run", "--json").stdout)
    sizes = [f["size"] for part in ("saes", "features") for f in planned[part]["files"]]
    assert planned["size"] == sum(sizes)
    assert f"in all: {len(sizes)} files; {sum(sizes) / 1000:.1f} kB of them new" in shown.stdout
    assert planned["page"] is None


def test_without_features_there_is_a_page_of_the_saes_alone(folder, hub) -> None:
    assert run(folder, REPO, "--no-features").exit_code == 0
    (page,) = hub.collections.values()
    assert [item["type"] for item in page["items"]] == ["model"]
    assert set(hub.repos) == {("model", REPO)}
    assert "## Features" not in hub.files(REPO)["README.md"].decode()
    shutil.rmtree(folder / "datasets")
    assert publish_all(folder, "alice/other").features is None


@pytest.mark.parametrize("by_rule", [False, True])
def test_what_is_private_has_a_private_page(by_rule, folder, hub) -> None:
    hub.private_by_default = by_rule
    publish_all(folder, REPO, private=not by_rule)
    assert all(repo.private for repo in hub.repos.values())
    assert [page["private"] for page in hub.collections.values()] == [True]
    assert hub.requests[-1][1].endswith("/items")


FAULTS = {
    "no permission": (Fault("POST", "/api/collections$", 403), "403"),
    "no answer": (Fault("POST", "/api/collections$", "drop", times=9), "could not be reached"),
    "one item": (Fault("POST", "/items$", 500), "500"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_page_that_cannot_be_made_does_not_lose_the_upload(case, folder, hub) -> None:
    fault, said = FAULTS[case]
    hub.faults.append(fault)
    shown = run(folder, REPO)
    assert shown.exit_code == 1
    assert f"uploaded to {hub.url}/{REPO} (commit " in shown.stdout
    (line,) = (line for line in shown.stderr.splitlines() if line.startswith("monoloss: "))
    assert "all files are published" in line
    assert f"{hub.url}/datasets/{FEATURES}" in line
    assert said in line
    assert "run it again" in line
    assert on_the_hub(hub, REPO) == content_of(folder / "models")
    hub.faults.clear()
    again = run(folder, REPO)
    assert again.exit_code == 0
    assert again.stdout.count("has all files already") == 2
    assert [len(page["items"]) for page in hub.collections.values()] == [2]


def test_the_error_of_the_page_has_what_was_published(folder, hub) -> None:
    hub.faults.append(Fault("POST", "/api/collections$", 403))
    with pytest.raises(CollectionPageError, match="all files are published") as failed:
        publish_all(folder, REPO)
    assert isinstance(failed.value.__cause__, HfHubHTTPError)
    published = failed.value.published
    assert published.saes.commit == hub.repos["model", REPO].refs["main"]
    assert published.page is None


def test_an_interrupted_upload_goes_on_with_what_is_missing(folder, hub) -> None:
    hub.faults.append(Fault("POST", f"/api/models/{REPO}/commit", 500))
    with pytest.raises(HfHubHTTPError):
        publish_all(folder, REPO)
    assert not hub.collections
    assert on_the_hub(hub, FEATURES, "dataset")
    hub.requests.clear()
    publish_all(folder, REPO)
    assert on_the_hub(hub, REPO) == content_of(folder / "models")
    assert not any(method == "PUT" for method, _ in hub.requests)
    assert len(hub.collections) == 1


def one_wrong_size(place: Path) -> None:
    edit(place / "models" / WITH / "cfg.json", d_sae=128)


def weights_that_are_not_finite(place: Path) -> None:
    state = load_pretrained("digits", WITH).sae.state_dict()
    state["W_dec"][0, 0] = float("nan")
    save_file(state, place / "models" / WITH / "sae_weights.safetensors")


def no_weights(place: Path) -> None:
    (place / "models" / WITH / "sae_weights.safetensors").unlink()


def a_training_checkpoint(place: Path) -> None:
    shutil.copytree(place / "models" / WITH, place / "models" / WITH / "final")
    edit(place / "models" / WITH / "final" / "cfg.json", architecture="batchtopk")


def a_name_with_a_blank(place: Path) -> None:
    (place / "models" / WITH).rename(place / "models" / "my sae")


def a_record_that_is_none(place: Path) -> None:
    edit(place / "models" / WITH / "monoloss.json", losses="all")


def a_path_in_a_record(place: Path) -> None:
    edit(place / "models" / WITH / "monoloss.json", encoder={"name": f"local-dir:{place}"})


def a_path_in_the_settings(place: Path) -> None:
    config = json.loads((place / "models" / WITH / "cfg.json").read_text())
    config["metadata"]["dataset_path"] = str(place)
    edit(place / "models" / WITH / "cfg.json", **config)


def a_path_of_the_images(place: Path) -> None:
    edit(place / "datasets/data/train.json", source={"kind": "folder", "name": "C:\\me\\photos"})


def a_link(place: Path) -> None:
    secret = place / "secret.json"
    (place / "models" / WITH / "monoloss.json").rename(secret)
    (place / "models" / WITH / "monoloss.json").symlink_to(secret)


def a_linked_folder(place: Path) -> None:
    (place / "models" / "linked").symlink_to(place / "models" / WITH)


def curves_that_are_no_picture(place: Path) -> None:
    (place / "models" / WITH / "curves.png").write_bytes(BOMB)


def a_report_of_others(place: Path) -> None:
    (place / "models" / WITH / "report.html").write_text("<html>")


def a_missing_shard(place: Path) -> None:
    data = place / "datasets/data"
    (data / "train-00000-of-00001.parquet").rename(data / "train-00000-of-00002.parquet")


def another_column(place: Path) -> None:
    path = place / "datasets/data/train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("patient", pa.array(["x"] * len(table))), path)


def rows_that_are_missing(place: Path) -> None:
    path = place / "datasets/data/train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def no_parquet(place: Path) -> None:
    (place / "datasets/data/train-00000-of-00001.parquet").write_bytes(BOMB)


def no_saes(place: Path) -> None:
    shutil.rmtree(place / "models")


def a_repository_instead(place: Path) -> None:
    shutil.rmtree(place / "datasets")
    for sae in list((place / "models").iterdir()):
        sae.rename(place / sae.name)
    (place / "models").rmdir()


WRONG = {
    one_wrong_size: f"{WITH}: cfg.json says d_sae = 128 and d_in = 64, but sae_weights",
    weights_that_are_not_finite: "W_dec: contains NaN",
    no_weights: f"models/{WITH}/cfg.json belongs to no SAE.*models/SAE_ID/cfg.json and sae_w",
    a_training_checkpoint: "final: architecture 'batchtopk'; this is a training checkpoint",
    a_name_with_a_blank: "models/my sae/cfg.json belongs to no SAE.*plain name",
    a_record_that_is_none: "losses is not what a record holds there: 'all'",
    a_path_in_a_record: f"{WITH}/monoloss.json would publish a path of this machine: name is",
    a_path_in_the_settings: f"{WITH}/cfg.json would publish a path .*: dataset_path is",
    a_path_of_the_images: "data/train.json would publish a path of this machine: name is 'C:",
    a_link: "monoloss.json is a link; give the file",
    a_linked_folder: "linked is a link; give the file or folder",
    curves_that_are_no_picture: "curves.png: not a PNG picture",
    a_report_of_others: "is not a page that this version of `monoloss report` writes",
    a_missing_shard: "data/train-00000-of-00002.parquet belongs to no SAE and no split",
    another_column: "expected the columns features, label, image_id, or only the first, got .*pat",
    rows_that_are_missing: "data/train.json says 1198 rows, but the Parquet files of .* 1197",
    no_parquet: "train-00000-of-00001.parquet: not a Parquet file",
    no_saes: "holds no SAE in models/; a collection has models/SAE_ID/cfg.json and sae_weights",
    a_repository_instead: "holds no SAE in models/; a collection has .* datasets/CONFIG/SPLIT",
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_named_before_the_hub_is_asked(spoil, folder, hub) -> None:
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=WRONG[spoil]):
        publish_all(folder, REPO)
    assert not hub.requests


def test_other_files_are_left_out_with_a_warning_and_nothing_is_unpickled(
    folder, hub, caplog, monkeypatch
) -> None:
    others = ["models/README.md", f"models/{WITH}/trainer_state.pt", "datasets/data/notes.txt"]
    for name in (*others, "models/.cache/hidden", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(BOMB)

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    with caplog.at_level(logging.WARNING):
        publish_all(folder, REPO)
    said = [record.getMessage() for record in caplog.records]
    assert [one for one in said if "not published" in one] == [
        f"not published, because no SAE or split needs it: README.md, {WITH}/trainer_state.pt",
        "not published, because no SAE or split needs it: data/notes.txt",
    ]
    published = {**hub.files(REPO), **hub.files(FEATURES, "dataset")}
    assert BOMB not in published.values()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none", REPO], "no such folder: none"),
        (["collection", "vision"], "repo_id: expected 'user/name'"),
        (["collection", "bob/saes"], "don't have the rights to write to bob/saes-features"),
        (["collection", REPO, "--license", "none"], "must be one of, not none"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(
    arguments, said, folder, hub, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run(*arguments)
    assert (shown.exit_code, shown.stdout) == (1, "")
    (line,) = shown.stderr.splitlines()
    assert said in line
    assert not hub.repos

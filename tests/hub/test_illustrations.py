"""What a card shows for people to look at: six latents with their images, and the report."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from PIL import Image
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features, load_pretrained, publish_sae
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.gallery.pictures import open_pictures
from monoloss_plugin.gallery.samples import activating_samples
from monoloss_plugin.hub.illustrations import IMAGES, draw_latents
from monoloss_plugin.hub.repository import bundled_folder
from monoloss_plugin.report.page import write_page
from tests.hub.server import Fault
from tests.report.synthetic import make_page

REPO = "alice/vision-saes"
ROWS = 240
DIGITS = bundled_folder("digits") / "models"
WITH, WITHOUT = DIGITS / "batchtopk-256-monoloss-0.003", DIGITS / "batchtopk-256"


@pytest.fixture(scope="module")
def held_out() -> FeatureSet:
    """Digits, with their images in the same order."""
    features = load_features("digits", "held_out")
    return FeatureSet(features.dataset.select(range(ROWS)), features.record)


@pytest.fixture(scope="module")
def samples(held_out):
    return activating_samples(load_pretrained(DIGITS, WITH.name).sae, held_out)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A small page."""
    return write_page(make_page(), tmp_path_factory.mktemp("page") / "report.html")


def first(rows: int, features: FeatureSet) -> FeatureSet:
    return FeatureSet(features.dataset.select(range(rows)), features.record)


def colour(row: int) -> tuple[int, int, int]:
    """A colour that tells the row, and that no text and no axes have."""
    return 40 + row % 200, 60 + row // 200, 7


def coloured(rows: int) -> np.ndarray:
    """(rows, 8, 8, 3) images of one colour each."""
    colours = np.array([colour(row) for row in range(rows)], "uint8")
    return np.broadcast_to(colours[:, None, None], (rows, 8, 8, 3)).copy()


def rows_in(picture: Path) -> set[int]:
    """The rows whose colours fill a part of the picture."""
    channels = np.array(Image.open(picture).convert("RGB")).astype(int).reshape(-1, 3).T
    numbers, counts = np.unique(
        channels[0] << 16 | channels[1] << 8 | channels[2], return_counts=True
    )
    filled = set(numbers[counts > 500].tolist())
    return {row for row in range(ROWS) if int.from_bytes(colour(row), "big") in filled}


def test_six_latents_from_the_best_to_the_last_with_their_images(held_out, tmp_path, hub) -> None:
    """Of an SAE that takes features as they are."""
    sae = load_pretrained(DIGITS, WITH.name).sae
    sae.cfg.metadata.monoloss = None
    x = held_out.tensor().float() / 11  # of unit norm, about
    features = FeatureSet.from_tensors(x, held_out.labels)
    images = coloured(len(held_out))
    publish_sae(sae, REPO, sae_id="one", features=features, images=images, unit_norm=False)

    measured = evaluate(sae, features, normalize=False).monoscore
    candidates = [i for i in range(256) if measured.significant()[i]]
    ranking = sorted(candidates, key=lambda i: (-float(measured.adjusted[i]), i))
    shown = load_pretrained(REPO).record.latents_shown
    assert len(shown["latents"]) == 6
    assert shown["of"] == len(ranking)
    assert shown["above_chance"] is True
    assert [ranking[rank - 1] for rank in shown["ranks"]] == shown["latents"]
    gaps = np.diff(shown["ranks"])
    assert (shown["ranks"][0], shown["ranks"][-1]) == (1, len(ranking))
    assert gaps.max() - gaps.min() <= 1

    activations = sae.encode(x)[:, shown["latents"]]
    counts = (activations > 0).sum(0).clamp(max=6).tolist()
    expected = {
        row
        for column, count in zip(activations.T, counts, strict=True)
        for row in column.topk(count).indices.tolist()
    }
    (tmp_path / "latents.png").write_bytes(hub.files(REPO)["one/latents.png"])
    assert rows_in(tmp_path / "latents.png") == expected


def test_latents_of_patches_are_drawn_with_their_maps(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    features = FeatureSet.from_tensors(torch.randn(30, 9, 12, generator=generator))

    class Relu:
        encode = decode = staticmethod(torch.relu)

    samples = activating_samples(Relu(), features, count=IMAGES, normalize=False)
    pictures = open_pictures(coloured(30), features)
    shown = draw_latents(tmp_path / "maps.png", samples, pictures, features)
    assert draw_latents(tmp_path / "plain.png", samples, pictures) == shown
    dark, plain = (np.array(Image.open(tmp_path / f"{of}.png")) for of in ("maps", "plain"))
    assert rows_in(tmp_path / "plain.png")
    assert not rows_in(tmp_path / "maps.png")  # a map lies over each of the images
    assert dark.shape[0] > plain.shape[0]  # with the scale of the colours
    with pytest.raises(ValueError, match=r"images: expected 30, .*, got 29"):
        draw_latents(tmp_path / "few.png", samples, open_pictures(coloured(29)))


def test_the_card_shows_the_picture_under_the_curves_and_says_what_is_seen(
    held_out, samples, hub
) -> None:
    # Noise, because it is what PNG compresses least.
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 64, 64, 3), "uint8")
    done = publish_sae(WITH, REPO, evaluation=samples, features=held_out, images=images)
    files = hub.files(REPO)
    picture = files[f"{done.name}/latents.png"]
    assert picture.startswith(b"\x89PNG")
    assert 20_000 < len(picture) < 200_000
    card, record = files["README.md"].decode(), load_pretrained(REPO).record
    assert record.metrics == samples.evaluation.summary()
    latents, ranks = (
        re.sub(r", (\d+)$", r" and \1", ", ".join(map(str, record.latents_shown[name])))
        for name in ("latents", "ranks")
    )
    shown = f"![Images that activate latents {latents} most]({done.name}/latents.png)"
    assert card.index("/curves.png)") < card.index(shown)
    above = int(samples.evaluation.monoscore.significant().sum())
    assert f"of the {above} latents above chance, sorted by MonoScore above chance" in card
    assert f"these are number {ranks}." in card


def test_an_interrupted_upload_goes_on_with_the_same_files(held_out, samples, report, hub) -> None:
    """The picture is the same, found in the pass that measured or in a pass of its own."""
    what = {"features": held_out, "images": coloured(ROWS), "report": report}
    hub.faults.append(Fault("POST", "/commit/", "drop", times=99))
    with pytest.raises(HTTPError):
        publish_sae(WITH, REPO, sae_id="one", evaluation=samples, **what)
    assert "one/cfg.json" not in hub.files(REPO)
    hub.faults.clear()
    publish_sae(WITH, REPO, sae_id="one", evaluation=samples, **what)
    assert {"one/latents.png", "one/report.html"} <= set(hub.files(REPO))
    again = publish_sae(WITH, REPO, sae_id="one", evaluation=samples.evaluation, **what)
    assert {file.change for file in again.files} == {"same"}


def test_no_image_is_published_unless_asked_for(held_out, samples, report, tmp_path, hub) -> None:
    folder = tmp_path / "sae"
    shutil.copytree(WITH, folder)
    (folder / "latents.png").write_bytes((folder / "curves.png").read_bytes())
    shutil.copy(report, folder / "report.html")
    publish_sae(folder, REPO, sae_id="one", features=held_out)
    publish_sae(WITH, REPO, sae_id="two", features=held_out, evaluation=samples)
    files = hub.files(REPO)
    assert not [name for name in files if name.endswith(("latents.png", "report.html"))]
    assert "Images that activate" not in files["README.md"].decode()
    assert load_pretrained(REPO, "one").record.latents_shown == {}


def test_a_published_picture_is_published_again_until_there_are_new_measurements(
    held_out, samples, tmp_path, hub
) -> None:
    what = {"features": held_out, "evaluation": samples}
    publish_sae(WITH, REPO, sae_id="one", images=coloured(ROWS), **what)
    folder = Path(snapshot_download(REPO, local_dir=tmp_path / "copy")) / "one"
    again = publish_sae(folder, REPO, sae_id="one")
    assert {file.change for file in again.files} == {"same"}
    publish_sae(WITHOUT, REPO, sae_id="another")
    card = hub.files(REPO)["README.md"].decode()
    assert card.count("](one/latents.png)") == 1
    with pytest.raises(FileExistsError, match=r"another one/monoloss.json, one/latents.png"):
        publish_sae(folder, REPO, sae_id="one", **what)
    done = publish_sae(folder, REPO, sae_id="one", overwrite=True, **what)
    assert [file.path for file in done.files if file.change == "gone"] == ["one/latents.png"]
    assert "latents.png" not in hub.files(REPO)["README.md"].decode()
    (folder / "latents.png").write_text("secret")
    with pytest.raises(ValueError, match=r"latents.png: not a PNG picture"):
        publish_sae(folder, "alice/more")
    (folder / "latents.png").unlink()
    publish_sae(folder, "alice/more")
    assert load_pretrained("alice/more").record.latents_shown == {}


def test_a_ranking_without_latents_above_chance_is_called_so(held_out, hub) -> None:
    few = first(6, held_out)
    publish_sae(WITH, REPO, features=few, images=coloured(6))
    record = load_pretrained(REPO).record
    assert record.latents_shown["above_chance"] is False
    said = f"of the {record.latents_shown['of']} latents that have a score (none is above chance)"
    assert said in hub.files(REPO)["README.md"].decode()


def test_images_that_do_not_fit_are_named(held_out, samples, hub) -> None:
    few = first(50, held_out)
    for error, said, what in (
        (ValueError, "images: need features", {"images": coloured(3)}),
        (
            ValueError,
            "images: expected 240, .*, got 3",
            {"images": coloured(3), "features": held_out},
        ),
        (TypeError, "images: expected a folder", {"images": 3, "features": held_out}),
        (
            ValueError,
            "images: expected 240, one for each sample that was measured, got 50",
            {"images": coloured(50), "features": few, "evaluation": samples},
        ),
        (
            ValueError,
            "images: no latent has a score",
            {"images": coloured(1), "features": first(1, held_out)},
        ),
    ):
        with pytest.raises(error, match=said):
            publish_sae(WITH, REPO, **what)
    assert not hub.repos


def test_a_report_is_published_beside_the_sae_and_the_card_links_to_it(report, hub) -> None:
    planned = publish_sae(WITH, REPO, sae_id="a/one", report=report, dry_run=True)
    assert "a/one/report.html" in [file.path for file in planned.files]
    assert not hub.repos
    publish_sae(WITH, REPO, sae_id="a/one", report=str(report))
    (link,) = re.findall(r"\[report.html\]\((.*?)\)", hub.files(REPO)["README.md"].decode())
    assert link == f"{hub.url}/{REPO}/resolve/main/a/one/report.html?download=true"
    with urllib.request.urlopen(link) as answer:
        assert answer.read() == report.read_bytes()
    with pytest.raises(FileExistsError, match=r"has another a/one/report.html already"):
        publish_sae(WITH, REPO, sae_id="a/one")
    publish_sae(WITH, REPO, sae_id="a/one", overwrite=True)
    assert "a/one/report.html" not in hub.files(REPO)
    assert "report.html" not in hub.files(REPO)["README.md"].decode()


@pytest.mark.parametrize("case", ["page", "link", "large", "folder", "none", "number"])
def test_what_is_no_report_is_refused(case, report, tmp_path, hub) -> None:
    given, error, said = tmp_path / "given.html", ValueError, f"report: {tmp_path}"
    if case == "page":
        given.write_text("<!doctype html><title>monoloss_plugin</title>my diary")
        said = "is not a page that"
    elif case == "link":
        given.symlink_to(report)
        said = "is a link; give the file itself"
    elif case == "large":
        shutil.copy(report, given)
        with given.open("r+b") as file:
            file.truncate(60_000_001)
        said = "given.html has 60.0 MB, expected at most 60 MB"
    elif case == "folder":
        given.mkdir()
        error, said = IsADirectoryError, "report: .* is a folder"
    elif case == "none":
        error, said = FileNotFoundError, "report: no such file"
    else:
        given, error, said = 3, TypeError, "report: expected the file of a report, got int"
    with pytest.raises(error, match=said):
        publish_sae(WITH, REPO, report=given)
    assert not hub.requests


@pytest.mark.parametrize(
    "said",
    [
        {"latents": [1]},
        {"latents": ["<img>"], "ranks": [1], "of": 1, "above_chance": True},
        {"latents": [1], "ranks": [1, 2], "of": 2, "above_chance": True},
        {"latents": [], "ranks": [], "of": 2, "above_chance": True},
        {"latents": [1], "ranks": [1], "of": "many", "above_chance": True},
        {"latents": [1], "ranks": [1], "of": 1, "above_chance": "<b>"},
        [],
    ],
)
def test_what_a_strangers_record_says_of_a_picture_is_checked(said, tmp_path) -> None:
    shutil.copytree(WITH, tmp_path / "one")
    record = json.loads((WITH / "monoloss.json").read_text())
    (tmp_path / "one" / "monoloss.json").write_text(json.dumps({**record, "latents_shown": said}))
    with pytest.raises(ValueError, match="latents_shown is not what a record holds there"):
        load_pretrained(tmp_path)


def test_the_command_measures_draws_and_sends_the_report(held_out, report, tmp_path, hub) -> None:
    described = held_out.dataset.cast(held_out.dataset.features)
    described.info.description = json.dumps(held_out.record.to_dict())
    described.save_to_disk(tmp_path / "held-out")
    for row, name in enumerate(held_out.ids_of(torch.arange(ROWS))):
        place = tmp_path / "photos" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour(row)).save(place)
    images = ["--images", tmp_path / "photos"]
    options = ["--features", tmp_path / "held-out", *images, "--report", report]

    def run(*arguments: object):
        return CliRunner().invoke(cli.app, [str(a) for a in ("publish", "sae", WITH, *arguments)])

    done = run(REPO, *options)
    assert done.exit_code == 0, done.stderr
    what = {"features": held_out, "images": coloured(ROWS), "report": report}
    sae = load_pretrained(DIGITS, WITH.name).sae
    in_python = publish_sae(WITH, REPO, evaluation=evaluate(sae, held_out), **what)
    assert {file.change for file in in_python.files} == {"same"}
    listed = run("alice/more", *options, "--dry-run")
    for name in ("latents.png", "report.html"):
        assert f"{WITH.name}/{name}" in listed.stdout
    assert ("model", "alice/more") not in hub.repos

    wrong = run(REPO, *images)
    assert wrong.exit_code == 2
    assert "needs --features" in wrong.output
    refused = run(REPO, "--report", WITH / "cfg.json")
    assert refused.exit_code == 1
    assert "is not a page that this version of `monoloss report` writes" in refused.stderr

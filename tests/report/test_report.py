"""``write_report`` and ``monoloss report``: from SAEs, features and images to the page."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.digits import digit_images
from monoloss_plugin.gallery.pictures import open_pictures
from monoloss_plugin.gallery.samples import activating_samples
from monoloss_plugin.report import choice, write_report
from monoloss_plugin.report.choice import choose_images
from tests.report.chromium import chromium, new_tab, open_page
from tests.report.test_packing import Scripts, unpack

SAE = load_pretrained("digits").sae
HELD_OUT = load_features("digits", "held_out")
OTHER = "batchtopk-256-monoloss-0.003"


def data_of(path: Path) -> dict[str, Any]:
    found = Scripts(path.read_text(encoding="utf-8"))
    return json.loads(found.texts["data"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "report.html"
    other = load_pretrained("digits", OTHER).sae
    saes = {"plain": SAE, "<b>mono</b>": other}
    return write_report(saes, HELD_OUT, out, train=load_features("digits", "train"), count=4)


def test_the_page_holds_what_evaluate_and_the_pass_found(page: Path) -> None:
    data = data_of(page)
    assert [one["name"] for one in data["saes"]] == ["plain", "<b>mono</b>"]
    found, sae = activating_samples(SAE, HELD_OUT, count=4), data["saes"][0]
    expected = found.evaluation.latents()
    for name in ("score", "adjusted", "support", "purity", "purity_adjusted", "largest"):
        shown = unpack(sae["columns"][name]).double().numpy()
        np.testing.assert_allclose(shown, expected[name].to_numpy(), rtol=1e-6)
    classes = unpack(sae["columns"]["class"]).tolist()
    assert [data["classes"][c] if c >= 0 else "" for c in classes] == list(expected["class"])
    ids = HELD_OUT.ids_of(torch.arange(len(HELD_OUT)))
    assert ids is not None
    for name, band in found.bands.items():
        images = unpack(sae["bands"][name][0])
        for latent in range(0, 256, 25):
            shown = [data["imageIds"][i] for i in images[latent].tolist() if i >= 0]
            assert shown == [ids[row] for row in band.rows[latent].tolist() if row >= 0]
    labels = unpack(data["imageLabels"]).tolist()
    assert all(id_.startswith(f"{c}/") for id_, c in zip(data["imageIds"], labels, strict=True))


def test_neighbours_breakdown_and_shares_are_those_of_their_definitions(page: Path) -> None:
    data = data_of(page)
    first, second = data["saes"]
    x = torch.nn.functional.normalize(HELD_OUT.tensor().float(), dim=1)
    weights = torch.nn.functional.normalize(SAE.W_dec.detach(), dim=1)
    active = evaluate(SAE, HELD_OUT).monoscore.support > 0
    alive = active.nonzero().flatten().tolist()
    cosines = (weights @ weights.T).fill_diagonal_(-2)[:, active]
    both = torch.cat((SAE.encode(x), load_pretrained("digits", OTHER).sae.encode(x)), 1)
    correlations = torch.corrcoef(both.detach().T)[:256, 256:].nan_to_num(-2)
    for latent in alive[:20]:
        nearest = unpack(first["nearest"][0])[latent]
        assert int(nearest[0]) == alive[int(cosines[latent].argmax())]
        match = int(unpack(first["matches"][1][0])[latent])
        assert float(correlations[latent].max() - correlations[latent, match]) < 0.15  # estimated
        assert first["matches"][0] is None
    latent = alive[0]
    on = SAE.encode(x)[:, latent] > 0
    assert HELD_OUT.labels is not None
    counts = HELD_OUT.labels[on].bincount(minlength=10)
    classes, shown = (unpack(one)[latent].tolist() for one in first["breakdown"])
    assert shown == counts.sort(descending=True).values[:5].tolist()
    assert all(counts[c] == n for c, n in zip(classes, shown, strict=True) if c >= 0)
    shares = unpack(second["ofImages"][1])
    assert float(shares.sum(1).median()) == pytest.approx(1, abs=0.05)


def test_the_summary_has_the_comparison_with_baselines(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for said in ("data points", "random directions", "PCA", "&lt;b&gt;mono&lt;/b&gt;"):
        assert said in text
    summary = evaluate(SAE, HELD_OUT).summary()
    assert f"<td>{summary['r2']:.3f}</td>" in text
    assert {run["name"]: run["baseline"] for run in data_of(page)["runs"]} == {
        "plain": False,
        "<b>mono</b>": False,
        "random directions": True,
        "data points": True,
        "PCA": True,
    }
    assert "599 of scikit-learn" in text
    x = torch.nn.functional.normalize(HELD_OUT.tensor().float(), dim=1)
    latents = SAE.encode(x).detach()
    often = (latents > 0).sum(0) > 8
    correlations = torch.corrcoef(latents.T).nan_to_num(-2).fill_diagonal_(-2).amax(1)[often]
    said = re.search(r"plain: (\d+)% of the latents that are active on more than 8 images", text)
    assert said is not None
    assert int(said[1]) == pytest.approx(100 * float((correlations > 0.5).float().mean()), abs=6)
    assert str(Path.cwd()) not in text


def test_chromium_shows_the_images_that_activate_a_latent(page: Path) -> None:
    found = activating_samples(SAE, HELD_OUT, count=4)
    latent = int(found.evaluation.monoscore.support.argmax())
    rows = found.top.rows[latent]
    ids = HELD_OUT.ids_of(rows)
    assert ids is not None
    with chromium() as browser, new_tab(browser) as tab:
        open_page(tab, page, f"#latent-{latent}")
        tab.wait_for_selector("#view-latent .band img")
        band = tab.locator("#view-latent .band").first.locator("img")
        assert band.count() == 4
        alts = [one.get_attribute("alt") or "" for one in band.all()]
        assert [id_ in alt for id_, alt in zip(ids, alts, strict=True)] == [True] * 4
        assert band.first.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8, 8]


def test_latents_are_named_by_texts(tmp_path: Path) -> None:
    x = torch.nn.functional.normalize(HELD_OUT.tensor().float(), dim=1)
    assert HELD_OUT.labels is not None
    means = {str(c): x[HELD_OUT.labels == c].mean(0) for c in range(10)}

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.stack([means[text] for text in texts])

    out = write_report(
        {"mine": SAE}, HELD_OUT, tmp_path / "r.html", texts=list(means), encoder=encode
    )
    sae = data_of(out)["saes"][0]
    classes, names = unpack(sae["columns"]["class"]).tolist(), sae["names"]
    purity = unpack(sae["columns"]["purity"]).tolist()
    pure = [k for k in range(256) if classes[k] >= 0 and purity[k] > 0.9]
    assert len(pure) > 50
    right = [names[k][0].startswith(f"{classes[k]} (z ") for k in pure]
    assert sum(right) > 0.8 * len(pure)  # 0.1 by chance
    assert all(names[k] == [] for k in range(256) if classes[k] < 0)


def test_images_are_left_out_where_there_is_no_room_the_least_important_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    photos = torch.rand(len(HELD_OUT), 3, 200, 200, generator=generator)
    photos = (torch.nn.functional.interpolate(photos[:, :, ::20, ::20], 200) * 255).byte()
    pictures = open_pictures(photos.numpy(), HELD_OUT)
    found = activating_samples(SAE, HELD_OUT, count=4)
    whole = choose_images([found], pictures)
    assert (whole.size, whole.left_out) == (128, 0)
    every = {row for band in found.bands.values() for row in band.rows.flatten().tolist()} - {-1}
    assert set(whole.rows.tolist()) == every
    strongest = {row for band in found.bands.values() for row in band.rows[:, 0].tolist()} - {-1}
    assert set(whole.rows[: len(strongest)].tolist()) == strongest
    monkeypatch.setattr(choice, "MOST_BYTES", 300_000)
    out = write_report({"mine": SAE}, HELD_OUT, tmp_path / "r.html", images=photos.numpy())
    data = data_of(out)
    assert 150_000 < out.stat().st_size < 400_000
    assert 50 < len(data["imageIds"]) < len(every)
    assert "for which the file has no room" in out.read_text(encoding="utf-8")
    bands = unpack(data["saes"][0]["bands"]["top"][0])
    assert int(bands.max()) < len(data["imageIds"])


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    nasty = ['"><script>boom()</script>', "</script><b>", "it's\x07"]
    ids = [f"{nasty[n % 3]} {n}" for n in range(60)]
    x = torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    record = {"source": {"name": nasty[0]}, "encoder": {"name": nasty[1]}}
    features = FeatureSet.from_tensors(
        x, torch.arange(60) % 3, ids, classes=["<i>a</i>", "b</script>", "c\u202e"], record=record
    )
    images = [np.full((9, 9), n, np.uint8) for n in range(60)]
    out = write_report({nasty[0]: Identity()}, features, tmp_path / "r.html", images=images)
    text = out.read_text(encoding="utf-8")
    assert "<script>boom" not in text
    assert "\x07" not in text
    with chromium() as browser, new_tab(browser) as tab:
        open_page(tab, out, "#latent-3")
        tab.wait_for_selector("#view-latent .band img")
        alt = tab.locator("#view-latent .band img").first.get_attribute("alt")
        assert alt is not None
        assert any(one[:8] in alt for one in nasty)
        assert nasty[0] in tab.title()


class Identity:
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(1, keepdim=True)).relu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + 0.1


def test_wrong_arguments_are_told_before_the_long_work(tmp_path: Path) -> None:
    class Slow(Identity):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the pass has begun")

    out = tmp_path / "r.html"
    for wrong, error, said in (
        ({"images": [np.zeros((4, 4), np.uint8)]}, ValueError, "599"),
        ({"images": tmp_path / "nowhere"}, FileNotFoundError, "no such folder"),
        ({"out": tmp_path}, IsADirectoryError, "out"),
        ({"count": 0}, ValueError, "count"),
        ({"texts": ["a"], "encoder": 3}, TypeError, "encoder"),
        ({"features": torch.eye(3)}, TypeError, "features"),
        ({"saes": [Slow()]}, TypeError, "saes"),
        ({"saes": {}}, ValueError, "saes"),
    ):
        given = {"saes": {"a": Slow()}, "features": HELD_OUT, "out": out, **wrong}
        with pytest.raises(error, match=said):
            write_report(**given)
    assert not out.exists()


def test_features_without_labels_ids_or_images_that_can_be_read(tmp_path: Path) -> None:
    x = torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    files = [tmp_path / f"{n}.png" for n in range(20)]
    from PIL import Image

    for file in files[1:]:
        Image.new("RGB", (40, 30), (200, 0, 0)).save(file)
    files[0].write_bytes(b"not a picture")
    out = write_report(
        {"a": Identity()}, FeatureSet.from_tensors(x), tmp_path / "r.html", images=files
    )
    data = data_of(out)
    assert data["classes"] == []
    assert data["saes"][0]["breakdown"] is None
    assert "1 images" in out.read_text(encoding="utf-8")
    assert unpack(data["imageLengths"]).min() == 0


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    pixels = (digit_images(HELD_OUT) * 255).byte().numpy()
    from PIL import Image

    for id_, one in zip(HELD_OUT.ids_of(torch.arange(599)) or [], pixels, strict=True):
        place = tmp_path / "photos" / id_
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(place)
    SAE.save_model(tmp_path / "runs" / "mine")
    out = tmp_path / "page.html"
    shown = run(
        *("digits", "--against", tmp_path / "runs" / "mine", "--features", "digits:held_out"),
        *("--images", tmp_path / "photos", "--out", out, "--count", 3, "--json"),
    )
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert said == {"report": str(out), "bytes": out.stat().st_size}
    data = data_of(out)
    assert [one["name"] for one in data["saes"]] == ["digits", "mine"]
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n")
    on = ["digits", "--features", "digits:held_out", "--out", tmp_path / "r.html"]
    for wrong, said, code in (
        (["--text-encoder", "clip-vit-l14"], "needs --texts", 2),
        (["--texts", texts], "expected a text on each line", 1),
        (["--texts", tmp_path / "none"], "no such file", 1),
        (["--against", "digits"], "named twice", 2),
        (["--images", tmp_path / "none"], "no such folder", 1),
        (["--texts", __file__], "text side", 1),
    ):
        shown = run(*on, *wrong)
        assert shown.exit_code == code, (wrong, shown.output)
        assert said in shown.output.replace("\n", " "), shown.output


def test_a_page_that_cannot_be_written_fails_before_the_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Never(Identity):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match=r"out: .*file is a file; give a folder"):
        write_report({"mine": Never()}, HELD_OUT, file / "new" / "report.html")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="out: no file can be written in "):
        write_report({"mine": Never()}, HELD_OUT, tmp_path / "new" / "report.html")
    assert list(tmp_path.iterdir()) == [file]

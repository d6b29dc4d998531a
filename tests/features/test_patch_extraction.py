"""Extraction of patches: equal to a plain loop, whatever is chosen, killed, shared or too large."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from typer.testing import CliRunner

from monoloss_plugin import cli
from monoloss_plugin.features import FeatureSet, extraction, shards
from monoloss_plugin.features.encoders import Encoder, PatchTokens, load_encoder
from monoloss_plugin.features.extraction import TooManyUnreadableError, extract
from monoloss_plugin.features.patch_encoding import choose
from monoloss_plugin.features.sources import open_source
from monoloss_plugin.features.store import SettingsError, join
from tests.features.conftest import BAD
from tests.features.test_extraction import StopsAfter
from tests.features.test_sources import digits_dataset

QUIET = {"progress": False, "workers": 0}


@pytest.fixture
def vit(encoders: Path) -> str:
    return f"timm:local-dir:{encoders}/timm/vit"


@pytest.fixture
def few(image_folder: Path, tmp_path: Path) -> Path:
    """Some of the digits, and a damaged file among them."""
    for number in range(5, 10):
        for path in (image_folder / f"digit-{number}").iterdir():
            path.unlink()
        (image_folder / f"digit-{number}").rmdir()
    return image_folder


def tokens_of(name: str, folder: Path) -> dict[str, Tensor]:
    """Every token of each image (T, d), one image at a time, from the library itself."""
    model = load_encoder(name)
    found = {}
    for path in sorted(folder.rglob("*.*g")):
        image_id = path.relative_to(folder).as_posix()
        if image_id not in BAD:
            pixels = model.preprocess(Image.open(path).convert("RGB"))
            with torch.no_grad():
                found[image_id] = model.model.forward_features(pixels[None])[0]
    return found


def same_patches(one: Path, other: Path) -> bool:
    a, b = FeatureSet.open(one), FeatureSet.open(other)
    assert a.ids.to_pylist() == b.ids.to_pylist()
    assert torch.equal(a.images.labels, b.images.labels)
    assert torch.equal(a.patches.starts, b.patches.starts)
    assert torch.equal(a.patches.places, b.patches.places)
    assert torch.equal(a.patches.grids, b.patches.grids)
    torch.testing.assert_close(a.tensor(), b.tensor(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(a.images.tensor(), b.images.tensor(), rtol=2e-3, atol=2e-3)
    assert a.record == b.record
    return True


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("output", ["patches", "cls+patches"])
def test_images_become_their_patches_and_the_mean_of_these(
    output, dtype, vit, few, tmp_path
) -> None:
    encoder = load_encoder(vit, output=output)
    done = extract(few, encoder, tmp_path / "out", dtype=dtype, batch_size=16, **QUIET)
    expected = tokens_of(vit, few)
    features = FeatureSet.open(tmp_path / "out")
    first = 0 if output == "cls+patches" else 1
    assert done.complete
    assert done.rows == done.images == features.num_images == len(expected)
    assert features.ids.to_pylist() == sorted(expected)
    stored = getattr(torch, dtype)
    x = torch.cat([expected[i][first:] for i in sorted(expected)])
    exact = {"rtol": 2e-3, "atol": 2e-3} if dtype == "float16" else {}
    torch.testing.assert_close(features.tensor(), x.to(stored), **exact)
    means = torch.stack([expected[i][1:].mean(0) for i in sorted(expected)])
    torch.testing.assert_close(features.images.tensor(), means.to(stored), **exact)
    assert features.patches.places.tolist() == [*range(first - 1, 16)] * len(expected)
    assert set(map(tuple, features.patches.grids.tolist())) == {(4, 4)}
    assert features.patches.are_whole
    assert features.record.patches == {"grid": [4, 4], "kept": None, "class_token": not first}
    assert (features.record.rows, features.record.width) == (len(expected), 32)
    labels = [features.classes[y] for y in features.images.labels]
    assert labels == [i.split("/")[0] for i in sorted(expected)]


def test_some_patches_of_each_image_are_kept(vit, few, tmp_path) -> None:
    encoder = load_encoder(vit, output="cls+patches")
    options = {"dtype": "float32", "keep_patches": 5, **QUIET}
    extract(few, encoder, tmp_path / "out", batch_size=16, **options)
    features, expected = FeatureSet.open(tmp_path / "out"), tokens_of(vit, few)
    places = features.patches.places.view(-1, 6)
    assert (places[:, 0] == -1).all()
    assert (places.diff(dim=1) > 0).all()
    assert len(places.unique(dim=0)) > 0.9 * len(places)
    counts = places[:, 1:].flatten().long().bincount(minlength=16)
    assert counts.min() > 0
    x = torch.stack([expected[i] for i in sorted(expected)])
    kept = x.gather(1, (places.long() + 1)[:, :, None].expand(-1, -1, 32))
    torch.testing.assert_close(features.tensor(), kept.flatten(0, 1))
    torch.testing.assert_close(features.images.tensor(), x[:, 1:].mean(1))
    assert features.record.patches == {"grid": [4, 4], "kept": 5, "class_token": True}
    assert not features.patches.are_whole
    with pytest.raises(SettingsError, match=r"patches\.kept: 5 there, 6 now"):
        extract(few, encoder, tmp_path / "out", **{**options, "keep_patches": 6})
    extract(few, encoder, tmp_path / "all", dtype="float32", keep_patches=16, **QUIET)
    assert FeatureSet.open(tmp_path / "all").patches.are_whole


@pytest.mark.parametrize("batches", [0, 1, 3])
@pytest.mark.parametrize("keep", [None, 3])
def test_an_interrupted_run_gives_the_same_patches(batches, keep, vit, few, tmp_path) -> None:
    named = load_encoder(vit, output="cls+patches")
    options = {"keep_patches": keep, **QUIET}
    extract(few, named, tmp_path / "whole", batch_size=50, **options)
    stops = StopsAfter(named, batches)
    stopping = Encoder(named.model, named.preprocess, stops, named.record)
    with pytest.raises(KeyboardInterrupt):
        extract(few, stopping, tmp_path / "out", batch_size=10, **options)
    done = extract(few, named, tmp_path / "out", batch_size=7, **options)
    assert done.complete
    assert done.images < done.rows or not batches
    assert same_patches(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("streaming", [False, True])
def test_shares_give_the_same_patches(streaming, vit, few, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(extraction, "_BLOCK", 20)
    encoder = load_encoder(vit, output="patches")
    source = open_source(few).rows.to_iterable_dataset() if streaming else few
    options = {"keep_patches": 4, "batch_size": 9, "save_every": 0, **QUIET}
    extract(source, encoder, tmp_path / "whole", **options)
    for part in range(3):
        extract(source, encoder, tmp_path / f"{part}", shard=(part, 3), **options)
    assert join(tmp_path / "0", [tmp_path / "1", tmp_path / "2"])
    assert same_patches(tmp_path / "0", tmp_path / "whole")


def test_images_of_any_shape_keep_their_grids_and_no_padding(encoders, tmp_path) -> None:
    name = f"transformers:{encoders}/transformers/siglip2"
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(24, 8), (12, 12), (8, 30), (20, 12), (16, 16)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    encoder = load_encoder(name, output="patches")
    extract(folder, encoder, tmp_path / "out", dtype="float32", batch_size=3, **QUIET)
    features, at = FeatureSet.open(tmp_path / "out"), 0
    for number, path in enumerate(sorted(folder.iterdir())):
        inputs = {k: v[None] for k, v in encoder.preprocess(Image.open(path)).items()}
        with torch.no_grad():
            states = encoder.model(**inputs).last_hidden_state
        patches = states[inputs["pixel_attention_mask"].bool()]
        rows = torch.arange(at, at + len(patches))
        torch.testing.assert_close(features.take(rows), patches)
        assert features.image_of(rows).unique().tolist() == [number]
        assert features.patches.places[rows].tolist() == [*range(len(patches))]
        assert features.patches.grids[number].tolist() == inputs["spatial_shapes"][0].tolist()
        torch.testing.assert_close(features.images.take(torch.tensor([number]))[0], patches.mean(0))
        at += len(patches)
    assert at == len(features)
    assert features.patches.are_whole
    assert features.record.patches == {"grid": None, "kept": None, "class_token": False}
    extract(folder, encoder, tmp_path / "some", dtype="float32", keep_patches=13, **QUIET)
    some, counts = FeatureSet.open(tmp_path / "some"), features.patches.starts.diff()
    assert torch.equal(some.patches.starts.diff(), counts.clamp(max=13))
    of_image, first = some.image_of(torch.arange(len(some))), features.patches.starts
    torch.testing.assert_close(
        some.tensor(), features.tensor()[first[of_image] + some.patches.places]
    )


def own_encoder(forward) -> Encoder:
    """Pixels of an image: each of 3 x 2 patches of 8 x 10 pixels is one vector."""
    return Encoder(nn.Identity(), lambda image: pil_to_tensor(image) / 255, forward, {}, "L")


def pixel_patches(inputs: Tensor) -> PatchTokens:
    cut = inputs.unfold(2, 8, 8).unfold(3, 10, 10).flatten(4).flatten(2, 3)[:, 0]
    return PatchTokens(cut, (3, 2))


def test_an_encoder_of_your_own_may_give_patches(few, tmp_path) -> None:
    extract(few, own_encoder(pixel_patches), tmp_path / "out", batch_size=20, **QUIET)
    features = FeatureSet.open(tmp_path / "out")
    first = features.ids_of(torch.tensor([0]))[0]
    pixels = pil_to_tensor(Image.open(few / first).convert("L"))[0] / 255
    assert features.record.patches["grid"] == [3, 2]
    for place in range(6):
        row, column = divmod(place, 2)
        patch = pixels[8 * row : 8 * row + 8, 10 * column : 10 * column + 10]
        assert torch.equal(features.take(torch.tensor([place]))[0], patch.flatten().half())


def tokens(*shape: int, **others) -> PatchTokens:
    return PatchTokens(torch.zeros(shape), **{"grid": (2, 2), **others})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (lambda n: tokens(n, 6, 3), r"a patch for each place of a grid \(2, 2\), got 6"),
        (lambda n: tokens(n, 4), r"expected patches \(B, P, d\), got \(1, 4\)"),
        (lambda n: tokens(n, 4, 3, grid=torch.tensor([2, 2])), r"grid of shape \(1, 2\), got"),
        (lambda n: tokens(n, 4, 3, class_token=torch.zeros(n, 2)), r"class_token of shape \(1, 3"),
        (lambda n: tokens(n, 4, 3, present=torch.ones(n, 5)), r"present of shape \(1, 4\)"),
        (lambda n: tokens(n, 4, 3, grid=(2, 2) if n == 1 else (4, 1)), r"grid \(2, 2\) of the"),
        (lambda n: torch.zeros(n, 4, 3), r"\(B, d\), or PatchTokens for patches, got \(1, 4, 3"),
    ],
)
def test_patches_that_do_not_fit_are_named(found, said, few, tmp_path) -> None:
    encoder = own_encoder(lambda inputs: found(len(inputs)))
    with pytest.raises(ValueError, match=said):
        extract(few, encoder, tmp_path / "out", batch_size=4, **QUIET)


def test_an_image_with_a_patch_that_is_not_finite_is_left_out(few, tmp_path) -> None:
    """Also if that patch is not kept: the mean would not be finite."""

    def sometimes(inputs: Tensor) -> PatchTokens:
        found = pixel_patches(inputs)
        found.features[2::7, 4, 3] = 1e6 if wide else float("inf")
        return found

    wide = True
    whole = extract(few, own_encoder(pixel_patches), tmp_path / "whole", **QUIET)
    done = extract(few, own_encoder(sometimes), tmp_path / "out", batch_size=100, **QUIET)
    bad = {one.image_id for one in done.unreadable if "not finite as torch.float16" in one.error}
    assert len(bad) > 5
    assert done.rows == whole.rows - len(bad)
    found, expected = FeatureSet.open(tmp_path / "out"), FeatureSet.open(tmp_path / "whole")
    kept = [n for n, i in enumerate(expected.ids.to_pylist()) if i not in bad]
    assert torch.equal(found.tensor(), expected.select(torch.tensor(kept)).tensor())
    wide = False
    some = extract(
        few, own_encoder(sometimes), tmp_path / "some", batch_size=100, keep_patches=1, **QUIET
    )
    assert {one.image_id for one in some.unreadable} == {one.image_id for one in done.unreadable}
    with pytest.raises(TooManyUnreadableError):
        extract(few, own_encoder(sometimes), tmp_path / "few", max_unreadable=1, **QUIET)


def test_the_size_on_disk_is_said_before_it_starts(vit, few, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "monoloss_plugin")
    encoder = load_encoder(vit, output="cls+patches")
    count = open_source(few).num_images
    extract(few, encoder, tmp_path / "out", **QUIET)
    said = f"{count} images x 17 patches x 32 take 0.1 MB as float16, and for a short time"
    assert said in caplog.text
    caplog.clear()
    extract(few, encoder, tmp_path / "out", **QUIET)
    assert not caplog.text  # it is complete
    stream = open_source(few).rows.to_iterable_dataset()
    extract(stream, encoder, tmp_path / "streamed", keep_patches=2, **QUIET)
    assert "each 1,000 images x 3 patches x 32 take 0.3 MB as float16" in caplog.text
    caplog.clear()
    extract(few, load_encoder(vit), tmp_path / "pooled", **QUIET)
    assert not caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_disk_that_is_too_small_is_refused_before_any_work(
    dtype, vit, few, tmp_path, monkeypatch
) -> None:
    count = open_source(few).num_images
    of_image = 16 * (32 * (2 if dtype == "float16" else 4) + 2) + 32 * (
        2 if dtype == "float16" else 4
    )
    encoder, out = load_encoder(vit, output="patches"), tmp_path / "a" / "b"
    monkeypatch.setattr(
        extraction.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * count * of_image - 1)
    )
    with pytest.raises(ValueError, match=r"^out: .* are free; keep_patches= stores fewer") as error:
        extract(few, encoder, out, dtype=dtype, **QUIET)
    assert ("dtype='float16'" in str(error.value)) == (dtype == "float32")
    assert not out.exists()
    assert extract(few, encoder, out, dtype=dtype, keep_patches=15, **QUIET).complete


def test_the_size_that_is_said_is_that_of_the_files(vit, digit_images, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "monoloss_plugin")
    encoder = load_encoder(vit, output="patches")
    many = digits_dataset(digit_images * 10)
    extract(many, encoder, tmp_path / "out", **QUIET)
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.arrow"))
    said = float(caplog.text.split(" take ")[1].split(" MB")[0]) * 1e6
    assert said == pytest.approx(files, rel=0.1)


def test_shards_of_patches_are_small(vit, few, tmp_path, monkeypatch) -> None:
    """A shard is collected in memory, so bytes count, not images."""
    sizes: list[int] = []

    def counted(writer: shards.ShardWriter) -> None:
        sizes.append(sum(one.features.nbytes for one in writer._batches))
        save(writer)

    save = shards.ShardWriter.save
    monkeypatch.setattr(shards.ShardWriter, "save", counted)
    monkeypatch.setattr(shards, "_LARGEST_OF_PATCHES", 20_000)
    encoder = load_encoder(vit, output="patches")
    extract(few, encoder, tmp_path / "out", batch_size=4, **QUIET)
    assert len(sizes) > 3
    assert max(sizes) <= 20_000 + 4 * 16 * 32 * 2


def test_a_vector_for_each_image_has_no_patches_to_keep(vit, few, tmp_path) -> None:
    with pytest.raises(ValueError, match="keep_patches: this encoder gives one vector"):
        extract(few, vit, tmp_path / "out", keep_patches=3, **QUIET)
    with pytest.raises(ValueError, match="keep_patches: expected at least 1, got 0"):
        extract(few, vit, tmp_path / "out", keep_patches=0, **QUIET)
    assert not (tmp_path / "out").exists()


def test_the_choice_of_patches_is_random_by_row_and_place_alone() -> None:
    places, there = np.tile(np.arange(50), (2000, 1)), np.ones((2000, 50), bool)
    found = choose(places, there, range(2000), 10)
    assert (found.sum(1) == 10).all()
    # Each place is kept in a fifth of 2,000 rows: 400, give or take 18 (one standard deviation).
    assert (np.abs(found.sum(0) - 400) < 5 * 18).all()
    # Two places together: 10 * 9 / (50 * 49) of the rows, 73 give or take 8.4.
    together = (found[:, :-1] & found[:, 1:]).sum(0)
    assert (np.abs(together - 73.5) < 5 * 8.4).all()
    again = choose(places[5:9], there[5:9], range(5, 9), 10)
    assert (again == found[5:9]).all()


def test_the_commands_store_and_show_patches(vit, few, tmp_path) -> None:
    run = CliRunner()
    out = str(tmp_path / "out")
    arguments = ["extract", str(few), "-e", vit, "-o", out, "--workers", "0"]
    done = run.invoke(cli.app, [*arguments, "--output", "cls+patches", "--keep-patches", "4"])
    assert done.exit_code == 0, done.output
    assert " images x 5 patches x 32 take " in done.output
    shown = run.invoke(cli.app, ["features", "info", out]).output
    count = FeatureSet.open(out).num_images
    assert f"{5 * count} x 32, torch.float16" in shown
    assert str(count) in shown
    assert "a grid of 4 x 4, 4 patches kept of each image, with the class token" in shown
    assert "all is well" in run.invoke(cli.app, ["features", "verify", out]).output

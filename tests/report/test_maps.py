"""Heat maps of a page on patches, as a reader sees them in Chromium."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf
from torch import Tensor
from typer.testing import CliRunner

from monoloss_plugin import cli
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.encoders import load_encoder
from monoloss_plugin.features.extraction import extract
from monoloss_plugin.gallery import activating_samples, heat_maps
from monoloss_plugin.gallery.overlay import heat_colours
from monoloss_plugin.gallery.pictures import open_pictures
from monoloss_plugin.report import choice, maps, write_report
from monoloss_plugin.report.choice import choose_images
from monoloss_plugin.report.maps import activation_codes
from tests.features.test_patches import dataset_of
from tests.report.chromium import new_tab, open_page
from tests.report.test_packing import unpack
from tests.report.test_report import data_of

IMAGES, SIDE, LATENTS = 30, 64, 10
GRID = (4, 4)
STEPS: dict[str, Any] = {"input_size": (3, SIDE, SIDE), "crop_pct": 0.8, "mean": (0.5,) * 3}
WIDE, HIGH = 120, 80
"""Of the photographs. timm resizes them to a height of 80, and sees the middle 64 x 64."""


def photographs() -> np.ndarray:
    """Noise, with a white spot in one patch of each photograph's middle: of image n in patch n."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (IMAGES, HIGH, WIDE, 3), "uint8")
    for n in range(IMAGES):
        x, y = spot(n)
        pixels[n, y - 6 : y + 6, x - 6 : x + 6] = 255
    return pixels


def spot(n: int) -> tuple[int, int]:
    """Where the spot of an image is: the middle of a patch."""
    row, column = divmod(n % 16, 4)
    return (WIDE - SIDE) // 2 + 16 * column + 8, (HIGH - SIDE) // 2 + 16 * row + 8


def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, embed_dim=24, depth=1, num_heads=2, num_classes=0
    ).eval()


@torch.no_grad()
def patch_set() -> FeatureSet:
    """The tokens of a small ViT; the first of its 24 dimensions is how bright a patch is."""
    model, transform = vit(), create_transform(**STEPS, is_training=False)
    inputs = torch.stack([transform(Image.fromarray(one)) for one in photographs()])
    tokens = model.forward_features(inputs)[:, 1:]
    tokens[:, :, 0] = torch.nn.functional.avg_pool2d(inputs.mean(1, keepdim=True), 16).flatten(1)
    ids = [f"{n:02d}.png" for n in range(IMAGES)]
    record = {"encoder": {"preprocessing": STEPS}}
    return FeatureSet.from_tensors(
        tokens, torch.arange(IMAGES) % 3, ids, classes=["a", "b", "c"], record=record
    )


class PatchSAE:
    """Latent 0 is how bright a patch is; the others are random directions."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(LATENTS, 24, generator=generator)
        self.weight[0] = torch.eye(24)[0]

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.weight / 24


FEATURES = patch_set()
SAES = {"one": PatchSAE(), "two": PatchSAE(1)}
X = torch.nn.functional.normalize(FEATURES.tensor(), dim=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("maps") / "report.html"
    return write_report(SAES, FEATURES, out, images=photographs(), count=4)


def image_of(data: dict[str, Any], n: int) -> int:
    """The number in the page of an image of the set."""
    return data["imageIds"].index(f"{n:02d}.png")


def test_the_file_holds_the_maps_of_the_bands(path: Path) -> None:
    data = data_of(path)
    for (name, sae), packed in zip(SAES.items(), data["saes"], strict=True):
        assert packed["name"] == name
        largest = sae.encode(X).amax(0)
        for band in ("top", "middle", "bottom"):
            assert packed["maps"][band]["count"] == 4
            codes = unpack(packed["maps"][band]["codes"]).view(-1, 16)
            images = unpack(packed["bands"][band][0]).tolist()
            pairs = [(k, i) for k in range(LATENTS) for i in images[k] if i >= 0]
            rows = [int(data["imageIds"][i].removesuffix(".png")) for _, i in pairs]
            drawn = heat_maps(sae, FEATURES, [k for k, _ in pairs], rows)
            assert len(drawn) == len(codes)
            for (k, _), one, shown in zip(pairs, drawn, codes, strict=True):
                expected = 254 * one.flatten() / largest[k]
                assert float((shown - expected).abs().max()) < 1
                assert torch.equal(shown > 0, expected > 0)
        assert "near misses" not in packed["maps"]


def test_activations_are_stored_as_whole_numbers() -> None:
    values = torch.tensor([0.0, 1e-9, 0.5, 1.0, torch.nan, -2.0])
    assert activation_codes(values, torch.tensor(1.0)).tolist() == [0, 1, 127, 254, 255, 0]
    assert activation_codes(torch.zeros(2), torch.tensor(0.0)).tolist() == [0, 0]


def centre(box: dict[str, float] | None) -> tuple[float, float]:
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_frame_lies_on_what_the_latent_responds_to(tab: Page) -> None:
    """Also where a thumbnail shows the middle of a photograph alone."""
    tab.evaluate("location.hash = '#latent-0'")
    items = tab.locator("ol.band").first.locator("li")
    assert items.count() == 4
    for item in items.all():
        n = int((item.locator("img").get_attribute("alt") or "")[:2])
        thumb = item.locator(".thumb").bounding_box()
        assert thumb is not None
        scale = thumb["height"] / HIGH
        x, y = spot(n)
        expected = centre(thumb)[0] + scale * (x - WIDE / 2), thumb["y"] + scale * y
        assert centre(item.locator(".frame").bounding_box()) == pytest.approx(expected, abs=1)
        row, column = divmod(n % 16, 4)
        words = f"strongest at row {row + 1}, column {column + 1} of 4 \u00d7 4"
        assert words in (item.locator("img").get_attribute("alt") or "")
        assert words in (item.locator(".thumb").get_attribute("data-tip") or "")


def test_the_colours_are_those_of_the_notebook(tab: Page) -> None:
    strengths = [0.0, 0.2, 0.5, 0.81, 1.0]
    shown = torch.tensor(tab.evaluate("all => all.map(heatColour)", strengths))
    difference = shown - heat_colours(torch.tensor(strengths)).long()
    assert int(difference.abs().max()) <= 1  # 132.5 is rounded up and down


def test_the_help_of_coherence_says_what_chance_is(tab: Page) -> None:
    tab.evaluate("location.hash = '#latent-0'")
    said = tab.locator("dd.help").filter(has_text="Moran")
    expect(said).to_contain_text("\u22121/(P \u2212 1) on average")


def test_a_switch_and_a_key_turn_the_maps_off(tab: Page) -> None:
    tab.evaluate("location.hash = '#latent-0'")
    drawn, box = tab.locator("ol.band .heat").first, tab.get_by_label("heat maps")
    expect(drawn).to_be_visible()
    largest = float(SAES["one"].encode(X)[:, 0].max())
    expect(tab.locator(".map-legend")).to_contain_text(f"{largest:.3f}")
    box.uncheck()
    expect(drawn).to_be_hidden()
    tab.keyboard.press("m")
    expect(drawn).to_be_visible()
    expect(box).to_be_checked()
    tab.keyboard.press("m")
    tab.keyboard.press("j")
    expect(tab.get_by_label("heat maps")).not_to_be_checked()  # it stays off
    expect(tab.locator("ol.band .heat").first).to_be_hidden()
    near_misses = tab.locator(".bands section").nth(3)
    assert near_misses.locator(".heat").count() == 0


def latents_listed(view: Locator) -> list[str]:
    return view.locator("a.number").evaluate_all("all => all.map(a => a.getAttribute('href'))")


def strongest(sae: PatchSAE, n: int, place: int) -> tuple[list[int], list[float]]:
    activations = sae.encode(X[16 * n + place])
    best = activations.topk(4)
    alive = int((best.values > 0).sum())
    return best.indices[:alive].tolist(), best.values[:alive].tolist()


def test_a_place_of_an_image_leads_to_its_latents(tab: Page, path: Path) -> None:
    data, n = data_of(path), 6
    tab.evaluate(f"location.hash = '#image-{image_of(data, n)}'")
    view = tab.locator("#view-image")
    cells = view.get_by_role("gridcell")
    assert cells.count() == 16
    for place in (6, 0, 15):
        cells.nth(place).click()
        expect(view.locator(".place-latents h3")).to_have_text(
            f"Place: row {place // 4 + 1}, column {place % 4 + 1} of 4 \u00d7 4"
        )
        expected = [
            (prefix + str(k), value)
            for prefix, sae in zip(("#latent-", "#sae-2-latent-"), SAES.values(), strict=True)
            for k, value in zip(*strongest(sae, n, place), strict=True)
        ]
        found = view.locator(".place-latents")
        assert latents_listed(found) == [href for href, _ in expected]
        values = found.locator("li > span:nth-of-type(2)").all_inner_texts()
        assert [float(one) for one in values] == pytest.approx(
            [value for _, value in expected], abs=0.02
        )
    assert cells.nth(15).get_attribute("aria-selected") == "true"
    # The cell lies on the patch that the encoder saw there.
    x, y = spot(n)
    photo = view.locator(".places-frame").bounding_box()
    assert photo is not None
    scale = photo["width"] / WIDE
    expected_centre = photo["x"] + scale * x, photo["y"] + scale * y
    assert centre(cells.nth(n).bounding_box()) == pytest.approx(expected_centre, abs=1)


def test_places_are_reached_with_the_keyboard(tab: Page, path: Path) -> None:
    tab.evaluate(f"location.hash = '#image-{image_of(data_of(path), 6)}'")
    view = tab.locator("#view-image")
    cells = view.get_by_role("gridcell")
    cells.first.focus()
    for key, place in (("Enter", 0), ("ArrowRight", 1), ("ArrowDown", 5), ("ArrowLeft", 4)):
        tab.keyboard.press(key)
        expect(cells.nth(place)).to_be_focused()
        expect(cells.nth(place)).to_have_attribute("aria-selected", "true")
    tab.keyboard.press("ArrowLeft")  # not to the row before
    expect(cells.nth(4)).to_be_focused()
    assert view.locator("[role=gridcell][tabindex='0']").count() == 1


def test_a_latent_that_is_pointed_at_shows_its_map_over_the_image(tab: Page, path: Path) -> None:
    data, n = data_of(path), 6
    tab.evaluate(f"location.hash = '#image-{image_of(data, n)}'")
    view = tab.locator("#view-image")
    assert view.locator(".heat").count() == 0
    row = view.locator(".bars.wide li").filter(has=tab.locator("a[href='#latent-0']")).first
    row.hover()
    x, y = spot(n)
    photo = view.locator(".places-frame").bounding_box()
    assert photo is not None
    scale = photo["width"] / WIDE
    frame = view.locator(".heat .frame")
    expected = pytest.approx((photo["x"] + scale * x, photo["y"] + scale * y), abs=1)
    assert centre(frame.bounding_box()) == expected
    expect(view.get_by_role("status")).to_contain_text("Latent 0 of one: strongest at row 2")
    tab.mouse.move(2, 2)
    expect(frame).to_have_count(0)
    button = row.get_by_role("button", name="Show the map of latent 0")
    button.click()
    tab.mouse.move(2, 2)
    expect(frame).to_have_count(1)
    expect(button).to_have_attribute("aria-pressed", "true")
    button.click()
    tab.mouse.move(2, 2)
    expect(button).to_have_attribute("aria-pressed", "false")
    button.blur()
    expect(frame).to_have_count(0)


def test_a_narrow_dark_screen_and_print_have_the_maps(browser: Browser, path: Path) -> None:
    with new_tab(browser, viewport={"width": 390, "height": 844}, color_scheme="dark") as tab:
        for address in ("#latent-0", "#image-0", "#latents"):
            open_page(tab, path, address)
            if address == "#image-0":
                tab.get_by_role("gridcell").nth(5).click()
                tab.locator(".map-button").first.click()
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
            if address != "#latents":
                expect(tab.locator(".heat").first).to_be_visible()
        open_page(tab, path, "#latent-0")
        tab.emulate_media(media="print")
        expect(tab.locator(".heat").first).to_be_visible()
        expect(tab.locator(".map-switch").first).to_be_hidden()


def test_images_of_different_grids_without_all_patches(browser: Browser, tmp_path: Path) -> None:
    features = FeatureSet(dataset_of())
    sae = PatchSAE()
    sae.weight = sae.weight[:, :5]
    pixels = photographs()[:7]
    out = write_report({"one": sae}, features, tmp_path / "r.html", images=pixels, count=7)
    text = out.read_text(encoding="utf-8")
    assert "the maps lie over whole images" in text
    assert "<dd>29</dd>" in text  # patches
    data = data_of(out)
    with new_tab(browser) as tab:
        open_page(tab, out, f"#image-{data['imageIds'].index('image 1')}")
        assert tab.get_by_role("gridcell").count() == 4
        open_page(tab, out, f"#image-{data['imageIds'].index('image 2')}")
        tab.get_by_role("gridcell").nth(0).click()  # a patch that was not kept
        said = tab.locator(".place-latents p")
        expect(said).to_have_text(["The set does not hold this patch."])
        largest = sae.encode(torch.nn.functional.normalize(features.tensor().float(), dim=1))
        assert features.patches is not None
        latent = int(largest[features.patches.rows_of(torch.tensor([2]))].amax(0).argmax())
        open_page(tab, out, f"#latent-{latent}")
        item = tab.locator(".bands li").filter(has=tab.locator("img[alt^='image 2']"))
        expect(item.locator(".stripes")).to_have_attribute("d", "M0 1l1-1M0 2l1-1")


def extracted(folder: Path) -> FeatureSet:
    """The class token and four patches of each photograph, as this package extracts them."""
    (folder / "photos").mkdir()
    for n, one in enumerate(photographs()):
        Image.fromarray(one).save(folder / "photos" / f"{n:02d}.png")
    model = vit()
    model.pretrained_cfg |= {"input_size": STEPS["input_size"], "crop_pct": STEPS["crop_pct"]}
    arguments = {"img_size": SIDE, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    save_for_hf(model, folder / "vit", model_args=arguments)
    encoder = load_encoder(f"timm:local-dir:{folder}/vit", output="cls+patches")
    extract(folder / "photos", encoder, folder / "out", keep_patches=4, progress=False, workers=0)
    return FeatureSet.open(folder / "out")


class ClassTokenSAE(PatchSAE):
    """Latent 1 is active on class tokens alone."""

    def __init__(self, features: FeatureSet) -> None:
        super().__init__()
        assert features.patches is not None
        x = torch.nn.functional.normalize(features.tensor().float(), dim=1)
        is_token = features.patches.places < 0
        self.weight[1] = x[is_token].mean(0) - x[~is_token].mean(0)
        self.most = (x @ self.weight[1])[~is_token].max() + 1e-4
        assert ((self.encode(x)[:, 1] > 0) == is_token).all()

    def encode(self, x: Tensor) -> Tensor:
        latents = x @ self.weight.T
        latents[:, 1] -= self.most
        return latents.relu()


def test_places_of_patches_that_the_set_does_not_hold(browser: Browser, tmp_path: Path) -> None:
    features = extracted(tmp_path)
    assert features.patches is not None
    sae = ClassTokenSAE(features)
    out = write_report({"one": sae}, features, tmp_path / "r.html", images=photographs(), count=2)
    said = []
    with new_tab(browser) as tab:
        for n in range(0, IMAGES, 6):
            held = features.patches.places[features.patches.rows_of(torch.tensor([n]))].tolist()
            missing = [place for place in range(16) if place not in held]
            assert len(missing) == 12
            open_page(tab, out, f"#image-{image_of(data_of(out), n)}")
            for row in tab.locator(".bars.wide li").all():
                row.hover()
                stripes = "".join(f"M{place % 4} {place // 4 + 1}l1-1" for place in missing)
                expect(tab.locator(".heat .stripes")).to_have_attribute("d", stripes)
                said.append(tab.get_by_role("status").inner_text())
            for place in range(16):
                tab.get_by_role("gridcell").nth(place).click()
                texts = tab.locator(".place-latents > p, .place-latents .empty").all_inner_texts()
                if place in missing:
                    assert texts == ["The set does not hold this patch."]
                else:
                    assert [text[:24] for text in texts] == ["The 4 latents with the l"]
    from_bands = [text for text in said if "among the" not in text]
    assert 0 < len(from_bands) < len(said)  # both kinds of maps were seen


def test_a_latent_of_class_tokens_has_dark_maps_without_a_frame(
    browser: Browser, tmp_path: Path
) -> None:
    features = extracted(tmp_path)
    sae = ClassTokenSAE(features)
    out = write_report({"one": sae}, features, tmp_path / "r.html", images=photographs(), count=2)
    with new_tab(browser) as tab:
        open_page(tab, out, "#latent-1")
        top = tab.locator("ol.band").first.locator("li")
        assert top.locator(".heat").count() == 2
        assert tab.locator(".heat .frame").count() == 0
        alt = top.first.locator("img").get_attribute("alt") or ""
        assert alt.endswith(", at no place")
        open_page(tab, out, f"#image-{image_of(data_of(out), int(alt[:2]))}")
        tab.locator(".bars.wide li").filter(has=tab.locator("a[href='#latent-1']")).hover()
        status = tab.get_by_role("status")
        expect(status).to_have_text("Latent 1: active at no place.")


def test_maps_take_their_part_of_the_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures = open_pictures(photographs(), FEATURES)
    found = activating_samples(SAES["one"], FEATURES, count=4)
    whole = choose_images([found], pictures, FEATURES)
    assert whole.plan is not None
    assert whole.plan.counts == {"top": 4, "middle": 4, "bottom": 4}
    bands = (found.top, found.middle, found.bottom)
    assert whole.plan.size == int(16 * sum(int((of.rows >= 0).sum()) for of in bands) * 4 / 3)
    assert whole.num_seen == len(whole.rows) == IMAGES
    assert choose_images([found], pictures).plan is None
    beside, room = choice._bytes_of(found), whole.plan.size / maps._SHARE
    counts, seen = [], []
    for share in (1.01, 0.5, 0.12, 0.01):
        monkeypatch.setattr(choice, "MOST_BYTES", beside + int(share * room))
        less = choose_images([found], pictures, FEATURES)
        assert less.plan is not None
        counts.append(dict(less.plan.counts))
        seen.append(less.num_seen)
    assert counts == [whole.plan.counts, {"top": 4}, {"top": 1}, {}]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < IMAGES
    monkeypatch.setattr(choice, "MOST_BYTES", beside + 12_000)
    out = write_report(
        {"one": SAES["one"]}, FEATURES, tmp_path / "r.html", images=photographs(), count=4
    )
    data = data_of(out)
    assert 1 < data["maps"]["seen"] <= len(data["imageIds"]) < IMAGES
    strongest_of = unpack(data["saes"][0]["strongest"][0])
    assert len(strongest_of) == 16 * 4 * data["maps"]["seen"]
    assert all(len(unpack(of["codes"])) for of in data["saes"][0]["maps"].values())


def test_a_page_without_room_for_maps_works(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(maps, "_SHARE", 0.0)
    monkeypatch.setattr(maps, "_SHARE_OF_PLACES", 0.0)
    real = choice.choose_images
    monkeypatch.setattr(
        "monoloss_plugin.report.content.choose_images",
        lambda *given, **options: replace(real(*given, **options), num_seen=2),
    )
    out = write_report({"one": SAES["one"]}, FEATURES, tmp_path / "r.html", images=photographs())
    assert "none, since the file has no room" in out.read_text(encoding="utf-8")
    with new_tab(browser) as tab:
        open_page(tab, out, "#latent-0")
        expect(tab.locator("ol.band img").first).to_be_visible()
        assert tab.locator(".heat").count() == 0
        open_page(tab, out, "#image-5")
        assert tab.get_by_role("gridcell").count() == 0
        said = tab.locator("#view-image").get_by_role("status")
        expect(said).to_contain_text("The file has no room for the latents")


def test_a_page_on_images_knows_no_maps(tmp_path: Path) -> None:
    out = write_report(
        {"one": SAES["one"]}, FEATURES.images, tmp_path / "r.html", images=photographs()
    )
    data = data_of(out)
    assert "maps" not in data
    assert not {"maps", "strongest"} & set(data["saes"][0])
    assert "heat maps</p>" not in out.read_text(encoding="utf-8")


def test_the_command_writes_a_page_on_a_folder_of_patches(tmp_path: Path) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig

    described = FEATURES.dataset.cast(FEATURES.dataset.features)
    described.info.description = json.dumps(FEATURES.record.to_dict())
    described.save_to_disk(tmp_path / "patches")
    (tmp_path / "photos").mkdir()
    for n, one in enumerate(photographs()):
        Image.fromarray(one).save(tmp_path / "photos" / f"{n:02d}.png")
    TopKSAE(TopKSAEConfig(d_in=24, d_sae=LATENTS, k=3)).save_model(tmp_path / "sae")
    out = tmp_path / "page.html"
    given = ["report", tmp_path / "sae", "--features", tmp_path / "patches", "--out", out]
    done = CliRunner().invoke(cli.app, [*map(str, given), "--images", str(tmp_path / "photos")])
    assert done.exit_code == 0, done.output
    assert set(data_of(out)["saes"][0]["maps"]) == {"top", "middle", "bottom"}

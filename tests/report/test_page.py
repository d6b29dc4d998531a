"""The page of latents, as a reader sees it in Chromium, opened from disk without a network."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from monoloss_plugin.report.page import write_page
from tests.report.chromium import new_tab, open_page
from tests.report.synthetic import NASTY, make_page

PAGE = make_page(images=1100)  # two packs
FIRST, SECOND = PAGE.saes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(PAGE, tmp_path_factory.mktemp("page") / "latents.html")


def listed(tab: Page) -> list[int]:
    return [int(text) for text in tab.locator(".latents .col-latent a").all_inner_texts()]


def ranked(column: torch.Tensor, *, descending: bool) -> list[int]:
    """Numbers by value, ties by number, undefined ones last."""
    values = column.double()
    defined = [i for i in range(len(values)) if not values[i].isnan()]
    sign = -1 if descending else 1
    undefined = [i for i in range(len(values)) if values[i].isnan()]
    return sorted(defined, key=lambda i: (sign * float(values[i]), i)) + undefined


def test_the_summary_shows_texts_as_they_are_and_marks_baselines(tab: Page) -> None:
    expect(tab).to_have_title(PAGE.title)
    expect(tab.locator("h1")).to_have_text(PAGE.title)
    values = tab.locator(".about dd").all_inner_texts()
    assert values == [value for _, value in PAGE.about]
    rows = tab.locator(".comparison tbody tr")
    assert rows.count() == len(PAGE.rows)
    expect(rows.nth(2).locator("th")).to_have_text("dead <b>latents</b>")
    expect(tab.locator(".comparison thead th").nth(2)).to_have_text(SECOND.name)
    expect(tab.locator(".comparison td.baseline")).to_have_text(["0.12", "0.50", "0"])
    expect(tab.locator(".comparison th.baseline")).to_have_text("random baseline")
    assert tab.locator(".notes li").all_inner_texts()[1].endswith(PAGE.notes[1])


def test_the_summary_needs_no_script(browser: Browser, path: Path) -> None:
    with new_tab(browser, java_script_enabled=False) as tab:
        open_page(tab, path)
        expect(tab.locator("h1")).to_be_visible()
        expect(tab.locator(".comparison tbody tr")).to_have_count(len(PAGE.rows))
        expect(tab.locator("noscript p")).to_be_visible()


def test_charts_have_a_text_a_curve_for_each_sae_and_hollow_baselines(tab: Page) -> None:
    charts = tab.locator("#charts figure svg")
    assert charts.count() == 5
    for label in charts.evaluate_all("all => all.map(e => e.getAttribute('aria-label'))"):
        assert len(label) > 20
    expect(charts.nth(0).locator("polyline")).to_have_count(4)  # two curves, two chance levels
    expect(charts.nth(1).locator("path.dot")).to_have_count(3)  # a run without R² is left out
    expect(charts.nth(1).locator("path.hollow")).to_have_count(1)
    for line in charts.locator("polyline").all():
        points = line.get_attribute("points")
        assert points is not None
        spots = [tuple(map(float, point.split(","))) for point in points.split()]
        assert all(46 <= x <= 350 and 10 <= y <= 182 for x, y in spots)  # within the axes
    # The curve falls from the largest score to the smallest: y is at 10 for 1 and at 182 for 0.
    points = charts.nth(0).locator("polyline").first.get_attribute("points")
    assert points is not None
    heights = [1 - (float(point.split(",")[1]) - 10) / 172 for point in points.split()]
    wanted = FIRST.columns["score"][~FIRST.columns["score"].isnan()].sort(descending=True).values
    assert torch.tensor(heights) == pytest.approx(wanted, abs=1e-3)


def test_the_list_starts_with_the_best_and_pages_through_all(tab: Page) -> None:
    wanted = ranked(FIRST.columns["adjusted"], descending=True)
    expect(tab.locator("#count")).to_have_text("60 of 60 latents")
    assert listed(tab) == wanted[:50]
    tab.get_by_role("button", name="Next").first.click()
    assert listed(tab) == wanted[50:]
    expect(tab.locator(".pager span").first).to_have_text("Page 2 of 2")
    expect(tab.get_by_role("button", name="Next").first).to_be_disabled()


def test_columns_sort_both_ways_with_undefined_values_last(tab: Page) -> None:
    for column, descending in product(("support", "score"), (True, False)):
        header = tab.locator(f"th.col-{column}")
        header.get_by_role("button").click()
        expect(header).to_have_attribute("aria-sort", "descending" if descending else "ascending")
        seen = listed(tab)
        tab.get_by_role("button", name="Next").first.click()
        assert seen + listed(tab) == ranked(FIRST.columns[column], descending=descending)
        assert tab.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1


def test_every_column_can_be_chosen_to_sort_by(tab: Page) -> None:
    chooser = tab.get_by_label("Sort by").first
    options = chooser.locator("option").evaluate_all("all => all.map(o => o.value)")
    assert set(options) == {"latent", "names", *FIRST.columns}
    chooser.select_option("p")
    assert listed(tab) == ranked(FIRST.columns["p"], descending=False)[:50]
    tab.locator("#direction").click()
    assert listed(tab) == ranked(FIRST.columns["p"], descending=True)[:50]
    chooser.select_option("class")
    classes = [PAGE.classes[i].replace("\x07", r"\x07") for i in FIRST.columns["class"].tolist()]
    texts = tab.locator(".latents .class").all_inner_texts()
    shown = [re.sub(r": [\d.]+ %$", "", text) for text in texts]  # without the class's share
    assert [len(list(group)) for _, group in groupby(shown)][:-1] == [
        classes.count(name) for name in dict.fromkeys(shown)
    ][:-1]


def test_search_finds_a_number_a_class_and_a_name(tab: Page) -> None:
    search = tab.get_by_label("Search")
    search.fill("#42")
    assert listed(tab) == [42]
    expect(tab.locator("#count")).to_have_text("1 of 60 latents")
    search.fill("5")
    assert listed(tab)[0] == 5
    search.fill("Kind 5")
    assert sorted(listed(tab)) == (FIRST.columns["class"] == 5).nonzero()[:, 0].tolist()
    search.fill("thing 16")
    assert sorted(listed(tab)) == [16, 33, 50]
    search.fill("no such thing")
    assert listed(tab) == []
    expect(tab.get_by_text("No latent passes these filters.")).to_be_visible()


def test_filters_leave_what_passes_all_of_them(tab: Page) -> None:
    of = FIRST.columns
    tab.get_by_label("Least score above chance").fill("0.2")
    tab.get_by_label("Largest frequency in percent").fill("5")
    kept = (of["adjusted"] >= 0.2) & (of["frequency"] <= 0.05)
    assert 0 < int(kept.sum()) < 50
    assert sorted(listed(tab)) == kept.nonzero()[:, 0].tolist()
    tab.get_by_label("Least score above chance").fill("")
    tab.get_by_label("Largest frequency in percent").fill("")
    tab.get_by_label("significant only").check()
    expect(tab.locator("#count")).to_have_text(f"{int(of['significant'].sum())} of 60 latents")
    tab.get_by_role("combobox", name="Class", exact=True).select_option("5")
    kept = of["significant"] & (of["class"] == 5)
    assert sorted(listed(tab)) == kept.nonzero()[:, 0].tolist()


def test_a_row_shows_the_latents_top_images(tab: Page) -> None:
    tab.get_by_label("Search").fill("#11")
    links = tab.locator(".strip a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert links == [f"#image-{i}" for i in FIRST.bands["top"][0][11].tolist()]
    widths = tab.locator(".strip img").evaluate_all(
        "all => Promise.all(all.map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert set(widths) == {64}


def test_the_other_sae_can_be_chosen(tab: Page) -> None:
    tab.get_by_role("combobox", name="SAE", exact=True).select_option("1")
    expect(tab.locator("#count")).to_have_text("40 of 40 latents")
    assert listed(tab) == ranked(SECOND.columns["adjusted"], descending=True)


def test_a_latent_has_an_address_and_back_returns_to_the_list(tab: Page) -> None:
    tab.get_by_label("Search").fill("#41")
    tab.get_by_label("Search").press("Enter")
    expect(tab.locator("#view-latent h2")).to_contain_text("Latent 41")
    tab.go_back()
    tab.get_by_label("Search").fill("#42")
    tab.locator("#view-latents a.number").click()
    assert tab.evaluate("location.hash") == "#latent-42"
    expect(tab.locator("#view-latent h2")).to_contain_text("Latent 42")
    expect(tab.locator("#view-summary")).to_be_hidden()
    tab.go_back()
    expect(tab.locator("#view-latent")).to_be_hidden()
    expect(tab.locator("#view-latents a.number", has_text="42")).to_be_focused()
    tab.go_forward()
    expect(tab.locator("#view-latent h2")).to_contain_text("Latent 42")


def test_a_latents_view_shows_its_bands_numbers_and_neighbours(tab: Page) -> None:
    tab.evaluate("location.hash = '#sae-2-latent-5'")
    view = tab.locator("#view-latent")
    expect(view.locator("h2 small")).to_have_text(SECOND.name)
    score = float(SECOND.columns["score"][5])
    expect(view.locator(".numbers dd").first).to_contain_text(f"{score:.3f}")
    sizes = [band.locator("li").count() for band in view.locator("ol.band").all()]
    assert sizes == [8, 2, 8, 8]
    largest, values = SECOND.columns["largest"][5], SECOND.bands["bottom"][1][5]
    fills = view.locator("ol.band").nth(2).locator(".fill")
    shown = fills.evaluate_all("all => all.map(e => parseFloat(e.style.width))")
    assert torch.tensor(shown) == pytest.approx(100 * values / largest, abs=0.1)
    for place, expected in ((0, SECOND.together), (2, SECOND.nearest)):
        links = view.locator(".similar").nth(place).locator("a.number").all_inner_texts()
        assert [int(text) for text in links] == expected[0][5].tolist()
    assert SECOND.matches[0] is not None
    match = int(SECOND.matches[0][0][5])
    expect(view.locator(f".similar a.number[href='#latent-{match}']")).to_be_visible()
    assert SECOND.breakdown is not None
    counts = [f"({count:,})" for count in SECOND.breakdown[1][5].tolist()]
    for text, count in zip(view.locator(".bars li").all_inner_texts(), counts, strict=True):
        assert count in text
    total = int((SECOND.histogram[5] > 0).sum())
    assert view.locator("rect.bar-fill").count() >= total


def test_keys_step_through_latents_search_and_close(tab: Page) -> None:
    order = ranked(FIRST.columns["adjusted"], descending=True)
    tab.evaluate(f"location.hash = '#latent-{order[3]}'")
    expect(tab.locator("#view-latent .steps span")).to_have_text("4 of 60 in the list")
    for key, place in (("j", 4), ("ArrowRight", 5), ("k", 4), ("ArrowLeft", 3)):
        tab.keyboard.press(key)
        expect(tab.locator("#view-latent h2")).to_contain_text(f"Latent {order[place]}")
    tab.keyboard.press("/")
    expect(tab.locator("#view-latent")).to_be_hidden()
    expect(tab.get_by_label("Search")).to_be_focused()
    tab.keyboard.type("jk/")
    expect(tab.get_by_label("Search")).to_have_value("jk/")
    tab.keyboard.press("Escape")
    expect(tab.get_by_label("Search")).not_to_be_focused()
    tab.go_back()  # from the list to the latent that was left last, without the steps between
    expect(tab.locator("#view-latent h2")).to_contain_text(f"Latent {order[3]}")
    tab.keyboard.press("Escape")
    expect(tab.locator("#view-latent")).to_be_hidden()
    expect(tab.locator("#count")).to_be_visible()


def test_an_image_leads_to_the_latents_that_it_activates(tab: Page) -> None:
    tab.locator(".strip a").first.click()
    image = int(tab.evaluate("location.hash").removeprefix("#image-"))
    view = tab.locator("#view-image")
    expect(view.locator("h2")).to_have_text(PAGE.image_ids[image].replace("\x07", r"\x07"))
    expect(view.locator("img.large")).to_have_js_property("naturalWidth", 64)
    links = view.locator("a.number").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert links == [
        *(f"#latent-{i}" for i in FIRST.of_images[0][image].tolist()),
        *(f"#sae-2-latent-{i}" for i in SECOND.of_images[0][image].tolist()),
    ]
    negative = FIRST.of_images[1][image] < 0
    fills = view.locator(".bars.wide").first.locator(".fill")
    signs = fills.evaluate_all("all => all.map(e => e.classList.contains('negative'))")
    assert signs == negative.tolist()


def test_an_image_that_could_not_be_read_is_a_box_with_its_id(tab: Page) -> None:
    tab.evaluate("location.hash = '#image-7'")
    box = tab.locator("#view-image .missing.large")
    expect(box).to_have_text(PAGE.image_ids[7])
    expect(box).to_have_attribute("role", "img")


def test_texts_from_outside_are_never_markup(tab: Page) -> None:
    for i, text in enumerate(NASTY):
        tab.evaluate(f"location.hash = '#image-{i}'")
        expect(tab.locator("#view-image h2")).to_have_text(text.replace("\x07", r"\x07"))
    assert tab.locator("main b, main i, main script").count() == 0
    assert tab.evaluate("typeof boom") == "undefined"


def test_two_saes_side_by_side_in_three_ways(tab: Page) -> None:
    ranks = [ranked(sae.columns["adjusted"], descending=True) for sae in PAGE.saes]
    assert FIRST.matches[1] is not None
    wanted = {
        "rank": zip(*ranks, strict=False),
        "number": zip(range(40), range(40), strict=True),
        "match": zip(ranks[0], FIRST.matches[1][0][ranks[0]].tolist(), strict=True),
    }
    tab.get_by_role("link", name="Side by side").click()
    view = tab.locator("#view-side-by-side")
    for by, pairs in wanted.items():
        view.get_by_label("Pair by").select_option(by)
        every = [str(latent) for pair in pairs for latent in pair]
        expect(view.get_by_role("status")).to_have_text(f"{len(every) // 2} pairs")
        assert view.locator(".card a.number").all_inner_texts() == every[:40]
        assert view.locator(".correlation").count() == (20 if by == "match" else 0)
        view.get_by_role("button", name="Next").first.click()
        assert view.locator(".card a.number").all_inner_texts() == every[40:80]


def test_images_have_texts_and_a_tip_under_the_focus(tab: Page) -> None:
    tab.evaluate("location.hash = '#latent-11'")
    image = int(FIRST.bands["top"][0][11, 0])
    link = tab.locator("ol.band a").first
    alt = link.locator("img").get_attribute("alt")
    assert alt is not None
    assert alt.startswith(PAGE.image_ids[image])
    link.focus()
    expect(tab.locator("#tip")).to_contain_text("activation")
    expect(tab.locator("#tip")).to_contain_text(PAGE.image_ids[image])
    tab.keyboard.press("Enter")
    expect(tab.locator("#view-image h2")).to_have_text(PAGE.image_ids[image])


def test_a_narrow_dark_screen_gets_a_narrow_dark_page(browser: Browser, path: Path) -> None:
    with new_tab(browser, viewport={"width": 390, "height": 844}, color_scheme="dark") as tab:
        for address in ("#latents", "#sae-2-latent-11", "#image-1050", "#side-by-side"):
            open_page(tab, path, address)
            image = tab.locator("section:not([hidden]) img").first
            expect(image).to_be_visible()
            expect(image).to_have_js_property("naturalWidth", 64)  # although its pack came later
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert all(int(part) < 40 for part in re.findall(r"\d+", background))  # a dark page


def test_print_keeps_the_images_and_drops_the_controls(tab: Page) -> None:
    tab.emulate_media(media="print", color_scheme="dark")
    for control in (".bar", ".filters", ".pager"):
        expect(tab.locator(control).first).to_be_hidden()
    expect(tab.locator(".strip img").first).to_be_visible()
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    tab.emulate_media(media="screen", color_scheme="light")


def test_one_sae_without_classes_names_or_runs_is_enough(shared_tab: Page, tmp_path: Path) -> None:
    columns = {k: v for k, v in FIRST.columns.items() if not k.startswith(("purity", "class"))}
    alone = replace(FIRST, columns=columns, names=None, breakdown=None, matches=[None])
    page = replace(
        PAGE, saes=[alone], runs=[], classes=[], rows=[], image_labels=torch.full((1100,), -1)
    )
    tab = shared_tab
    open_page(tab, write_page(page, tmp_path / "one.html"))
    expect(tab.locator("#count")).to_have_text("60 of 60 latents")
    assert tab.get_by_role("link", name="Side by side").count() == 0
    tab.evaluate("location.hash = '#latent-11'")
    expect(tab.locator("ol.band").first).to_be_visible()
    tab.evaluate("location.hash = '#image-11'")
    expect(tab.locator("#view-image h2")).to_have_text(PAGE.image_ids[11])


def test_long_words_and_odd_names_fit_a_narrow_screen(browser: Browser, tmp_path: Path) -> None:
    long = "x" * 3000
    saes = [replace(FIRST, name=long), replace(SECOND, name="__proto__")]
    ids = [f"{long}/{i}" for i in range(len(PAGE.image_ids))]
    classes = ["constructor", "__proto__", "", long, *PAGE.classes[4:]]
    path = write_page(
        replace(PAGE, title=long, saes=saes, image_ids=ids, classes=classes), tmp_path / "odd.html"
    )
    with new_tab(browser, viewport={"width": 390, "height": 844}) as tab:
        open_page(tab, path)
        for address in ("#latents", "#latent-0", "#sae-2-latent-1", "#image-7", "#side-by-side"):
            tab.evaluate(f"location.hash = '{address}'")
            expect(tab.locator("section:not([hidden]) h2").first).to_be_visible()
            assert tab.evaluate("document.documentElement.scrollWidth") == 390, address


@pytest.mark.parametrize(
    "address",
    ["#latent-60", "#latent--1", "#image-1e9", "#sae-0-latent-0", "#sae-9-latent-1", "#%", '#"]'],
)
def test_an_address_that_means_nothing_shows_the_summary(tab: Page, address: str) -> None:
    tab.evaluate(f"location.hash = '{address}'")
    expect(tab.locator("#view-summary")).to_be_visible()
    for view in ("latent", "image", "side-by-side"):
        expect(tab.locator(f"#view-{view}")).to_be_hidden()

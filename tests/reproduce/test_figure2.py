"""The experiment of figure 2, at sizes that say little about speed."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from monoloss_plugin import load_features
from monoloss_plugin.figures import describe
from monoloss_plugin.reproduce import figure2
from monoloss_plugin.reproduce.experiment import Features, Setting, Table
from monoloss_plugin.reproduce.figure2 import ALGORITHM_1, ALGORITHM_2, FIGURE2, OURS, PRODUCTS

TINY = figure2.Sizes(
    latents=64, k=4, width=16, pool=2048, exponents=range(6, 10), patience=float("inf")
)


def digits(out: Path) -> Setting:
    train, held_out = load_features("digits", "train"), load_features("digits", "held_out")
    return Setting(out, {"pixels": Features(train, held_out)})


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """The objects of all libraries need not be looked through before every run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure2, "SMALL", TINY)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figure2, "SMALL", TINY)
        return FIGURE2.measure(digits(tmp_path_factory.mktemp("figure2")))


def test_every_way_is_timed_and_measured_on_real_latents(found) -> None:
    assert [point["samples"] for point in found["points"]] == [2**n for n in range(6, 10)]
    for point in found["points"]:
        assert set(point["seconds"]) == set(point["bytes"]) == set(figure2.WAYS)
        for seconds in point["seconds"].values():
            assert len(seconds["runs"]) == 5
            assert 0 < seconds["quartiles"][0] <= seconds["median"] <= seconds["quartiles"][1]
        assert min(point["bytes"].values()) > 0
    assert found["data"]["features"] == "pixels"
    assert found["data"]["width"] == 64
    assert 3 < found["data"]["active per sample"] <= 4
    assert found == json.loads(json.dumps(found))


def test_the_ways_agree_on_scores_that_differ_from_latent_to_latent(found) -> None:
    agreement = found["agreement"]
    assert agreement["samples"] == 512
    assert agreement["scores"]["standard deviation"] > 0.01
    assert max(agreement["largest difference"].values()) < 1e-5
    assert agreement["largest difference"][OURS] < 1e-6


def test_a_wrong_score_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = figure2.two_pass_monoscore
    monkeypatch.setattr(figure2, "SMALL", replace(TINY, exponents=range(6, 8)))
    monkeypatch.setattr(figure2, "two_pass_monoscore", lambda batches: right(batches) + 0.01)
    differences = FIGURE2.measure(digits(tmp_path))["agreement"]["largest difference"]
    assert differences[ALGORITHM_2] == pytest.approx(0.01, rel=1e-3)
    assert max(differences[way] for way in (ALGORITHM_1, PRODUCTS, OURS)) < 1e-5


def test_memory_of_the_linear_ways_does_not_grow_beyond_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure2, "BATCH", 256)
    monkeypatch.setattr(figure2, "SMALL", replace(TINY, exponents=range(8, 11)))
    points = FIGURE2.measure(digits(tmp_path))["points"]
    first, last = points[0]["bytes"], points[-1]["bytes"]
    for way in (ALGORITHM_2, OURS):
        assert last[way] < 1.1 * first[way]
    assert last[PRODUCTS] > 3 * first[PRODUCTS]
    assert ALGORITHM_1 in first
    assert ALGORITHM_1 not in last  # counting its steps would take too long


def test_a_second_call_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure2, "SMALL", replace(TINY, exponents=range(6, 8)))
    first = FIGURE2.measure(digits(tmp_path))

    def refuse(*given: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(figure2, "_make_pool", refuse)
    assert FIGURE2.measure(digits(tmp_path)) == first
    monkeypatch.setattr(figure2, "SMALL", replace(TINY, exponents=range(6, 8), k=5))
    with pytest.raises(AssertionError, match="again"):  # other latents are another run
        FIGURE2.measure(digits(tmp_path))


def test_without_features_they_are_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure2, "SMALL", replace(TINY, exponents=range(6, 8)))
    found = FIGURE2.measure(Setting(tmp_path))
    assert found["data"]["features"] == "synthetic"
    assert found["data"]["width"] == 16
    assert FIGURE2.needs == frozenset()


def costs(found: dict[str, Any], patience: float, **cost: Any) -> dict[str, Any]:
    """Return what was found as if the ways had taken other times."""
    points: list[dict[str, Any]] = []
    expected: dict[str, float] = dict.fromkeys(figure2.WAYS, 0.0)
    for exponent in range(8, 20):
        n = 2**exponent
        seconds = {
            way: {"median": (s := of(n)), "quartiles": [s, s], "runs": [s]}
            for way, of in zip(figure2.WAYS, cost.values(), strict=True)
            if way in expected
        }
        points.append({"samples": n, "seconds": seconds, "bytes": {}})
        expected = figure2._expected(points[-1], patience)
    slopes = {way: figure2._slope(points, way) for way in figure2.WAYS}
    return {**found, "points": points, "slopes": slopes, "reached": figure2._reached(points)}


@pytest.fixture
def slow(found) -> dict[str, Any]:
    """Pairwise ways of 4 and 0.25 s at N = 1,024, and linear ways of 1 and 2 ms."""
    return costs(
        found,
        60,
        algorithm_1=lambda n: 4 * (n / 1024) ** 2,
        products=lambda n: 0.25 * (n / 1024) ** 2,
        algorithm_2=lambda n: 1e-3 * n / 1024,
        ours=lambda n: 2e-3 * n / 1024,
    )


def table(tables: Sequence[Table], title: str) -> Table:
    (one,) = [one for one in tables if one.title.startswith(title)]
    return one


def test_pairwise_ways_stop_before_they_take_too_long(slow) -> None:
    measured = {way: figure2._of(slow["points"], way)[-1][0] for way in figure2.WAYS}
    assert measured == {ALGORITHM_1: 2048, PRODUCTS: 8192, ALGORITHM_2: 2**19, OURS: 2**19}
    assert slow["slopes"] == pytest.approx(
        {ALGORITHM_1: 2, PRODUCTS: 2, ALGORITHM_2: 1, OURS: 1}, rel=1e-6
    )


def test_pairwise_ways_stop_at_the_papers_largest_n(found) -> None:
    fast = costs(found, 60, **dict.fromkeys("abcd", lambda n: 1e-9 * n))
    assert figure2._of(fast["points"], ALGORITHM_1)[-1][0] == 65_536
    assert fast["reached"]["extrapolated from"] == {}
    assert "*" not in str(FIGURE2.tables(fast)[0])


def test_the_papers_numbers_stand_beside_ours_and_extrapolated_ones_are_marked(slow) -> None:
    beside = table(FIGURE2.tables(slow), "Time to compute")
    rows = {(row[0], row[1]): row[2:] for row in beside.rows}
    assert rows["the paper, on an H100", "65,536"] == ["1,516", "1.2", "1,234"]
    ours = rows["here, Algorithm 1 and MonoScore", "65,536"]
    assert ours == ["16,384 *", "0.128", "128,000 *"]
    assert rows["here, matrix products and MonoScore", "65,536"][0] == "1,024 *"
    assert "Extrapolated with N² from N = 2,048 (Algorithm 1" in beside.note
    assert slow["machine"]["device"] in beside.note
    every = table(FIGURE2.tables(slow), "Seconds and memory")
    by_n = {row[0]: row[1:] for row in every.rows}
    assert by_n["4,096"][0] == ""  # not measured: not even an extrapolated number
    assert by_n["2,048"][0].startswith("16 s")
    assert by_n["slope"] == ["2.00", "2.00", "1.00", "1.00"]


def test_the_figure_shows_every_way_and_the_paper(slow) -> None:
    ax = FIGURE2.draw(slow)
    said = describe(ax)
    for way in figure2.WAYS:
        assert way in said
    assert "extrapolated with N²: 16 at 2,048" in said
    assert "(65,536, 1,516) and (65,536, 1.2)" in said
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert "128,000 times" in [text.get_text() for text in ax.texts]


def test_samples_beyond_those_in_memory_repeat() -> None:
    pool = figure2.Pool(torch.arange(4096.0).unsqueeze(1), torch.zeros(4096, 1))
    rows = pool.rows(10_000).latents.squeeze(1)
    in_batches = torch.cat([latents for latents, _ in pool.batches(10_000)]).squeeze(1)
    assert torch.equal(rows, torch.arange(10_000.0) % 4096)
    assert torch.equal(in_batches, rows)

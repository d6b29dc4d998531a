"""Figure 2 of the MonoLoss paper: the time that MonoScore takes against the number of samples N.

Four ways compute the same scores, in turns, from the same latents in memory: the paper's two
algorithms, the pairwise definition as matrix products, and this package's ``MonoScore``, which
computes the chance level too. The latents are those of an untrained SAE: time does not depend on
what latents mean, but on how many of them are active.

Source: Nasiri-Sarvi et al. 2026, section 3.4.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows
from monoloss_plugin.metrics import MonoScore
from monoloss_plugin.reproduce.algorithms import (
    pairwise_by_products,
    pairwise_monoscore,
    two_pass_monoscore,
)
from monoloss_plugin.reproduce.experiment import Experiment, Found, Setting, Table
from monoloss_plugin.reproduce.machine import machine
from monoloss_plugin.reproduce.synthetic import clustered_features
from monoloss_plugin.reproduce.timing import alternate, peak_memory, summarise
from monoloss_plugin.saes import make_baseline
from monoloss_plugin.saes.rows import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALGORITHM_1 = "Algorithm 1, pairwise"
PRODUCTS = "pairwise, as matrix products"
ALGORITHM_2 = "Algorithm 2, two passes"
OURS = "MonoScore, one pass, with chance"
WAYS = (ALGORITHM_1, PRODUCTS, ALGORITHM_2, OURS)
PAIRWISE = (ALGORITHM_1, PRODUCTS)
"""Their time grows with N², so they stop before the others."""


class Published(NamedTuple):
    """What the paper reports for an N, measured on an H100."""

    samples: int
    pairwise: float
    """Seconds, as ``linear``."""
    linear: float
    times: int


PAPER = (Published(50_000, 18.8 * 60, 0.9, 1200), Published(65_536, 1516, 1.2, 1234))

BATCH = 2048
"""Samples in a batch of the linear ways."""
SLOW = 10.0
"""A run that takes more seconds has fewer rounds, no warm-up, and no measure of its memory."""
LAST = 4
"""A slope is that of the last points, where fixed costs count little."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    latents: int
    k: int
    """Active latents of a sample."""
    width: int
    """Of synthetic features; real ones have their own."""
    pool: int
    """Samples in memory, a multiple of ``BATCH``. A larger N takes them again and again."""
    exponents: Sequence[int]
    """N is 2 to the power of each, ascending."""
    patience: float
    """A pairwise way stops before an N for which it would take more seconds, and at the paper's
    largest N."""


SMALL = Sizes(latents=4096, k=32, width=768, pool=1 << 13, exponents=range(8, 17), patience=20)
FULL = Sizes(latents=8192, k=64, width=768, pool=1 << 16, exponents=range(8, 20), patience=1800)


class Pool(NamedTuple):
    """P samples in memory."""

    latents: Tensor
    """(P, M), dense."""
    embeddings: Tensor
    """(P, d)"""

    def rows(self, samples: int) -> Pool:
        """Return so many samples, repeated if there are more than P."""
        if samples <= len(self.latents):
            return Pool(self.latents[:samples], self.embeddings[:samples])
        numbers = torch.arange(samples, device=self.latents.device) % len(self.latents)
        return Pool(self.latents[numbers], self.embeddings[numbers])

    def batches(self, samples: int) -> list[tuple[Tensor, Tensor]]:
        """Return so many samples in batches, without a copy."""
        found = []
        for start in range(0, samples, BATCH):
            first = start % len(self.latents)
            rows = slice(first, first + min(BATCH, samples - start))
            found.append((self.latents[rows], self.embeddings[rows]))
        return found


def measure(setting: Setting) -> Found:
    """Measure every way at every N, and how well they agree."""
    sizes = FULL if setting.full else SMALL
    device, where = torch.device(setting.device), machine(setting.device)
    name, source = "synthetic", f"synthetic {sizes.width}"
    if setting.features:
        name, features = next(iter(setting.features.items()))
        source = f"{name} {features.train.fingerprint()}"
    kept = (
        "figure2",
        _named(where),
        f"{source}, {sizes.latents} latents, k {sizes.k}",
    )
    pool = cache(partial(_make_pool, setting, sizes, device))  # not made if all runs are there

    points: list[Found] = []
    expected = dict.fromkeys(WAYS, 0.0)
    for exponent in sizes.exponents:
        samples = 2**exponent
        measured = partial(_measure_at, pool, samples, expected, device)
        points.append(setting.run(*kept, f"N {samples}", compute=measured))
        expected = _expected(points[-1], sizes.patience)

    common = max(point["samples"] for point in points if ALGORITHM_1 in point["seconds"])
    agreed = partial(_agreement_at, pool, common, device)
    described = setting.run(*kept, "data", compute=lambda: _describe(setting, sizes, pool()))
    return {
        "machine": where,
        "data": {"features": name, **described},
        "batch": BATCH,
        "points": points,
        "slopes": {way: _slope(points, way) for way in WAYS},
        "reached": _reached(points),
        "agreement": setting.run(*kept, f"agreement at N {common}", compute=agreed),
    }


def _expected(point: Found, patience: float) -> dict[str, float]:
    """Return the seconds that each way will take for twice the N, without those that stop here."""
    expected = {}
    for way, seconds in point["seconds"].items():
        expected[way] = (4 if way in PAIRWISE else 2) * seconds["median"]
        too_large = 2 * point["samples"] > PAPER[-1].samples or expected[way] > patience
        if way in PAIRWISE and too_large:
            del expected[way]
    return expected


@torch.no_grad()
def _make_pool(setting: Setting, sizes: Sizes, device: torch.device) -> Pool:
    """Return samples in a random order, and their latents in an SAE of data points."""
    if setting.features:
        rows = Rows.of(next(iter(setting.features.values())).train, True, device)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        distinct = rows.take(order[: sizes.pool])
    else:
        distinct = clustered_features(sizes.pool, sizes.width).to(device)
    num_latents = min(sizes.latents, len(distinct))
    sae = make_baseline(
        "data points", distinct, num_latents=num_latents, l0=sizes.k, normalize=False
    )
    latents = torch.cat([as_rows(sae.encode(x), "latents") for x in distinct.split(BATCH)])
    repeated = torch.arange(sizes.pool, device=device) % len(distinct)
    return Pool(latents[repeated], distinct[repeated])


def _describe(setting: Setting, sizes: Sizes, pool: Pool) -> Found:
    distinct = sizes.pool
    if setting.features:
        distinct = min(distinct, len(next(iter(setting.features.values())).train))
    return {
        "distinct samples": distinct,
        "width": pool.embeddings.shape[1],
        "latents": pool.latents.shape[1],
        "active per sample": float((pool.latents > 0).sum()) / len(pool.latents),
    }


def _ways(pool: Pool, samples: int) -> dict[str, Callable[[], Tensor]]:
    batches = pool.batches(samples)

    def stream() -> Tensor:
        metric = MonoScore()
        for latents, embeddings in batches:
            metric.update(latents, embeddings)
        return metric.compute().scores

    return {
        ALGORITHM_1: lambda: pairwise_monoscore(*pool.rows(samples), block=_block(pool)),
        PRODUCTS: lambda: pairwise_by_products(*pool.rows(samples)),
        ALGORITHM_2: lambda: two_pass_monoscore(batches),
        OURS: stream,
    }


def _block(pool: Pool) -> int:
    """Return B_pair: small enough for a CPU's cache, large enough to keep a GPU busy."""
    return 256 if pool.latents.device.type == "cpu" else 8192


def _measure_at(
    pool: Callable[[], Pool], samples: int, expected: dict[str, float], device: torch.device
) -> Found:
    """Measure the ways for which there is an expected time, at one N."""
    ways = {way: run for way, run in _ways(pool(), samples).items() if way in expected}
    quick = {way: run for way, run in ways.items() if expected[way] <= SLOW}
    alternate(quick, 0, device)  # warms up
    seconds = alternate(ways, 5 if len(quick) == len(ways) else 3, device, warm_up=False)
    if samples > BATCH:
        # On a CPU, each of its N² steps would itself take memory, to be counted.
        quick.pop(ALGORITHM_1, None)
    return {
        "samples": samples,
        "seconds": {way: summarise(runs) for way, runs in seconds.items()},
        "bytes": {way: peak_memory(run, device) for way, run in quick.items()},
    }


@torch.no_grad()
def _agreement_at(pool: Callable[[], Pool], samples: int, device: torch.device) -> Found:
    """Return by how much the ways differ at most from the definition in float64."""
    latents, embeddings = pool().rows(samples)
    exact = pairwise_by_products(latents.double(), embeddings.double())
    differences = {
        way: float((run().double() - exact).abs().max())
        for way, run in _ways(pool(), samples).items()
    }
    scores = {"mean": float(exact.mean()), "standard deviation": float(exact.std())}
    return {"samples": samples, "scores": scores, "largest difference": differences}


def _of(points: Sequence[Found], way: str) -> list[tuple[int, float]]:
    """Return N and the median seconds of a way, where it was measured."""
    return [
        (point["samples"], point["seconds"][way]["median"])
        for point in points
        if way in point["seconds"]
    ]


def _slope(points: Sequence[Found], way: str) -> float:
    """Return the slope of log time against log N over a way's last points."""
    last = _of(points, way)[-LAST:]
    samples, seconds = ([math.log(value) for value in axis] for axis in zip(*last, strict=True))
    return statistics.linear_regression(samples, seconds).slope


def _reached(points: Sequence[Found]) -> Found:
    """Return the seconds of every way at the paper's largest N; N² extrapolates the pairwise."""
    samples = max(n for point in points if (n := point["samples"]) <= PAPER[-1].samples)
    seconds, extrapolated_from = {}, {}
    for way in WAYS:
        last, taken = max(one for one in _of(points, way) if one[0] <= samples)
        seconds[way] = taken * (samples / last) ** 2
        if last < samples:
            extrapolated_from[way] = last
    return {"samples": samples, "seconds": seconds, "extrapolated from": extrapolated_from}


def tables(found: Found) -> list[Table]:
    """Return the paper's numbers beside ours, the times at every N, and the agreement."""
    return [_beside_the_paper(found), _at_every_n(found), _agreement(found)]


def _beside_the_paper(found: Found) -> Table:
    rows = [
        [
            "the paper, on an H100",
            f"{one.samples:,}",
            _seconds(one.pairwise),
            _seconds(one.linear),
            f"{one.times:,}",
        ]
        for one in PAPER
    ]
    reached = found["reached"]
    seconds, origin = reached["seconds"], reached["extrapolated from"]
    for name, pairwise, linear in (
        ("here, the paper's two algorithms", ALGORITHM_1, ALGORITHM_2),
        ("here, Algorithm 1 and MonoScore", ALGORITHM_1, OURS),
        ("here, matrix products and MonoScore", PRODUCTS, OURS),
    ):
        mark = " *" if pairwise in origin else ""
        rows.append(
            [
                name,
                f"{reached['samples']:,}",
                _seconds(seconds[pairwise]) + mark,
                _seconds(seconds[linear]),
                f"{seconds[pairwise] / seconds[linear]:,.0f}{mark}",
            ]
        )
    data, where = found["data"], found["machine"]
    starts = " and ".join(f"N = {last:,} ({way})" for way, last in origin.items())
    note = (
        f"Here: {_named(where)}, torch {where['torch']}; "
        f"{data['latents']:,} latents, {data['active per sample']:.1f} of them active on a sample, "
        f"features of width {data['width']:,} ({data['features']}). The paper does not give the "
        "sizes of its figure."
    )
    if starts:
        note += f" * Extrapolated with N² from {starts}, not measured."
    return Table(
        "Time to compute MonoScore",
        ["", "N", "pairwise, s", "linear, s", "times faster"],
        rows,
        note,
    )


def _at_every_n(found: Found) -> Table:
    rows = [
        [f"{point['samples']:,}", *(_cell(point, way) for way in WAYS)] for point in found["points"]
    ]
    rows.append(["slope", *(f"{found['slopes'][way]:.2f}" for way in WAYS)])
    distinct = found["data"]["distinct samples"]
    note = (
        "Medians, with the quartiles of 5 rounds (3 where a way takes more than "
        f"{SLOW:.0f} s), in which the ways took turns. The slope is that of log time against log N "
        f"over a way's last {LAST} N. MiB: the most that torch held beyond the latents and "
        f"features, which lie in memory. An N above {distinct:,} repeats samples."
    )
    return Table("Seconds and memory against N", ["N", *WAYS], rows, note)


def _cell(point: Found, way: str) -> str:
    if way not in point["seconds"]:
        return ""
    seconds = point["seconds"][way]
    low, high = map(_seconds, seconds["quartiles"])
    said = f"{_seconds(seconds['median'])} s ({low} to {high})"
    return said + (f", {point['bytes'][way] / 2**20:,.0f} MiB" if way in point["bytes"] else "")


def _agreement(found: Found) -> Table:
    agreement = found["agreement"]
    rows = [[way, f"{agreement['largest difference'][way]:.1e}"] for way in WAYS]
    scores = agreement["scores"]
    note = (
        f"The scores have a mean of {scores['mean']:.3f} and a standard deviation of "
        f"{scores['standard deviation']:.3f} over the latents."
    )
    return Table(
        f"Largest difference of a score from the pairwise definition in float64, at "
        f"N = {agreement['samples']:,}",
        ["", "largest difference"],
        rows,
        note,
    )


def _named(where: Found) -> str:
    """Return the name of a machine: its GPU, or its CPU and how many threads torch had there."""
    if where["device"] != where["cpu"]:
        return str(where["device"])
    threads = where["threads"]
    return f"{where['device']}, {threads} thread{'' if threads == 1 else 's'}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(found: Found) -> Axes:
    """Draw time against N, log-log."""
    from monoloss_plugin.figures.dressing import MARKERS, TEXT, axes_for, dress, line_style

    ax = axes_for(None)
    reached = found["reached"]
    for i, way in enumerate(WAYS):
        points: list[Any] = _of(found["points"], way)
        ax.plot(*zip(*points, strict=True), label=way, marker=MARKERS[i], ms=4, **line_style(i))
        if way in reached["extrapolated from"]:
            ahead = [points[-1], (reached["samples"], reached["seconds"][way])]
            label = "extrapolated with N²" if way == ALGORITHM_1 else "_"
            style = line_style(i) | {"linestyle": ":"}
            ax.plot(*zip(*ahead, strict=True), label=label, linewidth=1, **style)
    last = PAPER[-1]
    ax.scatter(
        [last.samples] * 2,
        [last.pairwise, last.linear],
        marker="*",
        s=60,
        color=TEXT,
        label=f"the paper, on an H100\n({last.times:,} times)",
        zorder=3,
    )
    slow, fast = reached["seconds"][ALGORITHM_1], reached["seconds"][OURS]
    ax.annotate(
        f"{slow / fast:,.0f} times",
        xy=(reached["samples"], slow**0.35 * fast**0.65),  # below the extrapolated lines
        xytext=(-4, 0),
        textcoords="offset points",
        color=TEXT,
        ha="right",
        va="center",
    )
    ax.annotate(
        "",
        xy=(reached["samples"], fast),
        xytext=(reached["samples"], slow),
        arrowprops={"arrowstyle": "<->", "color": TEXT, "linewidth": 0.8},
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    return dress(ax, "samples N", "seconds", _named(found["machine"]))


FIGURE2 = Experiment(
    about="The time that MonoScore takes against the number of samples: pairwise and linear",
    needs=frozenset(),
    measure=measure,
    tables=tables,
    draw=draw,
)

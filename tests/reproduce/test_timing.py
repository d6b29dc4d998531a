"""Alternating runs, and what they held."""

from __future__ import annotations

import torch

from monoloss_plugin.reproduce.timing import alternate, peak_memory, summarise

CPU = torch.device("cpu")


def test_the_order_turns_about_from_round_to_round() -> None:
    order: list[str] = []
    ways = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = alternate(ways, 3, CPU)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"  # the first is the warm-up
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 3, "b": 3}


def test_a_warm_up_alone_measures_nothing() -> None:
    runs: list[int] = []
    assert alternate({"a": lambda: runs.append(1)}, 0, CPU) == {"a": []}
    assert len(runs) == 1


def test_a_summary_has_median_and_quartiles() -> None:
    found = summarise([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "quartiles": [1.0, 3.0], "runs": [3.0, 1.0, 2.0]}
    assert summarise([5.0])["quartiles"] == [5.0, 5.0]


def test_peak_memory_counts_what_lived_together(capfd) -> None:
    def run() -> None:
        for _ in range(3):  # one after another: two of them are never there at once
            torch.ones(1 << 18)

    assert peak_memory(run, CPU) == 1 << 20
    assert peak_memory(lambda: [torch.ones(1 << 18) for _ in range(3)], CPU) == 3 << 20
    assert "profiler" not in capfd.readouterr().err

"""Alternating runs in one process: what slows the machine down slows every way alike."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def alternate(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Time each way once a round, in an order that turns about, after a round to warm up.

    Returns:
        Seconds of each round, by way.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(0 if warm_up else 1, rounds + 1):
        gc.collect()
        order = list(ways.items())
        for name, run in order if number % 2 else reversed(order):
            taken = _seconds(run, device)
            if number > 0:
                seconds[name].append(taken)
    return seconds


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    result = run()
    _wait(device)
    taken = time.perf_counter() - started
    del result
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(values: list[float]) -> dict[str, Any]:
    """Return the median and the quartiles of some runs, and the runs."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "quartiles": [low, high], "runs": values}


def ratio(of: list[float], to: list[float]) -> dict[str, Any]:
    """Return the spread of the ratio of two ways, round by round."""
    return summarise([a / b for a, b in zip(of, to, strict=True)])


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most bytes that torch held during a run beyond what it held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    # Or the profiler prints when it starts and stops. Its log levels end at 5.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # Every allocation by torch on the CPU, in order: exact, where the process's resident memory
    # depends on what malloc has kept from before.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        run()
    results = trace.profiler.kineto_results if trace.profiler else None
    events = results.events() if results else []
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return max(accumulate(nbytes for _, nbytes in changes), default=0)

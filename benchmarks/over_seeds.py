"""Run an example at several weights and seeds, and print mean ± standard deviation.

python -m benchmarks.over_seeds finetune_timm --lam 0 0.1 1 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from monoloss_plugin.reproduce.machine import machine

EXAMPLES = Path(__file__).parents[1] / "examples"


def measured(example: str, *options: object) -> dict[str, float]:
    """Run an example, and return the numbers that it prints, one on a line behind its name.

    Raises:
        ValueError: it printed none.
    """
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    numbers = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        try:
            numbers[name] = float(value)
        except ValueError:  # what the host prints of its own
            continue
    if not numbers:
        raise ValueError(f"{example}: printed no number behind a name")
    return numbers


def spread(values: list[float], digits: int | None = None) -> str:
    """Mean ± standard deviation, by default to three digits; to none from 10 on."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if digits is None:
        digits = 0 if max(values) >= 10 else 3
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a command line, by default this program's, and the example's own."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.over_seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    examples = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if "--seed" in path.read_text()]
    parser.add_argument("example", choices=examples)
    parser.add_argument("--lam", nargs="+", default=["0", "0.1"], help="weights; 0 is without")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for every run, as JSON")
    return parser.parse_known_args(arguments)


def main() -> None:
    given, more = parse()
    runs: dict[str, list[dict[str, float]]] = {}
    for lam in given.lam:
        seeds = range(given.seeds)
        runs[lam] = [measured(given.example, "--lam", lam, "--seed", n, *more) for n in seeds]
    print(f"| {given.example} | " + " | ".join(f"lam {lam}" for lam in runs) + " |")
    print("|---" * (1 + len(runs)) + "|")
    for name in runs[given.lam[0]][0]:
        cells = [spread([run[name] for run in of_lam]) for of_lam in runs.values()]
        print(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    if given.out:
        report = {"example": given.example, "machine": machine("cpu"), "runs": runs}
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

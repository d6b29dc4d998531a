"""What MonoLoss adds to a training step of a host, on this machine.

python -m benchmarks.hosts sparsify [--rounds 10]

Steps with and without the loss alternate in one process. A host that needs an environment of its
own must be installed; see tests/hosts.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch

from monoloss_plugin.reproduce.machine import machine
from monoloss_plugin.reproduce.timing import alternate, ratio, summarise

RESULTS = Path(__file__).parents[1] / "results" / "hosts.json"
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hosts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("host", choices=NAMES)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

    make_step = importlib.import_module(f"benchmarks.hosts.{options.host}").make_step
    torch.manual_seed(0)
    steps = {"without": make_step(False), "with": make_step(True)}
    seconds = alternate(steps, options.rounds, torch.device("cpu"))
    more = ratio(seconds["with"], seconds["without"])
    found: dict[str, Any] = {
        "seconds": {name: summarise(runs) for name, runs in seconds.items()},
        "with over without": more,
        "rounds": options.rounds,
        "machine": machine("cpu"),
    }
    every = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    every[options.host] = found
    RESULTS.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")
    medians = {name: of["median"] for name, of in found["seconds"].items()}
    low, high = more["quartiles"]
    print(
        f"{options.host}: {medians['without']:.3f} s a step without, {medians['with']:.3f} s with: "
        f"{more['median']:.2f} times ({low:.2f} to {high:.2f})"
    )


if __name__ == "__main__":
    main()

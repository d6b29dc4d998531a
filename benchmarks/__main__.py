"""Run the benchmarks, and write what they found as JSON.

python -m benchmarks                 # the quick one
python -m benchmarks --full          # more rounds and samples
python -m benchmarks --features      # extracting and loading features
python -m benchmarks --cases finetuning --full
python -m benchmarks --cases step loss --device cuda
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.data import Shape
from benchmarks.feature_cases import extraction, extraction_memory, feeding, loading
from benchmarks.finetune_case import finetuning
from benchmarks.setting import Setting
from monoloss_plugin.reproduce.machine import machine

FEATURE_CASES = {case.__name__: case for case in (loading, feeding, extraction, extraction_memory)}
EVERY_CASE = CASES | FEATURE_CASES | {"finetuning": finetuning}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="more rounds and samples")
    parser.add_argument("--cases", nargs="+", choices=list(EVERY_CASE), default=list(CASES))
    parser.add_argument(
        "--features",
        action="store_const",
        dest="cases",
        const=list(FEATURE_CASES),
        help="the cases of extracting and loading features",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=Shape.batch)
    parser.add_argument("--width", type=int, default=Shape.width, help="of features")
    parser.add_argument("--latents", type=int, default=Shape.latents)
    parser.add_argument("--k", type=int, default=Shape.k, help="active latents a sample")
    parser.add_argument("--out", type=Path, default=Path("monoloss-bench"), help="folder")
    options = parser.parse_args()

    device = torch.device(options.device)
    shape = Shape(options.batch, options.width, options.latents, options.k)
    setting = Setting(device, options.full, shape)
    where = machine(options.device)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}; {shape}")
    found: dict[str, Any] = {}
    for name in options.cases:
        started = time.perf_counter()
        found[name] = EVERY_CASE[name](setting)
        target = f"\n  target: {found[name]['target']}" if "target" in found[name] else ""
        taken = time.perf_counter() - started
        print(f"{name} ({taken:.0f} s)\n  {found[name]['says']}{target}", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    report = {"date": date.today().isoformat(), "machine": where, "shape": vars(shape), **found}
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}/")


if __name__ == "__main__":
    main()

"""What MonoLoss adds to a SAELens training step: alternating steps in one process.

    python benchmarks/training_step.py --d-in 768 --d-sae 8192 --k 64 --batch 2048 --rounds 8

The baseline is SAELens's own BatchTopK step. Prints the median and the range of each, and their
ratio.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from itertools import repeat

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

import monoloss_plugin.adapters.sae_lens  # noqa: F401  # gives SAETrainer its add_loss
from monoloss_plugin import MonoLoss


def make_trainer(options: argparse.Namespace, batch: Tensor) -> SAETrainer:
    torch.manual_seed(0)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=options.d_in, d_sae=options.d_sae, k=options.k, device=options.device
        )
    )
    return SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=options.batch,
            lr_end=3e-4,
            device=options.device,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=repeat(batch),
    )


def seconds_of_a_step(trainer: SAETrainer, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    trainer.step(batch)
    if batch.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(options.batch, options.d_in, generator=generator)
    batch = torch.nn.functional.normalize(batch, dim=1).to(options.device)
    without, with_loss = make_trainer(options, batch), make_trainer(options, batch)
    with_loss.add_loss(MonoLoss(lam=3e-4))

    times: dict[str, list[float]] = {"without": [], "with MonoLoss": []}
    for round_number in range(options.rounds + 1):
        for name, trainer in zip(times, (without, with_loss), strict=True):
            seconds = seconds_of_a_step(trainer, batch)
            if round_number > 0:  # the first warms up
                times[name].append(seconds)

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, {options.device}, torch {torch.__version__}")
    print(
        f"BatchTopK step: batch {options.batch}, d_in {options.d_in}, d_sae {options.d_sae}, "
        f"k {options.k}; {options.rounds} rounds"
    )
    for name, values in times.items():
        print(
            f"{name:14} median {statistics.median(values):.3f} s "
            f"({min(values):.3f} to {max(values):.3f})"
        )
    ratio = statistics.median(times["with MonoLoss"]) / statistics.median(times["without"])
    print(f"ratio {ratio:.3f}")


if __name__ == "__main__":
    main()

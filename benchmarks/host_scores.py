"""Does MonoLoss do in each host what it does in SAELens? With controls, over seeds.

python -m benchmarks.host_scores sae_lens own_loop

A host that needs an environment of its own must be installed; see tests/hosts. Every host trains
the same TopK SAE on the same features of digits: 256 latents, k = 8, so that every L0 is 8. Scores
are of held-out images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin import MonoLoss, attach, load_features
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches
from monoloss_plugin.reproduce.machine import machine

RESULTS = Path(__file__).parent / "results" / "host-scores.json"
WIDTH, LATENTS, K, BATCH, RATE = 64, 256, 8, 256, 3e-3
SEEDS = (0, 1, 2)
LOSS = MonoLoss(lam=0.2, lam_units="nmse")


def shuffled(x: Tensor) -> Tensor:
    """Return the embeddings of other samples."""
    return x[torch.randperm(len(x))]


Way = dict[str, Any] | None
"""Options of ``add_loss``; None trains without."""
WAYS: dict[str, Way] = {"without": None, "MonoLoss": {}, "shuffled": {"embeddings": shuffled}}


def in_sae_lens(batches: Iterator[Tensor], steps: int, way: Way) -> Any:
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    from monoloss_plugin.adapters.sae_lens import add_loss

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K))
    config = SAETrainerConfig(
        total_training_samples=BATCH * steps,
        train_batch_size_samples=BATCH,
        lr=RATE,
        lr_end=RATE,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches)
    if way is not None:
        add_loss(trainer, LOSS, **way)
    trainer.fit()
    return sae


def in_overcomplete(batches: Iterator[Tensor], steps: int, way: Way) -> Any:
    from overcomplete.sae import TopKSAE, train_sae

    from monoloss_plugin.adapters.overcomplete import add_loss

    def mse(x: Tensor, x_hat: Tensor, *more: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    sae = TopKSAE(WIDTH, LATENTS, top_k=K)
    criterion = mse if way is None else add_loss(mse, LOSS, **way)
    optimizer = torch.optim.Adam(sae.parameters(), lr=RATE)
    given = list(itertools.islice(batches, steps))
    train_sae(sae, given, criterion, optimizer, nb_epochs=1, monitoring=0)
    return sae


def in_dictionary_learning(batches: Iterator[Tensor], steps: int, way: Way) -> Any:
    from dictionary_learning.trainers import TopKTrainer

    from monoloss_plugin.adapters.dictionary_learning import add_loss

    sizes = {"activation_dim": WIDTH, "dict_size": LATENTS, "k": K, "steps": steps}
    names = {"layer": 0, "lm_name": "digits", "device": "cpu"}
    trainer = TopKTrainer(**sizes, **names, lr=RATE, warmup_steps=0)
    if way is not None:
        add_loss(trainer, LOSS, **way)
    for step, x in zip(range(steps), batches, strict=False):
        trainer.update(step, x)
    return trainer.ae


def in_own_loop(batches: Iterator[Tensor], steps: int, way: Way) -> Any:
    class SAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(WIDTH, LATENTS), nn.Linear(LATENTS, WIDTH)

        def encode(self, x: Tensor) -> Tensor:
            z = self.encoder(x).relu()
            kept = z.topk(K, dim=-1)
            return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)

        def decode(self, latents: Tensor) -> Tensor:
            x_hat: Tensor = self.decoder(latents)
            return x_hat

    sae = SAE()
    term: Callable[[], Tensor | float] = lambda: 0.0  # noqa: E731
    if way is not None:
        places: dict[str, Any] = {"method": "encode", "latents": lambda call: call.output}
        term = attach(sae, LOSS, **places, reduction="mean", gradient_at="active", **way)
    optimizer = torch.optim.Adam(sae.parameters(), lr=RATE)
    for _, x in zip(range(steps), batches, strict=False):
        loss = (sae.decode(sae.encode(x)) - x).square().mean() + term()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sae


def in_sparsify(batches: Iterator[Tensor], steps: int, way: Way) -> Any:
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels are for GPUs
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import PretrainedConfig, PreTrainedModel

    from monoloss_plugin.adapters.sparsify import add_loss

    class Table(PreTrainedModel):
        """A model whose layer gives the features of images, as its trainer reads activations."""

        def __init__(self, features: Tensor) -> None:
            super().__init__(PretrainedConfig())
            self.layer = nn.Embedding.from_pretrained(features)

        def forward(self, input_ids: Tensor) -> Tensor:
            found: Tensor = self.layer(input_ids)
            return found

    features = torch.cat(list(itertools.islice(batches, steps)))
    rows = Dataset.from_dict({"input_ids": torch.arange(len(features)).view(-1, 1).tolist()})
    sae = SparseCoderConfig(num_latents=LATENTS, k=K)
    schedule: dict[str, Any] = {"optimizer": "adam", "lr": RATE, "lr_warmup_steps": 0}
    with TemporaryDirectory() as folder:
        places = {"hookpoints": ["layer"], "log_to_wandb": False, "save_dir": folder}
        cfg = TrainConfig(
            sae, batch_size=BATCH, init_seeds=[torch.initial_seed()], **schedule, **places
        )
        trainer = Trainer(cfg, rows.with_format("torch"), Table(features))
        if way is not None:
            add_loss(trainer, LOSS, **way)
        trainer.fit()
    return trainer.saes["layer"]


HOSTS = {
    "sae_lens": in_sae_lens,
    "overcomplete": in_overcomplete,
    "dictionary_learning": in_dictionary_learning,
    "sparsify": in_sparsify,
    "own_loop": in_own_loop,
}


def scores(host: str, steps: int, way: Way) -> list[dict[str, float]]:
    """Return what was measured of each seed's SAE on held-out images."""
    train, held_out = (load_features("digits", split) for split in ("train", "held_out"))
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        batches = FeatureBatches(train, batch_size=BATCH, seed=seed)
        of = evaluate(HOSTS[host](batches.tensors(), steps, way), held_out, normalize=True)
        found.append(
            {"r2": of.r2, "adjusted": of.monoscore.mean_adjusted, "l0": of.l0, "dead": of.num_dead}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_scores", description=__doc__)
    parser.add_argument("hosts", nargs="+", choices=list(HOSTS))
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    every = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for host in options.hosts:
        runs = {name: scores(host, options.steps, way) for name, way in WAYS.items()}
        every[host] = {"runs": runs, "steps": options.steps, "machine": machine("cpu")}
        RESULTS.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")
        for name, of in runs.items():
            cells = (
                f"{key} {statistics.mean(one[key] for one in of):.3f} ± "
                f"{statistics.stdev(one[key] for one in of):.3f}"
                for key in of[0]
            )
            print(f"{host}, {name}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()

"""An adapter for a trainer that has none: MonoLoss in somebody else's training loop.

python examples/custom_host.py [--lam 3e-3] [--steps 300]

`Host` stands for a library you use and cannot change. `add_loss` is all that an adapter needs.
"""

import argparse

import torch
from torch import nn

from monoloss_plugin import LossTerm, MonoLoss, load_features
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches
from monoloss_plugin.finetuning import LatentRecorder
from monoloss_plugin.losses import LossHandle, StepTensors, lam_factor


class Host(nn.Module):
    """An SAE trainer; its loss is summed over the input's width and averaged over samples."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(width, latents), nn.ReLU())
        self.decode = nn.Linear(latents, width)

    def loss(self, x):
        latents = self.encode(x)
        error = (self.decode(latents) - x).square().sum(1).mean()
        return error + 3e-3 * latents.sum(1).mean()

    def fit(self, batches, steps):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        for _, x in zip(range(steps), batches, strict=False):
            optimizer.zero_grad()
            self.loss(x).backward()
            optimizer.step()


def add_loss(host: Host, term: LossTerm) -> LossHandle:
    """Add a term to the loss of this one host; everything else of it stays."""
    if "loss" in host.__dict__:
        raise ValueError(f"{term.name}: a term is attached already; remove it first")
    recorder, inner, factor = LatentRecorder(host, "encode"), host.loss, None

    def loss_with_term(x):
        nonlocal factor
        base = inner(x)
        if factor is None:  # <- what the paper's weight is against this host's loss
            scale = float(x.square().sum(1).mean())  # read once: it makes a GPU wait
            factor = lam_factor(
                term.lam_units,
                width=x.shape[1],
                mean_square_norm=scale,
                reduction="sum",
                degree=term.degree,
            )
        # A ReLU's latents pass no gradient where they are zero: "active" says so, and is faster.
        step = StepTensors(recorder.take(), embeddings=x, gradient_at="active")
        return base + factor * term.lam * term.compute_loss(step).value

    def undo():
        host.__dict__.pop("loss", None)
        recorder.remove()

    host.__dict__["loss"] = loss_with_term  # past nn.Module: it must not enter the state dict
    return LossHandle(term.name, undo)


options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--lam", type=float, default=3e-3)
options.add_argument("--steps", type=int, default=300)
given = options.parse_args()

torch.manual_seed(0)
batches = FeatureBatches(load_features("digits", "train"), batch_size=256, seed=0)
host = Host(width=64, latents=256)
handle = add_loss(host, MonoLoss(lam=given.lam))  # <- the one line of a user
host.fit(batches.tensors(), given.steps)
handle.remove()

held_out = load_features("digits", "held_out")
for name, value in evaluate(host, held_out).summary().items():
    print(f"{name:20} {value:.3f}")

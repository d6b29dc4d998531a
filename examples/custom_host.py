"""An adapter for a trainer that has none: MonoLoss in somebody else's training loop.

python examples/custom_host.py [--lam 3e-3] [--steps 300]

`Host` stands for a library you use and cannot change. `HostAttachment` is a whole adapter for it.
"""

import argparse
import logging

import torch
from torch import nn

from monoloss_plugin import LossTerm, MonoLoss, load_features
from monoloss_plugin.attaching import AttachedTerm, Attachment, LamConversion
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches
from monoloss_plugin.finetuning import LatentRecorder
from monoloss_plugin.losses import LossHandle, StepTensors


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


class HostAttachment(Attachment[AttachedTerm]):
    """The terms of one host, and the method that ours replaces on it."""

    replaces = ("loss",)

    def __init__(self, host):
        super().__init__(host)
        self.conversion = LamConversion("This host", "sum", logging.getLogger(__name__))

    def loss(self, inner, x):
        with LatentRecorder(self.target, "encode") as recorder:
            value = inner(x)
        # A ReLU's latents pass no gradient where they are zero: "active" says so, and is faster.
        step = StepTensors(recorder.take(), embeddings=x, gradient_at="active")
        for attached in self.terms.values():
            # The paper's weight against this host's loss. The log shows it once.
            factor = self.conversion.factor(attached, x, record={})
            value = value + factor * attached.term.lam * attached.term.compute_loss(step).value
        return value


def add_loss(host, term: LossTerm) -> LossHandle:
    """Add a term to the loss of this one host; everything else of it stays."""
    return HostAttachment.of(host).add(AttachedTerm(term))


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

"""MonoLoss in a trainer that has no adapter and that you cannot change, with one call of `attach`.

python examples/custom_host.py [--lam 3e-3] [--steps 300]

`Host` stands for a library's trainer.
"""

import argparse

import torch
from torch import nn

from monoloss_plugin import MonoLoss, attach, load_features
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches


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


options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--lam", type=float, default=3e-3)
options.add_argument("--steps", type=int, default=300)
given = options.parse_args()

torch.manual_seed(0)
batches = FeatureBatches(load_features("digits", "train"), batch_size=256, seed=0)
host = Host(width=64, latents=256)

attached = attach(  # <- ours
    host,
    MonoLoss(lam=given.lam),
    method="loss",  # what the trainer calls
    latents="encode",  # the layer whose output they are
    gradient_at="active",  # a ReLU's zeros pass no gradient; faster
    reduction="sum",  # of the squared error, over the width
    add=lambda loss, term: loss + term,
)
host.fit(batches.tensors(), given.steps)
attached.remove()

held_out = load_features("digits", "held_out")
for name, value in evaluate(host, held_out).summary().items():
    print(f"{name:20} {value:.3f}")

"""MonoLoss in a training loop of your own, on features of real images.

python examples/hosts/with_own_loop.py
"""

import torch
from torch import nn

from monoloss_plugin import MonoLoss, attach, load_features
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches


class SAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 256), nn.ReLU())
        self.decode = nn.Linear(256, 64)


batches = FeatureBatches(load_features("digits", "train"), batch_size=256, seed=0)
for lam in (0.0, 3e-3):
    torch.manual_seed(0)
    sae = SAE()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    loss = MonoLoss(lam=lam)
    monoloss = attach(sae.encode, loss, latents="1", reduction="mean", gradient_at="active")  # ours
    for _, x in zip(range(250), batches.tensors(), strict=False):
        latents = sae.encode(x)
        error = (sae.decode(latents) - x).square().mean() + 1e-3 * latents.mean()
        optimizer.zero_grad()
        (error + monoloss()).backward()  # ours
        optimizer.step()
    found = evaluate(sae, load_features("digits", "held_out"))
    print(f"lam {lam}: MonoScore {found.monoscore.mean_defined:.3f}, R² {found.r2:.3f}")

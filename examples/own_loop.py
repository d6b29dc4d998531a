"""MonoLoss in a training loop of your own, without any host library."""

import torch
from sklearn.datasets import load_digits

from monoloss_plugin import MonoLoss, MonoScore

pixels = torch.tensor(load_digits().data, dtype=torch.float32)
features = torch.nn.functional.normalize(pixels - pixels.mean(0), dim=1)

torch.manual_seed(0)
encoder = torch.nn.Linear(64, 256)
decoder = torch.nn.Linear(256, 64)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
monoloss = MonoLoss(lam=3e-3)  # called by hand, lam is applied as it is

for _ in range(300):
    x = features[torch.randint(len(features), (512,))]
    latents = encoder(x).relu()
    reconstruction_error = (decoder(latents) - x).square().mean()
    # A ReLU passes no gradient to latents that are zero: leaving it out is faster, and the same.
    interpretability = monoloss(latents, x, gradient_at="active")
    loss = reconstruction_error + 1e-4 * latents.sum(1).mean() + interpretability
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

metric = MonoScore()
with torch.no_grad():
    for x in features.split(512):
        metric.update(encoder(x).relu(), x)
result = metric.compute()
print(f"MonoScore {result.mean:.3f}, {result.num_defined} of 256 latents defined")

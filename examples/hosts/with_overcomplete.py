"""MonoLoss in overcomplete's train_sae, on features of real images.

python examples/hosts/with_overcomplete.py
"""

import torch
from overcomplete.sae import BatchTopKSAE, train_sae

from monoloss_plugin import MonoLoss, load_features
from monoloss_plugin.adapters.overcomplete import add_loss
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches

held_out = load_features("digits", "held_out")
batches = FeatureBatches(load_features("digits", "train"), batch_size=256, seed=0)


def mse(x, x_hat, pre_codes, codes, dictionary):
    return (x - x_hat).square().mean()


for lam in (0.0, 3e-3):
    torch.manual_seed(0)
    sae = BatchTopKSAE(64, 256, top_k=8 * 256)
    criterion = add_loss(mse, MonoLoss(lam=lam))  # our line
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    train_sae(sae, batches, criterion, optimizer, nb_epochs=40, monitoring=0)
    found = evaluate(sae, held_out)
    print(f"lam {lam}: MonoScore {found.monoscore.mean_defined:.3f}, R² {found.r2:.3f}")

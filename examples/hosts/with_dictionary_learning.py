"""MonoLoss in dictionary_learning's trainSAE, on features of real images.

python examples/hosts/with_dictionary_learning.py
"""

from dictionary_learning.trainers import BatchTopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

from monoloss_plugin import MonoLoss, load_features
from monoloss_plugin.adapters.dictionary_learning import add_loss
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches

held_out = load_features("digits", "held_out")
batches = FeatureBatches(load_features("digits", "train"), batch_size=256, seed=0)
sizes = {"activation_dim": 64, "dict_size": 256, "k": 8}
short = {"steps": 1000, "warmup_steps": 100, "threshold_start_step": 100, "lr": 1e-3}
names = {"layer": 0, "lm_name": "digits", "device": "cpu", "seed": 0}

for lam in (0.0, 3e-3):
    config = {"trainer": BatchTopKTrainer, **sizes, **short, **names}
    config = add_loss(config, MonoLoss(lam=lam))  # our line
    trainSAE(batches.tensors(), [config], steps=1000, save_dir="runs", device="cpu")
    sae, _ = load_dictionary("runs/trainer_0", device="cpu")
    found = evaluate(sae, held_out)
    print(f"lam {lam}: MonoScore {found.monoscore.mean_defined:.3f}, R² {found.r2:.3f}")

"""dictionary_learning's own training of an SAE on image features, with one line of ours.

python examples/hosts/dictionary_learning_train.py

Features: handwritten digits as a small vision transformer sees them, which come with the package.
"""

from dictionary_learning.trainers import BatchTopKTrainer
from dictionary_learning.training import trainSAE

from monoloss_plugin import MonoLoss, load_features
from monoloss_plugin.adapters.dictionary_learning import add_loss
from monoloss_plugin.convert import from_dictionary_learning
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches

config = {
    "trainer": BatchTopKTrainer,
    "steps": 1000,
    "activation_dim": 64,
    "dict_size": 256,
    "k": 8,
    "lr": 1e-3,
    "threshold_start_step": 100,  # in so short a run
    "warmup_steps": 100,
    **{"layer": 0, "lm_name": "digits", "device": "cpu"},
}
config = add_loss(config, MonoLoss(lam=3e-3), warm_up_steps=100)  # <- the one line

batches = FeatureBatches(load_features("digits", "train"), batch_size=256, seed=0)
trainSAE(batches.tensors(), [config], steps=1000, save_dir="runs", device="cpu")

sae = from_dictionary_learning("runs/trainer_0")
for name, value in evaluate(sae, load_features("digits", "held_out")).summary().items():
    print(f"{name:20} {value:.3f}")

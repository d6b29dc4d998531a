"""sparsify's own trainer on activations of a language model, with one line of ours.

python examples/hosts/sparsify.py [STEPS]

The text is Python's own documentation, letter by letter. The model's weights are random, so that
nothing has to be downloaded: put your model in its place.
"""

import os
import sys
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import GPTNeoXConfig, GPTNeoXModel

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # only where there is no GPU
from sparsify import SparseCoderConfig, TrainConfig, Trainer

import monoloss_plugin.adapters.sparsify  # noqa: F401  # <- ours: gives Trainer its add_loss
from monoloss_plugin import MonoLoss
from monoloss_plugin.convert import from_sparsify
from monoloss_plugin.evaluation import evaluate

torch.manual_seed(0)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
model = GPTNeoXModel(GPTNeoXConfig(**shape, num_hidden_layers=2, vocab_size=128)).eval()
letters = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
texts = Dataset.from_dict({"input_ids": letters.unfold(0, 64, 64).tolist()}).with_format("torch")
coder = SparseCoderConfig(num_latents=256, k=8)
cfg = TrainConfig(coder, batch_size=16, hookpoints=["layers.0"], log_to_wandb=False)
trainer = Trainer(cfg, texts.select(range(16 * steps)), model)

trainer.add_loss(MonoLoss(lam=3e-3), warm_up_steps=50)  # <- the one line
trainer.fit()

sae = from_sparsify(trainer.saes["layers.0"])  # an SAE of SAELens, to score and to publish
with torch.no_grad():
    hidden = model(texts[-64:]["input_ids"], output_hidden_states=True).hidden_states[1]
for name, value in evaluate(sae, hidden.flatten(0, 1)).summary().items():
    print(f"{name:20} {value:.3f}")

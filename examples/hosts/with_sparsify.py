"""MonoLoss in EleutherAI sparsify's Trainer, on activations of a language model.

SPARSIFY_DISABLE_TRITON=1 python examples/hosts/with_sparsify.py

(Without the variable if you have a GPU.) The text is Python's own documentation, letter by letter.
The model's weights are random, so that nothing is downloaded: put your model in its place.
"""

from pydoc_data.topics import topics

import torch
from datasets import Dataset
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from transformers import GPTNeoXConfig, GPTNeoXModel

import monoloss_plugin.adapters.sparsify  # noqa: F401  # our line: gives Trainer its add_loss
from monoloss_plugin import MonoLoss
from monoloss_plugin.evaluation import evaluate

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
model = GPTNeoXModel(GPTNeoXConfig(**shape, num_hidden_layers=2, vocab_size=128)).eval()
letters = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
texts = Dataset.from_dict({"input_ids": letters.unfold(0, 64, 64).tolist()}).with_format("torch")
train, held_out = texts.select(range(16 * 200)), texts[-64:]["input_ids"]
with torch.no_grad():
    activations = model(held_out, output_hidden_states=True).hidden_states[1].flatten(0, 1)

for lam in (0.0, 3e-3):
    sae = SparseCoderConfig(num_latents=256, k=8)
    cfg = TrainConfig(sae, batch_size=16, hookpoints=["layers.0"], log_to_wandb=False)
    trainer = Trainer(cfg, train, model)
    trainer.add_loss(MonoLoss(lam=lam), warm_up_steps=50)  # our line
    trainer.fit()
    found = evaluate(trainer.saes["layers.0"], activations)
    print(f"lam {lam}: MonoScore {found.monoscore.mean_defined:.3f}, R² {found.r2:.3f}")

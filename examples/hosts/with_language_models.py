"""SAELens's own runner on a small language model, with one line of ours, and a score of its tokens.

python examples/hosts/with_language_models.py [STEPS]

The model learns the language reference of Python, which comes with Python, letter by letter.
"""

import sys
from pydoc_data.topics import topics

import sae_lens
import torch
from datasets import Dataset
from transformer_lens import HookedTransformerConfig
from transformer_lens.train import HookedTransformerTrainConfig, train

import monoloss_plugin.adapters.sae_lens  # noqa: F401  # <- gives SAELens's runners their add_loss
from monoloss_plugin import MonoLoss
from monoloss_plugin.evaluation import evaluate

STEPS, HOOK = int((sys.argv[1:] or [300])[0]), "blocks.0.hook_resid_post"
letters = torch.tensor(list(" ".join(topics.values()).encode())).unfold(0, 63, 63)
rows = torch.nn.functional.pad(letters, (1, 0))  # a special token, 0, begins each row
data = Dataset.from_dict({"tokens": rows[:6000].tolist()}).with_format("torch")
size = {"n_layers": 2, "d_model": 64, "n_ctx": 64, "d_head": 16, "d_vocab": 256}
model = sae_lens.HookedSAETransformer(HookedTransformerConfig(**size, act_fn="gelu", device="cpu"))
train(model, HookedTransformerTrainConfig(3, 32, lr=3e-3, device="cpu", max_steps=STEPS), data)
sae = sae_lens.BatchTopKTrainingSAEConfig(d_in=64, d_sae=512, k=8)
tokens = {"context_size": 64, "exclude_special_tokens": [0], "training_tokens": 4096 * STEPS}
rest = {"hook_name": HOOK, "lr": 3e-3, "logger": sae_lens.LoggingConfig(log_to_wandb=False)}
cfg = sae_lens.LanguageModelSAERunnerConfig(sae, n_batches_in_buffer=256, **tokens, **rest)
runner = sae_lens.LanguageModelSAETrainingRunner(cfg, data, model)
runner.add_loss(MonoLoss(lam=0.8, lam_units="nmse"), warm_up_steps=STEPS // 10)  # <- the one line
runner.run()
held_out = model.run_with_cache(rows[6000:])[1][HOOK][:, 1:].detach()  # without special tokens
result = evaluate(sae_lens.SAE.load_from_disk("output"), held_out)
print(f"R² {result.r2:.3f}, MonoScore above chance {result.monoscore.mean_adjusted:.3f}")

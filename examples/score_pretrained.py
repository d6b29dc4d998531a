"""Load a published SAE and its features, score it, and list its clearest latents.

python examples/score_pretrained.py [REPO_ID [SAE_ID]] [--features REPO_ID] [--split held_out]

Without arguments: the SAE and features of handwritten digits that are bundled.
"""

import argparse

from monoloss_plugin import list_pretrained, load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("repo_id", nargs="?", default="digits", help="of SAEs on the Hub")
options.add_argument("sae_id", nargs="?", help="which of them, where there are several")
options.add_argument("--features", default="digits", help="repository of features on the Hub")
options.add_argument("--split", default="held_out")
given = options.parse_args()

for one in list_pretrained(given.repo_id):
    print(f"{one.sae_id}: {one.architecture}, {one.d_sae} latents, lam {one.record.lam}")

loaded = load_pretrained(given.repo_id, given.sae_id)  # <- the SAE, and what is known of it
features = load_features(given.features, given.split)
result = evaluate(loaded.sae, features)  # scaled as the SAE was trained

print(f"\n{loaded.sae_id}: published and measured here")
for name, value in result.summary().items():
    print(f"{name:20} {loaded.record.metrics.get(name, float('nan')):8.3f} {value:8.3f}")

print("\nlatents of the highest MonoScore, and how often they are active")
scores = result.monoscore.scores.masked_fill(~result.monoscore.defined, -1)
for latent in scores.argsort(descending=True)[:5].tolist():
    print(f"{latent:5} {scores[latent]:.3f} {result.frequency[latent]:.1%}")

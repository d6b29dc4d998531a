"""Load a published dictionary and its features, score it, and list its clearest latents.

python examples/pretrained.py [REPO_ID SAE_ID FEATURES_REPO_ID SPLIT]    # on the Hub

Without arguments: the dictionary and features of handwritten digits that are bundled.
"""

import sys

from monoloss_plugin import list_pretrained, load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches

given = sys.argv[1:] or ["digits", None, "digits", "held_out"]
repo_id, sae_id, features_id, split = given
for one in list_pretrained(repo_id):
    print(f"{one.sae_id}: {one.architecture}, {one.d_sae} latents, lam {one.record.lam}")

loaded = load_pretrained(repo_id, sae_id)  # <- the SAE, and what is known of it
features = load_features(features_id, split)
unit_norm = loaded.record.inputs == "unit norm"
batches = FeatureBatches(features, shuffle="none", drop_last=False, normalize=unit_norm)
result = evaluate(loaded.sae, batches)

print(f"\n{loaded.sae_id}: published and measured here")
for name, value in result.summary().items():
    print(f"{name:20} {loaded.record.metrics.get(name, float('nan')):8.3f} {value:8.3f}")

print("\nlatents of the highest MonoScore, and how often they are active")
scores = result.monoscore.scores.masked_fill(~result.monoscore.defined, -1)
for latent in scores.argsort(descending=True)[:5].tolist():
    print(f"{latent:5} {scores[latent]:.3f} {result.frequency[latent]:.1%}")

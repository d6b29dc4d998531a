"""Publish an SAE and its features to the Hub, with their measurements, and load them back.

python examples/publish.py USER/NAME [--upload]    # without --upload: only say what would be sent

Here the bundled SAE of handwritten digits; log in with `hf auth login` to upload.
"""

import argparse

from monoloss_plugin import (
    load_features,
    load_pretrained,
    publish_features,
    publish_sae,
)
from monoloss_plugin.evaluation import evaluate

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("repo_id", help="USER/NAME of the SAEs; features go to USER/NAME-data")
options.add_argument("--upload", action="store_true")
given = options.parse_args()

held_out = load_features("digits", "held_out")
sae = load_pretrained("digits").sae
without = load_pretrained("digits", "batchtopk-256").sae
evaluation, baseline = evaluate(sae, held_out), evaluate(without, held_out)
print(f"MonoScore {evaluation.monoscore.mean:.3f}, without {baseline.monoscore.mean:.3f}")

published = [
    publish_sae(
        sae,  # or the folder that save_inference_model wrote
        given.repo_id,
        evaluation=evaluation,
        baseline=baseline,
        features=held_out,  # <- the card names their encoder and images
        license="mit",
        dry_run=not given.upload,
    ),
    publish_features(
        held_out,
        f"{given.repo_id}-data",
        split="held_out",
        license="cc-by-4.0",
        dry_run=not given.upload,
    ),
]
for done in published:
    print(f"\n{done.url}: {done.commit or 'dry run'}, {done.size / 1e6:.2f} MB to send")
    for file in done.files:
        print(f"  {file.change:8}{file.size:10}  {file.path}")

if given.upload:
    again = load_pretrained(given.repo_id, published[0].name)
    print(f"\nloaded back: {again.sae_id}, MonoScore {again.record.metrics['monoscore']:.3f}")

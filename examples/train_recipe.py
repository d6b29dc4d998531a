"""SAELens's plain training beside the recommended recipe, on features of real images.

python examples/train_recipe.py [--epochs 375] [--out FOLDER]

The recipe starts the latents as training samples, adds MonoLoss, and refits the decoder.
"""

import argparse
from pathlib import Path

from monoloss_plugin import load_features
from monoloss_plugin.training import get_recipe, train

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--epochs", type=float, help="by default as many as suit the features")
options.add_argument("--seed", type=int, default=0)
options.add_argument("--out", type=Path, default=Path("recipes"), help="folder of the SAEs")
given = options.parse_args()

features, held_out = load_features("digits", "train"), load_features("digits", "held_out")
for name in ("plain", "recommended"):
    recipe = get_recipe(name, features, epochs=given.epochs, seed=given.seed)
    trained = train(features, recipe, out=given.out / name, held_out=held_out)
    print(f"\n{name}: SAE.load_from_disk({str(trained.folder)!r})")
    print(trained.comparison.to_frame()[["r2", "monoscore_adjusted", "purity_adjusted"]])

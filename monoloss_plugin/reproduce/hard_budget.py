"""Beyond the Hard Budget: two regularizers of TopK SAEs, over several k.

The paper claims more MonoScore at the same reconstruction, and for the L1/L2 ratio also fewer
effective latents, more robustness to the k of inference, and better probes of few latents. A
review of it asked for an ablation: penalize all units instead of the batch-active ones. It is here,
and so is MonoLoss.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from monoloss_plugin.comparison import compare
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.figures.dressing import axes_for, dress, line_style
from monoloss_plugin.probing import latents_of, small_budget_probe
from monoloss_plugin.reproduce.experiment import (
    Experiment,
    Features,
    Found,
    Setting,
    Table,
    mean_of,
    spread,
)
from monoloss_plugin.reproduce.saes import (
    BOTH,
    MONOLOSS,
    PLAIN,
    REGULARIZERS,
    k_of,
    ks_of,
    recipes,
    trained,
)
from monoloss_plugin.saes.rows import Rows
from monoloss_plugin.training import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = (PLAIN, *REGULARIZERS, MONOLOSS, BOTH)
_OVER_K = (PLAIN, "OffSupportL1", "L1L2Ratio")
"""What is trained with every k. The others, ablations and MonoLoss, have the middle k alone."""
_R2 = {0.25: "r2/0.25", 0.5: "r2/0.5", 1.0: "r2", 2.0: "r2/2", 4.0: "r2/4"}
"""The measures of R² by the k of inference, as a share of the k of training."""
_BUDGETS = (1, 4, 16)
_PROBED = 10_000
"""Training rows of a probe, so that it takes seconds."""
_COLUMNS = {
    "r2": "R²",
    "monoscore": "MonoScore, undefined 0",
    "monoscore_adjusted": "MonoScore above chance",
    "monoscore_per_firing": "MonoScore per firing",
    "purity_adjusted": "purity above chance",
    "effective_latents": "effective latents",
    "dead_latents": "dead",
}
_DIGITS = {"dead_latents": 0, "effective_latents": 1}


def measure(setting: Setting) -> Found:
    """Train and measure TopK SAEs of the first encoder."""
    encoder = next(iter(setting.features))
    features = setting.features[encoder]
    runs: dict[str, dict[str, list[Any]]] = {}
    for k in ks_of(setting, features):
        made = recipes(setting, features, "topk", k)
        runs[str(k)] = {
            name: [
                setting.run(
                    *("hard-budget", encoder, f"k {k}", name, f"seed {seed}"),
                    compute=partial(_measures, setting, encoder, name, made[name], seed),
                )
                for seed in setting.seeds
            ]
            for name in (_NAMES if k == k_of(setting, features) else _OVER_K)
        }
    return {"encoder": encoder, "runs": runs}


def _measures(
    setting: Setting, encoder: str, name: str, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """Return the measures of an SAE on held-out features, by name."""
    sae, features = trained(setting, encoder, name, recipe, seed), setting.features[encoder]
    found = compare({"sae": sae}, features.held_out, groups=("budgets",)).to_dict()
    return {**found["runs"]["sae"][0], **_probes(sae, features)}


def _probes(sae: Any, features: Features) -> dict[str, float]:
    """Return the held-out accuracy of probes that read few latents; nothing without labels."""
    images = torch.randperm(features.train.num_images, generator=torch.Generator().manual_seed(0))
    train, held_out = features.train.select(images[:_PROBED].sort().values), features.held_out
    if train.labels is None or held_out.labels is None:
        return {}

    def latents(of: FeatureSet) -> Any:
        return latents_of(sae, Rows.for_sae(sae, of, None).batches())

    found = small_budget_probe(
        latents(train), train.labels, latents(held_out), held_out.labels, budgets=_BUDGETS
    )
    return {f"probe/{n}": accuracy for n, accuracy in found.items()}


def tables(found: Found) -> list[Table]:
    """Return, for each k, the measures; and R² at other k than that of training."""
    made = []
    for k, by_name in found["runs"].items():
        first = next(iter(by_name.values()))[0]
        probes = {m: f"probe, {m.partition('/')[2]} latents" for m in first if "probe/" in m}
        columns = _COLUMNS | probes
        rows = [
            [name, *(spread((run.get(m) for run in runs), _DIGITS.get(m, 3)) for m in columns)]
            for name, runs in by_name.items()
        ]
        made.append(Table(f"{found['encoder']}, TopK, k = {k}", ("added", *columns.values()), rows))
    for k, by_name in found["runs"].items():
        header = ("added", *(f"k = {max(1, round(share * int(k)))}" for share in _R2))
        rows = [
            [name, *(spread(run.get(m) for run in runs) for m in _R2.values())]
            for name, runs in by_name.items()
        ]
        made.append(Table(f"R² at another k than in training, which had k = {k}", header, rows))
    return made


def draw(found: Found) -> Axes:
    """Draw R² against the k of inference, relative to that of training, at the middle k."""
    ks = list(found["runs"])
    k = ks[len(ks) // 2]
    ax = axes_for(None)
    for i, (name, runs) in enumerate(found["runs"][k].items()):
        means = [mean_of(run.get(m) for run in runs) for m in _R2.values()]
        ax.plot(list(_R2), means, label=name, **line_style(i))
    ax.set_xscale("log", base=2)
    title = f"{found['encoder']}, TopK SAEs trained with k = {k}"
    return dress(ax, "k of inference / k of training", "R², held-out images", title)


HARD_BUDGET = Experiment(
    about="two Top-k regularizers over k, all or batch-active units, and MonoLoss",
    needs=frozenset({"features"}),
    measure=measure,
    tables=tables,
    draw=draw,
)

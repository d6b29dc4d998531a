"""Figure 4 and table 1 of the MonoLoss paper: SAEs without and with MonoLoss.

The paper shows R², MonoScore and class purity of each SAE as it is. Here every SAE is also measured
with the same number of active latents, beside SAEs that have learnt nothing, in the eyes of another
encoder, and above chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from monoloss_plugin.comparison import compare
from monoloss_plugin.figures.dressing import COLOURS, MARKERS, axes_for, dress
from monoloss_plugin.reproduce.experiment import Experiment, Found, Setting, Table, spread
from monoloss_plugin.reproduce.saes import (
    ARCHITECTURES,
    MONOLOSS,
    PLAIN,
    RECOMMENDED,
    SHUFFLED,
    k_of,
    near_l0,
    recipes,
    spaces_of,
    trained,
)
from monoloss_plugin.saes.baselines import QUICK, make_baseline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WITH_FIXED_L0 = ("topk", "batchtopk")
_BASELINES = "baselines"
_COLUMNS = {
    "r2": "R²",
    "monoscore": "all latents",
    "monoscore_adjusted": "above chance",
    "monoscore_per_firing": "per firing",
    "l0": "L0",
    "dead_latents": "dead",
}
_PURITY = {
    "purity_binary": "purity, binary",
    "purity_weighted": "purity, weighted",
    "purity_adjusted": "purity above chance",
}
_STAYS = "An SAE with too few positive pre-activations for this L0 stays as it is."
_OF_MONOSCORE = (
    "MonoScore: over all latents, undefined ones counting 0, as in the paper; above chance, over "
    "defined ones; per firing; and above chance where images are compared by another encoder or by "
    "their labels."
)
_DIGITS = {"dead_latents": 0, "l0": 1}

_PAPERS_PURITY = {
    "CLIP ViT-L/14": {
        "batchtopk": ((0.144, 0.217), (0.462, 0.539)),
        "topk": ((0.159, 0.240), (0.251, 0.339)),
        "jumprelu": ((0.208, 0.278), (0.446, 0.532)),
        "standard": ((0.002, 0.009), (0.007, 0.024)),
    },
    "SigLIP2": {
        "batchtopk": ((0.233, 0.305), (0.326, 0.404)),
        "topk": ((0.340, 0.400), (0.416, 0.473)),
        "jumprelu": ((0.249, 0.321), (0.337, 0.409)),
        "standard": ((0.037, 0.069), (0.077, 0.141)),
    },
    "ViT-L/16": {
        "batchtopk": ((0.152, 0.331), (0.723, 0.795)),
        "topk": ((0.128, 0.319), (0.431, 0.586)),
        "jumprelu": ((0.287, 0.445), (0.609, 0.767)),
        "standard": ((0.002, 0.011), (0.004, 0.020)),
    },
}
"""Table 1 of Nasiri-Sarvi et al. 2026: (binary, weighted) without and with MonoLoss."""
_PAPERS_SCORES = (
    ("CLIP ViT-L/14, Open Images", "batchtopk", 0.361, 0.514),
    ("ViT-L/16, ImageNet-1K", "batchtopk", 0.245, 0.646),
)
"""The MonoScores that the text of its section 4.1 states; figure 4 has no others in numbers."""


def measure(setting: Setting) -> Found:
    """Train and measure every SAE of every encoder."""
    return {
        "k": {name: k_of(setting, of) for name, of in setting.features.items()},
        "encoders": {encoder: _of_encoder(setting, encoder) for encoder in setting.features},
    }


def _of_encoder(setting: Setting, encoder: str) -> dict[str, Any]:
    """Return the measures of one encoder's SAEs by architecture, and those of baselines."""
    features = setting.features[encoder]
    k, key = k_of(setting, features), ("figure4", encoder, spaces_of(setting, encoder))
    found: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        made = recipes(setting, features, architecture)
        runs: dict[str, dict[str, list[Any]]] = {"as they are": {}, "at k": {}}
        for name in _names(setting, encoder, architecture):
            for seed in setting.seeds:
                sae = partial(trained, setting, encoder, name, made[name], seed)
                own = setting.run(
                    *(*key, architecture, name, f"seed {seed}, as it is"),
                    compute=partial(_measures, setting, encoder, sae),
                )
                at_k = own  # TopK has k active latents of each sample anyway
                if architecture != "topk":
                    at_k = setting.run(
                        *(*key, architecture, name, f"seed {seed}, at k {k}"),
                        compute=partial(_measures, setting, encoder, sae, k),
                    )
                runs["as they are"].setdefault(name, []).append(own)
                runs["at k"].setdefault(name, []).append(at_k)
        found[architecture] = runs
    size: Any = recipes(setting, features, "topk")[PLAIN].num_latents
    make = partial(make_baseline, features=features.train, num_latents=size, l0=k)
    found[_BASELINES] = {
        "at k": {
            kind: [
                setting.run(
                    *(*key, kind, f"seed {seed}, k {k}"),
                    compute=partial(_measures, setting, encoder, partial(make, kind, seed=seed)),
                )
                for seed in setting.seeds
            ]
            for kind in QUICK
        }
    }
    return found


def _names(setting: Setting, encoder: str, architecture: str) -> list[str]:
    """Return the recipes that are trained: the control for one encoder is enough."""
    names = [PLAIN, MONOLOSS]
    if architecture in _WITH_FIXED_L0:
        names.append(RECOMMENDED)
    if architecture == "batchtopk" and encoder == next(iter(setting.features)):
        names.append(SHUFFLED)
    return names


def _measures(
    setting: Setting, encoder: str, make: Callable[[], Any], l0: float | None = None
) -> dict[str, Any]:
    """Return the measures of an SAE on held-out images, by default at its own L0."""
    features = setting.features[encoder]
    spaces = {name: of.held_out for name, of in setting.features.items() if name != encoder}
    sae = make() if l0 is None else near_l0(make(), features, l0)
    found = compare({"sae": sae}, features.held_out, spaces=spaces, groups=("spaces",))
    run: dict[str, Any] = found.to_dict()["runs"]["sae"][0]
    return run


def _rows(of_encoder: dict[str, Any], how: str) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield the architecture, the name and the runs of each SAE."""
    for architecture, found in of_encoder.items():
        for name, runs in found.get(how, {}).items():
            yield architecture, name, runs


def _table(title: str, of_encoder: dict[str, Any], how: str, columns: dict[str, str]) -> Table:
    rows = [
        [
            architecture if architecture != _BASELINES else "",
            name,
            *(spread((run.get(m) for run in runs), _DIGITS.get(m, 3)) for m in columns),
        ]
        for architecture, name, runs in _rows(of_encoder, how)
    ]
    notes = [_STAYS] if how == "at k" else []
    notes += [_OF_MONOSCORE] if "r2" in columns else []
    return Table(title, ("", "SAE", *columns.values()), rows, " ".join(notes))


def _columns_of(of_encoder: dict[str, Any], how: str) -> dict[str, str]:
    """Return the measures of a table with the spaces that MonoScore was taken in."""
    runs = next(iter(next(iter(of_encoder.values()))[how].values()))
    others = [measure for measure in runs[0] if measure.startswith("adjusted/")]
    return _COLUMNS | {one: f"by {one.partition('/')[2]}" for one in others}


def tables(found: Found) -> list[Table]:
    """Return R² and MonoScore at one L0 and as they are, and the paper's."""
    made = [
        Table(
            "MonoScore in the MonoLoss paper, undefined latents counting 0",
            ("encoder and data", "architecture", "without", "with MonoLoss"),
            [[*row[:2], f"{row[2]:.3f}", f"{row[3]:.3f}"] for row in _PAPERS_SCORES],
            "The paper's figure 4 gives no other numbers.",
        )
    ]
    for encoder, of in found["encoders"].items():
        title = f"{encoder}, every SAE with an L0 of {found['k'][encoder]}"
        columns = _columns_of(of, "at k")
        made.append(_table(title, of, "at k", columns))
        own = {a: f for a, f in of.items() if a != _BASELINES}
        made.append(_table(f"{encoder}, every SAE as it is", own, "as they are", columns))
    return made


def purity_tables(found: Found) -> list[Table]:
    """Return class purity at one L0 and as they are, and the paper's."""
    cells = [
        [encoder, architecture, *(f"{value:.3f}" for pair in pairs for value in pair)]
        for encoder, by_architecture in _PAPERS_PURITY.items()
        for architecture, pairs in by_architecture.items()
    ]
    header = ("encoder", "architecture", "binary, without", "weighted, without")
    made = [
        Table(
            "Class purity in the MonoLoss paper (table 1), ImageNet-1K",
            (*header, "binary, with MonoLoss", "weighted, with MonoLoss"),
            cells,
        )
    ]
    for encoder, of in found["encoders"].items():
        title = f"Class purity, {encoder}, every SAE with an L0 of {found['k'][encoder]}"
        made.append(_table(title, of, "at k", _PURITY))
        own = {a: f for a, f in of.items() if a != _BASELINES}
        made.append(_table(f"Class purity, {encoder}, as they are", own, "as they are", _PURITY))
    return made


def draw(found: Found) -> Axes:
    """Draw R² against MonoScore above chance of the first encoder's SAEs, at one L0."""
    encoder, of = next(iter(found["encoders"].items()))
    names = list(dict.fromkeys(name for _, name, _ in _rows(of, "at k")))
    architectures = list(of)
    ax = axes_for(None)
    for architecture, name, runs in _rows(of, "at k"):
        colour = COLOURS[names.index(name) % len(COLOURS)]
        ax.scatter(
            [run["r2"] for run in runs],
            [run["monoscore_adjusted"] for run in runs],
            s=40,
            label=name if architecture == _BASELINES else f"{architecture}, {name}",
            marker=MARKERS[architectures.index(architecture)],
            facecolors="none" if architecture == _BASELINES else colour,
            edgecolors=colour,
        )
    title = f"{encoder}, held-out images, L0 {found['k'][encoder]}"
    return dress(ax, "R²", "MonoScore above chance", title, "hollow: baselines")


FIGURE4 = Experiment(
    about="R² and MonoScore of four architectures without and with MonoLoss",
    needs=frozenset({"features"}),
    measure=measure,
    tables=tables,
    draw=draw,
)
TABLE1 = Experiment(
    about="class purity of the same SAEs",
    needs=frozenset({"features", "labels"}),
    measure=measure,
    tables=purity_tables,
)

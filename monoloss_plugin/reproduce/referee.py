"""What a referee would ask of MonoLoss: does the gain stand beside its controls?

The SAEs of figure 4, at one L0 and at one R², in the space they were trained in and in another,
beside MonoLoss on shuffled embeddings and beside SAEs that have learnt nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from monoloss_plugin.comparison import Group, compare
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.figures.dressing import COLOURS, MARKERS, axes_for, dress, line_style
from monoloss_plugin.probing import latents_of
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
    MONOLOSS,
    PLAIN,
    RECOMMENDED,
    SHUFFLED,
    UNREWARDED,
    at_l0,
    k_of,
    recipes,
    spaces_of,
    trained,
)
from monoloss_plugin.saes.baselines import QUICK, make_baseline
from monoloss_plugin.saes.rows import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = (PLAIN, MONOLOSS, SHUFFLED, RECOMMENDED, UNREWARDED)
_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""L0 to measure at, as shares of k: enough to find where an SAE has a given R²."""
_MEASURES = ("r2", "monoscore_adjusted", "monoscore_per_firing", "purity_adjusted", "dead_latents")
_AT_R2 = {
    "l0": "needs an L0 of",
    "monoscore_adjusted": "above chance",
    "monoscore_per_firing": "per firing",
    "purity_adjusted": "purity above chance",
}
_FREQUENT = 8
"""Latents that are active on fewer samples correlate by chance."""
_ALIKE = 0.5


def measure(setting: Setting) -> Found:
    """Train and measure BatchTopK SAEs of the first encoder, and baselines, at several L0."""
    encoder = next(iter(setting.features))
    features = setting.features[encoder]
    k = k_of(setting, features)
    spaces = {name: of.held_out for name, of in setting.features.items() if name != encoder}
    made = recipes(setting, features, "batchtopk")

    def at(name: str, seed: int, l0: float) -> Any:
        """Return an SAE or a baseline with an L0."""
        if name in made:
            return at_l0(trained(setting, encoder, name, made[name], seed), features, l0)
        size: Any = made[PLAIN].num_latents
        return make_baseline(
            name, features.train, num_latents=size, l0=l0, selection="threshold", seed=seed
        )

    runs = {
        name: [
            setting.run(
                *("referee", encoder, spaces_of(setting, encoder), f"k {k}", name, f"seed {seed}"),
                compute=partial(_measures, partial(at, name, seed), features, spaces, k),
            )
            for seed in setting.seeds
        ]
        for name in (*_NAMES, *QUICK)
    }
    return {"encoder": encoder, "others": list(spaces), "k": k, "runs": runs}


def _measures(
    at: Callable[[float], Any], features: Features, spaces: Mapping[str, FeatureSet], k: int
) -> dict[str, Any]:
    """Return the measures of an SAE at several L0, and at k also those that take longer."""
    curve: list[dict[str, float]] = []
    found: dict[str, Any] = {"curve": curve, "spaces": {}, "alike": None}
    for share in _SHARES:
        try:
            sae = at(share * k)
        except ValueError:  # few directions cannot have a high L0
            continue
        groups: list[Group] = ["spaces"] if share == 1 else []
        compared = compare({"sae": sae}, features.held_out, spaces=spaces, groups=groups)
        (run,) = compared.to_dict()["runs"]["sae"]
        curve.append({"share": share, **{m: run[m] for m in ("l0", *_MEASURES) if m in run}})
        if share == 1:
            found["spaces"] = {name: run[f"adjusted/{name}"] for name in spaces}
            found["alike"] = _share_alike(sae, features)
    return found


@torch.no_grad()
def _share_alike(sae: Any, features: Features) -> float | None:
    """Return the share of latents whose activations correlate above 0.5 with another latent's.

    Of those that are active on more than 8 held-out samples; None if there is at most one.
    """
    batches = Rows.for_sae(sae, features.held_out, None).batches()
    latents = torch.from_numpy(latents_of(sae, batches).toarray())
    frequent = latents[:, (latents > 0).sum(0) > _FREQUENT]
    if frequent.shape[1] < 2:
        return None
    correlations = torch.corrcoef(frequent.T).fill_diagonal_(0)
    return float((correlations.amax(1) > _ALIKE).double().mean())


def at_r2(curve: Sequence[Mapping[str, Any]], r2: float, measure: str) -> float | None:
    """Return a measure of an SAE where it has an R², between the L0 that were measured.

    Args:
        curve: measures at several L0, the lowest L0 first.
        r2: the R² to find; the first place counts where the curve crosses it.
        measure: the name of the measure.

    Returns:
        The value, linear between two neighbours; None if the SAE has this R² nowhere on the curve.
    """
    for one, other in pairwise(curve):
        low, high = one["r2"], other["r2"]
        if min(low, high) <= r2 <= max(low, high):
            if one[measure] is None or other[measure] is None:
                return None
            share = (r2 - low) / (high - low) if high != low else 0.0
            return float(one[measure] + share * (other[measure] - one[measure]))
    return None


def _at(run: Mapping[str, Any], share: float) -> Mapping[str, float]:
    """Return the measures of a run at an L0, as a share of k; empty if it cannot have that L0."""
    return next((one for one in run["curve"] if one["share"] == share), {})


def tables(found: Found) -> list[Table]:
    """Return the measures at one L0 and at one R²."""
    others = found["others"]
    rows = []
    for name, runs in found["runs"].items():
        at_k = [_at(run, 1.0) for run in runs]
        rows.append(
            [
                name,
                *(spread(one.get(m) for one in at_k) for m in _MEASURES[:-1]),
                spread((one.get("dead_latents") for one in at_k), 0),
                *(spread(run["spaces"].get(other) for run in runs) for other in others),
                spread(run["alike"] for run in runs),
            ]
        )
    header = (
        *("SAE", "R²", "above chance", "per firing", "purity above chance", "dead"),
        *(f"by {other}" for other in others),
        "alike",
    )
    made = [
        Table(
            f"{found['encoder']}, BatchTopK, every SAE with an L0 of {found['k']}",
            header,
            rows,
            "alike: the share of latents that correlate above 0.5 with another latent, of those "
            f"that are active on more than {_FREQUENT} held-out images. A row is empty if an SAE "
            "cannot have this L0.",
        )
    ]
    target = mean_of(_at(run, 1.0).get("r2") for run in found["runs"][PLAIN])
    columns = {m: title for m, title in _AT_R2.items() if m in found["runs"][PLAIN][0]["curve"][0]}
    rows = [
        [
            name,
            *(
                spread((at_r2(run["curve"], target, m) for run in runs), 1 if m == "l0" else 3)
                or "never"
                for m in columns
            ),
        ]
        for name, runs in found["runs"].items()
    ]
    made.append(
        Table(
            f"The same at one R², {target:.3f}, that of the plain SAEs with an L0 of {found['k']}",
            ("SAE", *columns.values()),
            rows,
            f"Linear between measured L0, of {_SHARES[0] * found['k']:g} to "
            f"{_SHARES[-1] * found['k']:g}, each twice the one before. never: at least one seed "
            "has this R² at none of them. Thresholds change, decoders do not: baselines have one "
            "fitted at each L0, recommended SAEs one refitted at their own, the others the one of "
            "training.",
        )
    )
    return made


def draw(found: Found) -> Axes:
    """Draw MonoScore above chance against R², over L0: a line for each SAE, the mean of seeds."""
    ax = axes_for(None)
    for i, (name, runs) in enumerate(found["runs"].items()):
        shares = [one["share"] for one in runs[0]["curve"]]
        points = [
            [mean_of(_at(run, share).get(m) for run in runs) for share in shares]
            for m in ("r2", "monoscore_adjusted")
        ]
        style = line_style(i)
        hollow = "none" if name in QUICK else COLOURS[i % len(COLOURS)]
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(*points, label=name, marker=marker, markerfacecolor=hollow, **style)
    title = f"{found['encoder']}, BatchTopK, L0 from a quarter to four times {found['k']}"
    return dress(ax, "R², held-out images", "MonoScore above chance", title, "hollow: baselines")


REFEREE = Experiment(
    about="MonoLoss beside its controls, at one L0 and at one R², and in another space",
    needs=frozenset({"features"}),
    measure=measure,
    tables=tables,
    draw=draw,
)

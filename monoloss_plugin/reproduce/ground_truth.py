"""Do the losses help an SAE to find the true features, where these are known?

SAELens makes synthetic models with known features, trains SAEs on their activations, and measures
how much of the true dictionary an SAE has found. This experiment adds the losses, and asks whether
MonoScore goes with what was found.

A lam is in the units "nmse". Samples are compared by the SAE's input, as in the MonoLoss paper.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin import L1L2Ratio, MonoLoss, OffSupportL1, init_from_data
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.adapters.sae_lens import add_loss
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.losses import LossTerm
from monoloss_plugin.reproduce.experiment import Experiment, Found, Setting, Table, spread
from monoloss_plugin.reproduce.saes import ShuffledMonoLoss
from monoloss_plugin.saes.baselines import make_baseline
from monoloss_plugin.training.trainer import as_others_load_it

# After the modules above, whose import errors name the extra to install.
from sae_lens import SAE, TrainingSAE  # isort: skip
from sae_lens.config import LoggingConfig  # isort: skip
from sae_lens.registry import get_sae_training_class  # isort: skip
from sae_lens.synthetic import (  # isort: skip
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
    init_sae_to_match_feature_dict,
)

try:
    from scipy.stats import spearmanr
except ModuleNotFoundError as error:
    raise missing_extra(error, "referee") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Sizes:
    """How large the synthetic models and the runs are."""

    num_features: int
    """True features of a model, and latents of an SAE."""
    width: int
    """d, the width of the activations; below ``num_features``, so that features overlap."""
    rarest: float
    """How often the rarest feature is active; the most frequent one is on 0.35 of all samples."""
    batch_size: int
    steps: int
    learning_rate: float
    held_out: int = 20_000
    """Samples to measure on, and to start latents and make baselines from."""

    def __str__(self) -> str:
        return f"{self.num_features} features, width {self.width}, {self.steps} steps"


SMALL = Sizes(128, 64, 0.01, batch_size=256, steps=1000, learning_rate=3e-3)
FULL = Sizes(2048, 512, 0.001, batch_size=1024, steps=10_000, learning_rate=1e-3, held_out=100_000)


@dataclass(frozen=True)
class Training:
    """What a run adds to SAELens's own training."""

    term: LossTerm | None = None
    from_data: bool = False
    """Start the latents as samples."""


class Source(NamedTuple):
    """A synthetic model, and what SAEs of it share."""

    model: SyntheticModel
    samples: Tensor
    """(N, d), to start latents from."""
    k: int
    """The mean number of active features of a sample, rounded."""
    seed: int


MODELS = ("independent", "correlated", "hierarchical")
"""How features are active: independently; with correlations of low rank; or in groups of a parent
and three children, which are active only where it is, and in half of the groups one at a time."""
ARCHITECTURES = ("batchtopk", "topk")
LAMS = (0.03, 0.1, 0.3, 1.0)
FROM_DATA_LAMS = (1.0,)
SHUFFLED_LAMS = (1.0,)
REGULARIZER_LAMS = (0.001, 0.01)
BASELINE = "no training"
"""In place of an architecture: SAEs that are not trained. All are TopK SAEs."""
PLAIN, FROM_DATA = "plain", "from data"

Run = dict[str, Any]
"""What :func:`measure_recovery` returns."""
Runs = dict[str, dict[str, list[Run]]]
"""The runs of a model: by architecture or :data:`BASELINE`, then by recipe, one for each seed."""

_LABELS = {BASELINE: BASELINE, "batchtopk": "BatchTopK", "topk": "TopK"}
_NOTE = (
    "MCC (the mean correlation coefficient), uniqueness and F1 are SAELens's own: 1 is best. "
    "R² and MonoScore above chance, over the latents that have one, are ours. Mean ± standard "
    "deviation over seeds; 'MCC - plain' compares runs of the same seed. Shuffled: a control, in "
    "which MonoLoss compares each sample by another one. The SAE of the true features shows what "
    "their scores are; its R² is no limit, because its encoder is the transpose of its decoder."
)

_MOST_FREQUENT = 0.35
_WARM_UP = 0.05
_DECAY = 0.2
_DEAD_WINDOW = 1000  # SAELens's default, which is longer than a short run
_HELD_OUT_SEED = 1 << 20
"""Added to the seed of a run, so that no held-out sample is one of its training samples."""


def trainings(architecture: str) -> dict[str, Training]:
    """Return what is compared on an architecture, by name."""

    def mono(lam: float) -> MonoLoss:
        return MonoLoss(lam=lam, lam_units="nmse")

    found = {
        PLAIN: Training(),
        **{f"MonoLoss {lam}": Training(mono(lam)) for lam in LAMS},
        FROM_DATA: Training(from_data=True),
        **{
            f"{FROM_DATA}, MonoLoss {lam}": Training(mono(lam), from_data=True)
            for lam in FROM_DATA_LAMS
        },
        **{
            f"shuffled MonoLoss {lam}": Training(ShuffledMonoLoss(lam=lam, lam_units="nmse"))
            for lam in SHUFFLED_LAMS
        },
    }
    if architecture == "topk":
        for kind in (OffSupportL1, L1L2Ratio):
            for lam in REGULARIZER_LAMS:
                found[f"{kind.__name__} {lam}"] = Training(kind(lam=lam, lam_units="nmse"))
    return found


def make_source(model: str, sizes: Sizes, seed: int, device: str) -> Source:
    """Make a synthetic model and draw the samples that its SAEs start from."""
    structure = {
        "independent": {},
        "correlated": {"correlation": LowRankCorrelationConfig(rank=16, correlation_scale=0.15)},
        "hierarchical": {
            "hierarchy": HierarchyConfig(
                total_root_nodes=sizes.num_features // 4,
                branching_factor=3,
                max_depth=1,
                mutually_exclusive_portion=0.5,
                compensate_probabilities=True,
            )
        },
    }[model]
    made = SyntheticModel(
        SyntheticModelConfig(
            num_features=sizes.num_features,
            hidden_dim=sizes.width,
            # With this exponent no child has to be more frequent than its parent.
            firing_probability=ZipfianFiringProbabilityConfig(0.7, _MOST_FREQUENT, sizes.rarest),
            std_firing_magnitudes=0.3,
            seed=seed,
            **structure,
        ),
        device=device,
    )
    torch.manual_seed(seed)
    samples, features = made.sample_with_features(sizes.held_out)
    active = (features > 0).sum(dim=1).float().mean()
    return Source(made, samples, round(float(active)), seed)


def new_sae(source: Source, architecture: str) -> TrainingSAE[Any]:
    """Return a SAELens training SAE with as many latents as there are true features."""
    cfg, model = source.model.cfg, source.model
    sae_class, config_class = get_sae_training_class(architecture)
    torch.manual_seed(source.seed)
    return sae_class(
        config_class(d_in=cfg.hidden_dim, d_sae=cfg.num_features, k=source.k, device=model.device)
    )


def train(source: Source, architecture: str, training: Training, sizes: Sizes) -> SAE[Any]:
    """Train an SAE with SAELens's runner for synthetic models, on new samples in each step.

    All runs of a seed begin with the same weights and see the same samples in the same order.
    """
    sae = new_sae(source, architecture)
    if training.from_data:
        init_from_data(sae, source.samples, seed=source.seed)
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=source.model.cfg,
            sae=sae.cfg,
            training_samples=sizes.steps * sizes.batch_size,
            batch_size=sizes.batch_size,
            lr=sizes.learning_rate,
            lr_decay_steps=int(_DECAY * sizes.steps),
            dead_feature_window=min(_DEAD_WINDOW, max(1, sizes.steps // 5)),
            device=source.model.device,
            checkpoint_path=None,
            output_path=None,
            run_final_eval=False,  # it is measured as it is loaded, not as it is in training
            logger=LoggingConfig(log_to_wandb=False),
        ),
        override_synthetic_model=source.model,
        override_sae=sae,
    )
    if training.term is not None:
        add_loss(
            runner,
            training.term,
            warm_up_steps=int(_WARM_UP * sizes.steps),
        )
    torch.manual_seed(source.seed)
    return as_others_load_it(runner.run().sae)


def true_dictionary(source: Source) -> SAE[Any]:
    """Return a TopK SAE whose latents are the true features: what an SAE can reach at best."""
    sae = new_sae(source, "topk")
    init_sae_to_match_feature_dict(sae, source.model.feature_dict)
    sae.W_dec.data = sae.W_dec.data.contiguous()  # safetensors does not save a transposed one
    sae.b_dec.data.copy_(source.model.feature_dict.bias)
    return as_others_load_it(sae)


def data_points(source: Source) -> SAE[Any]:
    """Return a TopK SAE whose encoder is random samples, with a decoder fitted to it."""
    return make_baseline(
        "data points",
        source.samples,
        num_latents=source.model.cfg.num_features,
        l0=source.k,
        seed=source.seed,
        normalize=False,
    )


def untrained(source: Source) -> SAE[Any]:
    """Return a TopK SAE as SAELens makes it."""
    return as_others_load_it(new_sae(source, "topk"))


class Candidate(NamedTuple):
    """An SAE to measure."""

    group: str
    """Its architecture, or :data:`BASELINE`."""
    name: str
    make: Callable[[], SAE[Any]]


def candidates(source: Source, sizes: Sizes) -> Iterator[Candidate]:
    """Yield everything that is measured on a synthetic model."""
    for name, make in (
        ("true features", true_dictionary),
        ("data points", data_points),
        ("random weights", untrained),
    ):
        yield Candidate(BASELINE, name, partial(make, source))
    for architecture in ARCHITECTURES:
        for name, training in trainings(architecture).items():
            yield Candidate(
                architecture, name, partial(train, source, architecture, training, sizes)
            )


def measure_recovery(make: Callable[[], SAE[Any]], source: Source, sizes: Sizes) -> dict[str, Any]:
    """Make an SAE; return SAELens's measures of what it has found, and ours of the SAE.

    Returns:
        "recovery": SAELens's own, by its names. "summary": as
        :meth:`~monoloss_plugin.evaluation.Evaluation.summary`, with None for what is not defined.
        Both on samples that no run was trained on.
    """
    sae, model = make(), source.model
    torch.manual_seed(source.seed + _HELD_OUT_SEED)
    recovery = eval_sae_on_synthetic_data(
        sae,
        model.feature_dict,
        model.activation_generator,
        num_samples=sizes.held_out,
        batch_size=min(2048, sizes.held_out),
    )
    summary = evaluate(sae, model.sample(sizes.held_out), normalize=False).summary()
    return {
        "recovery": recovery.to_dict(),
        "summary": {name: None if math.isnan(of) else of for name, of in summary.items()},
    }


def measure(setting: Setting, sizes: Sizes | None = None) -> Found:
    """Train and measure every SAE on every synthetic model.

    Args:
        setting: where runs are kept, and for which seeds. Features are not needed.
        sizes: by default :data:`FULL` or :data:`SMALL`, as the setting says.
    """
    sizes = sizes or (FULL if setting.full else SMALL)
    runs: dict[str, Runs] = {model: {} for model in MODELS}
    # Seed by seed, so that what was found before a stop is of whole seeds.
    for seed in setting.seeds:
        for model in MODELS:
            source = make_source(model, sizes, seed, setting.device)
            for group, name, make in candidates(source, sizes):
                found = setting.run(
                    *("ground-truth", sizes, model, group, name, f"seed {seed}"),
                    compute=partial(measure_recovery, make, source, sizes),
                )
                runs[model].setdefault(group, {}).setdefault(name, []).append(found)
    return {
        "sizes": asdict(sizes),
        "seeds": list(setting.seeds),
        "runs": runs,
        "rank_correlation": {model: rank_correlations(of) for model, of in runs.items()},
    }


def rank_correlations(runs: Runs) -> dict[str, dict[str, float | None]]:
    """Return Spearman's rank correlation of two of our measures with SAELens's MCC.

    Returns:
        For some of the trained SAEs, by name: "monoscore_adjusted", "r2" and "saes", the number of
        SAEs. A correlation is None where a measure does not vary.
    """
    by_recipe = [
        (architecture, name, of)
        for architecture in ARCHITECTURES
        for name, of in runs[architecture].items()
    ]
    groups = {
        "all": by_recipe,
        **{_LABELS[one]: [of for of in by_recipe if of[0] == one] for one in ARCHITECTURES},
        "without MonoLoss": [recipe for recipe in by_recipe if "MonoLoss" not in recipe[1]],
    }
    found: dict[str, dict[str, float | None]] = {}
    for group, recipes in groups.items():
        saes = [run for *_, of in recipes for run in of]
        found[group] = {one: _rank_correlation(saes, one) for one in ("monoscore_adjusted", "r2")}
        found[group]["saes"] = len(saes)
    return found


def _rank_correlation(runs: Sequence[Run], measure: str) -> float | None:
    known = [run for run in runs if run["summary"][measure] is not None]
    ours = [run["summary"][measure] for run in known]
    mcc = [run["recovery"]["mcc"] for run in known]
    if len(set(ours)) < 2 or len(set(mcc)) < 2:
        return None
    return float(spearmanr(ours, mcc).statistic)


def tables(found: Found) -> list[Table]:
    """Return a table for each synthetic model, and one of the rank correlations."""
    header = ("SAE", "recipe", "MCC", "MCC - plain", "uniqueness", "F1", "R²", "above chance")
    return [
        *(
            Table(
                f"True features found: {model} features",
                (*header, "L0", "dead"),
                [
                    (_LABELS[group], name, *_cells(of, recipes.get(PLAIN)))
                    for group, recipes in found["runs"][model].items()
                    for name, of in recipes.items()
                ],
                _NOTE,
            )
            for model in found["runs"]
        ),
        Table(
            "Does a measure rank SAEs by what they have found?",
            ("features", "SAEs", "number", "MonoScore and MCC", "R² and MCC"),
            [
                (
                    model,
                    group,
                    str(of["saes"]),
                    spread([of["monoscore_adjusted"]], 2),
                    spread([of["r2"]], 2),
                )
                for model, groups in found["rank_correlation"].items()
                for group, of in groups.items()
            ],
            "Spearman's rank correlation over trained SAEs, of all recipes and seeds. MonoScore is "
            "above chance.",
        ),
    ]


def _cells(runs: Sequence[Run], plain: Sequence[Run] | None) -> Iterator[str]:
    """Yield the numbers of a row."""
    recovery = [run["recovery"] for run in runs]
    mcc = [run["mcc"] for run in recovery]
    yield spread(mcc)
    # Runs of a seed share the model, the first weights and the samples.
    compared = [] if plain is None or plain is runs else zip(mcc, plain, strict=True)
    yield spread(of - without["recovery"]["mcc"] for of, without in compared)
    yield spread(run["uniqueness"] for run in recovery)
    yield spread(run["classification"]["f1_score"] for run in recovery)
    yield spread(run["summary"]["r2"] for run in runs)
    yield spread(run["summary"]["monoscore_adjusted"] for run in runs)
    yield spread((run["sae_l0"] for run in recovery), 2)
    yield spread((run["dead_latents"] for run in recovery), 0)


def draw(found: Found) -> Axes:
    """Plot the MCC against lam: the mean over seeds, and the standard deviation as a bar."""
    # matplotlib is needed for the figure alone.
    from monoloss_plugin.figures.dressing import COLOURS, DASHES, MARKERS, axes_for, dress

    ax = axes_for(None)
    for i, (model, groups) in enumerate(found["runs"].items()):
        for j, architecture in enumerate(ARCHITECTURES):
            recipes = groups[architecture]
            style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[j], "capsize": 2}
            along = [recipes[PLAIN], *(recipes[f"MonoLoss {lam}"] for lam in LAMS)]
            label = f"{model}, {_LABELS[architecture]}"
            ax.errorbar((0, *LAMS), **_mcc(along), **style, linestyle=DASHES[j], label=label)
            shuffled = [recipes[f"shuffled MonoLoss {lam}"] for lam in SHUFFLED_LAMS]
            ax.errorbar(
                SHUFFLED_LAMS, **_mcc(shuffled), **style, linestyle="none", markerfacecolor="none"
            )
    ax.set_xscale("symlog", linthresh=LAMS[0])
    ax.set_xticks((0, *LAMS), [f"{lam:g}" for lam in (0, *LAMS)])
    return dress(ax, "lam of MonoLoss", "true features found (MCC)", None, "hollow: shuffled")


def _mcc(recipes: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """Return the mean MCC and its standard deviation, as ``errorbar`` takes them."""
    values = [[run["recovery"]["mcc"] for run in of] for of in recipes]
    return {
        "y": [statistics.fmean(of) for of in values],
        "yerr": [statistics.stdev(of) if len(of) > 1 else 0.0 for of in values],
    }


GROUND_TRUTH = Experiment(
    about="Do the losses help to find the true features of SAELens's synthetic models?",
    needs=frozenset(),
    measure=measure,
    tables=tables,
    draw=draw,
)

"""SAEs side by side, with baselines: every measure that a referee asks for, in one table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from monoloss_plugin._checks import as_list, as_rows, require_choice, require_flag
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, kind_of
from monoloss_plugin.dictionary import redundancy, stability
from monoloss_plugin.evaluation import SAE, evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.feature_set import require_set
from monoloss_plugin.features.matching import rows_in_common
from monoloss_plugin.metrics import MonoScore
from monoloss_plugin.other_saes import as_sae
from monoloss_plugin.probing import latents_of, preserved_accuracy, small_budget_probe
from monoloss_plugin.results import IMAGE_MEASURES, MEASURES, Evaluation
from monoloss_plugin.saes.baselines import BASELINES, make_baseline
from monoloss_plugin.saes.rows import Rows
from monoloss_plugin.saes.selection import (
    effective_latents,
    k_robustness,
    l0_and_width,
    with_l0,
)
from monoloss_plugin.spatial import image_means

try:
    import pandas as pd
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise missing_extra(error, "referee") from error

Group = Literal["spaces", "budgets", "probes", "dictionary"]
"""Measures beside those of ``evaluate``:

- "spaces": MonoScore above chance in each of the ``spaces``; and by labels, where images of one
  class are alike and others are not.
- "budgets": R² at a quarter, half, twice and four times the L0, and the effective number of latents
  (Jacquier et al. 2026).
- "probes": held-out accuracy of linear probes on the best 1, 2, 4, ..., 64 latents, and of a probe
  of the features on features and on reconstructions. They need labels. If samples are patches, the
  probes read the mean over each image's patches.
- "dictionary": the share of latents with a near twin; and, for several seeds, the stability of
  decoder directions.
"""

GROUPS: tuple[Group, ...] = get_args(Group)
"""All groups."""

_Embed = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From numbers of images (B,) to a mask of those that a space has (B,), and their embeddings."""

LABELS: dict[str, str] = {
    **MEASURES,
    **IMAGE_MEASURES,
    "effective_latents": "effective latents per sample",
    "accuracy/features": "probe accuracy, features",
    "accuracy/reconstructions": "probe accuracy, reconstructions",
    "redundancy": "share of latents with a near twin",
    "stability": "cosine of matched directions, over seeds",
    "stability_chance": "the same for random directions",
}
_SHARES = (0.25, 0.5, 2.0, 4.0)
_OF_LABELS = "labels"
_BUDGETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    runs: dict[str, list[dict[str, float]]]
    """For each SAE and baseline, the measures of each seed, by name."""
    evaluations: dict[str, list[Evaluation]]
    """For each SAE and baseline, the evaluation of each seed."""
    baselines: list[str]
    """Which of the names are baselines."""
    notes: list[str]
    """How the numbers came about: splits, spaces, matching."""

    def measures(self) -> list[str]:
        """Return the names of all measures, in the order of a table."""
        names: dict[str, None] = {}
        for runs in self.runs.values():
            for run in runs:
                names |= dict.fromkeys(run)
        return list(names)

    def to_frame(self) -> pd.DataFrame:
        """Return the means over seeds: a row for each SAE, a column for each measure."""
        return self._frame(statistics.fmean)

    def spread(self) -> pd.DataFrame:
        """Return the standard deviations over seeds, as :meth:`to_frame`; NaN for one seed."""
        # statistics.stdev raises an AttributeError for NaN.
        return self._frame(lambda values: float(pd.Series(values).std(skipna=False)))

    def cells(self) -> list[list[str]]:
        """Return the table as text: the measure's name, and mean ± deviation for each SAE."""
        means, spreads = self.to_frame(), self.spread()
        rows = []
        for measure in self.measures():
            row = [label_of(measure)]
            for name in self.runs:
                mean, spread = means.loc[name, measure], spreads.loc[name, measure]
                row.append(_cell(mean, spread, measure))
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the runs, the names of baselines and the notes, as JSON can hold them.

        A measure that is NaN becomes None.
        """
        runs = {
            name: [{m: None if math.isnan(v) else v for m, v in run.items()} for run in runs]
            for name, runs in self.runs.items()
        }
        return {"runs": runs, "baselines": self.baselines, "notes": self.notes}

    def save(self, path: str | Path) -> Path:
        """Write the runs and notes as JSON."""
        place = as_path(path, "path", "a file")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return place

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(self.runs)} in {len(self.measures())} measures"

    def _repr_html_(self) -> str:
        table = pd.DataFrame(self.cells(), columns=["", *self.runs]).set_index("")
        return f"{table.to_html()}<p>{'<br>'.join(map(escape, self.notes))}</p>"

    def _frame(self, of: Callable[[list[float]], float]) -> pd.DataFrame:
        columns = self.measures()
        rows = [
            [of([r[c] for r in runs]) if all(c in r for r in runs) else None for c in columns]
            for runs in self.runs.values()
        ]
        return pd.DataFrame(rows, index=list(self.runs), columns=columns, dtype=float)


def label_of(measure: str) -> str:
    """Return the name of a measure in a table."""
    kind, _, of = measure.partition("/")
    if kind == "adjusted":
        return f"MonoScore above chance, by {of}"
    if kind == "r2" and of:
        return f"R² at {of} times the L0"
    if kind == "probe":
        return f"probe accuracy, best {of} latent{'s' * (of != '1')}"
    return LABELS.get(measure, measure)


def compare(
    saes: Mapping[str, SAE | Sequence[SAE]],
    features: FeatureSet,
    *,
    train: FeatureSet | None = None,
    spaces: Mapping[str, FeatureSet] | None = None,
    baselines: bool | Sequence[str] = False,
    match: Literal["l0"] | None = None,
    groups: Sequence[Group] = GROUPS,
    score: Callable[[SAE, FeatureSet], Evaluation] = evaluate,
    progress: bool = False,
) -> Comparison:
    """Measure SAEs of the same features side by side, with SAEs that have learnt nothing.

    Args:
        saes: SAEs by name; several of a name are the same recipe with other seeds, and get means.
        features: held-out features.
        train: training features, for what must be fitted: baselines, probes and thresholds. By
            default half of ``features``, chosen at random; the SAEs are then scored on the other
            half. Where nothing is fitted, they are scored on all of them.
        spaces: other feature sets of the same images, by name. MonoScore is computed in each. If
            the samples are patches, each is compared by its image's feature there, and patches of
            one image are not compared.
        baselines: True for all of :data:`~monoloss_plugin.saes.baselines.BASELINES`, or their
            names. They have the number of latents and the L0 of the first SAE, and as many seeds.
        match: "l0" gives every SAE one threshold, so that all have the L0 of the first SAE on
            ``train`` (see :func:`~monoloss_plugin.saes.selection.with_l0`), also the baselines.
        groups: which :data:`Group` of measures to take beside those of ``evaluate``.
        score: gives the evaluation of an SAE or a baseline; a function of yours may do more in the
            same pass.
        progress: show a progress bar.

    Raises:
        TypeError: SAEs, features or spaces of another kind.
        ValueError: no SAEs, an unknown name, SAEs of different widths, spaces that share no image
            with ``features``, a baseline that needs more training rows, or an L0 that a threshold
            cannot give.

    Source: the controls of SAEBench, arXiv 2501.17727, 2505.20254 and 2602.14111.
    """
    recipes = _recipes(saes)
    groups = as_list(groups, "groups")
    for group in groups:
        require_choice(group, "groups", GROUPS)
    if match is not None:
        require_choice(match, "match", ("l0",))
    require_flag(progress, "progress")
    require_set(features, "features")
    if isinstance(baselines, bool):
        baselines = list(BASELINES) if baselines else []
    kinds = as_list(baselines, "baselines")
    for kind in kinds:
        require_choice(kind, "baselines", tuple(BASELINES))
    matched = _matched(features, {} if spaces is None else spaces)
    notes = []
    if train is None and not (kinds or match or "probes" in groups):
        train = features
    elif train is None:
        fitted, scored = _halves(features.num_images)
        train, features = features.select(fitted), features.select(scored)
        matched = {name: (other, rows[scored]) for name, (other, rows) in matched.items()}
        notes.append(
            "There are no training features. So probes and baselines were fitted on a random half "
            f"({len(train)} rows), and everything was scored on the other ({len(features)} rows)."
        )
    require_set(train, "train")
    if train.width != features.width:
        raise ValueError(f"train: expected width {features.width} as features, got {train.width}")

    if kinds or match:
        size = _Size.of(next(iter(recipes.values())), train)
    if match:
        for name, of in recipes.items():
            with _blamed_on(f"match: {name!r}"):
                recipes[name] = [with_l0(sae, train, size.l0) for sae in of]
        notes.append(f"Every SAE has one threshold, for an L0 of {size.l0:.3g} on training rows.")
    for kind in kinds:
        recipes[kind] = _shown(
            _baselines(kind, train, size, match is not None), kind, progress, size.seeds
        )
    if kinds:
        notes.append(
            f"Baselines have {size.num_latents} latents"
            + ("" if match else f", and {max(1, round(size.l0))} active ones per sample")
            + ". Their decoders were fitted to the training rows by ridge regression."
        )
    evaluations = {
        name: _shown((score(sae, features) for sae in of), name, progress, len(of))
        for name, of in recipes.items()
    }
    if features.patches is not None and "probes" in groups:
        notes.append("Probes read the mean over each image's patches.")
    referee = _Referee(features, train, matched, tuple(groups))
    runs = {
        name: [
            {**found.summary(), **referee.measures_of(sae, found), **extra}
            for sae, found in zip(of, evaluations[name], strict=True)
        ]
        for name, of in recipes.items()
        for extra in [_stability(of, evaluations[name]) if "dictionary" in groups else {}]
    }
    notes += [f"{name}: {of[0].spaces}." for name, of in evaluations.items() if name not in kinds]
    return Comparison(runs, evaluations, kinds, notes)


class _Size(NamedTuple):
    """What baselines take over from the first SAE."""

    num_latents: int
    l0: float
    seeds: int
    unit_norm: bool

    @classmethod
    def of(cls, leader: Sequence[SAE], train: FeatureSet) -> _Size:
        """Return that of the first of some SAEs."""
        rows = Rows.for_sae(leader[0], train, None)
        l0, num_latents = l0_and_width(leader[0], rows)
        return cls(num_latents, l0, len(leader), rows.unit_norm)


def _baselines(kind: str, train: FeatureSet, size: _Size, by_threshold: bool) -> Iterator[SAE]:
    """Yield a baseline for each seed."""
    for seed in range(size.seeds):
        with _blamed_on(f"baselines: {kind!r}"):
            yield make_baseline(
                kind,
                train,
                num_latents=size.num_latents,
                l0=size.l0 if by_threshold else max(1, round(size.l0)),
                selection="threshold" if by_threshold else "topk",
                seed=seed,
                normalize=size.unit_norm,
            )


@dataclass(frozen=True)
class _Referee:
    """Takes the measures beside those of ``evaluate``."""

    features: FeatureSet
    train: FeatureSet
    spaces: dict[str, tuple[FeatureSet, Tensor]]
    """Sets of images, and their row (N,) of each image of ``features``; -1 if they lack it."""
    groups: tuple[Group, ...]

    def measures_of(self, sae: SAE, found: Evaluation) -> dict[str, float]:
        """Return the measures of one SAE by name."""
        measures: dict[str, float] = {}
        if "spaces" in self.groups:
            measures |= self._in_spaces(sae)
        if "budgets" in self.groups:
            r2 = k_robustness(sae, self.features)
            ks = {share: max(1, round(share * found.l0)) for share in _SHARES}
            measures |= {f"r2/{share:g}": r2[k] for share, k in ks.items() if k in r2}
            measures["effective_latents"] = effective_latents(sae, self.features)
        if "probes" in self.groups and all(
            _has_classes(one.images) for one in (self.features, self.train)
        ):
            measures |= self._probes(sae)
        if "dictionary" in self.groups and (weight := _dictionary(sae)) is not None:
            measures["redundancy"] = redundancy(weight, alive=found.monoscore.support > 0)
        return measures

    @torch.no_grad()
    def _in_spaces(self, sae: SAE) -> dict[str, float]:
        """Return MonoScore above chance in each space, from one pass through the SAE."""
        rows = Rows.for_sae(sae, self.features, None)
        metrics = {name: MonoScore() for name in self._embeddings}
        for batch in rows.samples():
            assert batch.rows is not None  # of a feature set
            device = batch.features.device
            latents = as_rows(sae.encode(batch.features), "sae.encode(features)")
            for name, of in self._embeddings.items():
                known, embeddings = of(self.features.image_of(batch.rows))
                groups = None if batch.images is None else batch.images[known].to(device)
                metrics[name].update(
                    latents[known.to(device)], embeddings.to(device), groups=groups
                )
        return {f"adjusted/{name}": of.compute().mean_adjusted for name, of in metrics.items()}

    @cached_property
    def _embeddings(self) -> dict[str, _Embed]:
        """For each space, a function: images (B,) to which of them it has (B,), and embeddings."""
        images = self.features.images
        return {
            **{name: _features_of(*space) for name, space in self.spaces.items()},
            **({_OF_LABELS: _labels_of(images)} if _has_classes(images) else {}),
        }

    def _probes(self, sae: SAE) -> dict[str, float]:
        train, held_out = (Rows.for_sae(sae, one, None) for one in (self.train, self.features))
        y, y_held_out = self.train.images.labels, self.features.images.labels
        assert y is not None  # _has_classes
        assert y_held_out is not None
        latents = [latents_of(sae, rows.samples()) for rows in (train, held_out)]
        found = small_budget_probe(latents[0], y, latents[1], y_held_out, budgets=_BUDGETS)
        every = [
            torch.cat([image_means(batch, batch.features) for batch in rows.samples()]).cpu()
            for rows in (train, held_out)
        ]
        with torch.no_grad():
            parts = [
                image_means(batch, sae.decode(sae.encode(batch.features))).cpu()
                for batch in held_out.samples()
            ]
        preserved = preserved_accuracy(every[0], y, every[1], torch.cat(parts), y_held_out)
        return {
            **{f"probe/{n}": accuracy for n, accuracy in found.items()},
            "accuracy/features": preserved.on_features,
            "accuracy/reconstructions": preserved.on_reconstructions,
        }


def _features_of(other: FeatureSet, row: Tensor) -> _Embed:
    def of(numbers: Tensor) -> tuple[Tensor, Tensor]:
        known = row[numbers] >= 0
        some, which = row[numbers][known].unique(return_inverse=True)  # patches share an image
        return known, other.take(some).float()[which]

    return of


def _labels_of(features: FeatureSet) -> _Embed:
    labels, num_classes = features.labels, features.num_classes
    assert labels is not None  # _has_classes
    assert num_classes is not None

    def of(numbers: Tensor) -> tuple[Tensor, Tensor]:
        known = labels[numbers] >= 0
        return known, one_hot(labels[numbers][known].long(), num_classes).float()

    return of


def _recipes(saes: Any) -> dict[str, list[SAE]]:
    """Return the SAEs by name, several of each."""
    if not isinstance(saes, Mapping) or not all(isinstance(name, str) for name in saes):
        raise TypeError(f"saes: expected SAEs by name, got {kind_of(saes)}")
    recipes = {
        name: list(of) if isinstance(of, (list, tuple)) else [of] for name, of in saes.items()
    }
    if not recipes or not all(recipes.values()):
        raise ValueError("saes: expected at least one SAE of each name, got none")
    if taken := [name for name in recipes if name in BASELINES]:
        raise ValueError(f"saes: {taken[0]!r} is the name of a baseline; give another")
    return {name: [as_sae(sae) for sae in of] for name, of in recipes.items()}


def _matched(features: FeatureSet, spaces: Any) -> dict[str, tuple[FeatureSet, Tensor]]:
    """Return the images of each space, and their row (N,) of each image of ``features``, or -1."""
    if not isinstance(spaces, Mapping) or not all(isinstance(name, str) for name in spaces):
        raise TypeError(f"spaces: expected feature sets by name, got {kind_of(spaces)}")
    if _OF_LABELS in spaces:
        raise ValueError(f"spaces: {_OF_LABELS!r} is the space of the labels; give another name")
    matched = {}
    for name, other in spaces.items():
        require_set(other, f"spaces: {name!r}")
        with _blamed_on(f"spaces: {name!r}"):
            ours, theirs = rows_in_common(features, [other])
        row = torch.full((features.num_images,), -1).index_put_((ours,), theirs)
        matched[name] = other.images, row
    return matched


@contextmanager
def _blamed_on(argument: str) -> Iterator[None]:
    """Begin a ValueError with an argument of :func:`compare`, whose caller knows no other."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def _halves(num_images: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the images of two random halves, in order."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    first, second = (half.sort().values for half in order.tensor_split(2))
    return first, second


def _stability(saes: Sequence[SAE], found: Sequence[Evaluation]) -> dict[str, float]:
    weights = [weight for sae in saes if (weight := _dictionary(sae)) is not None]
    if len(weights) < 2 or len(weights) < len(saes):
        return {}
    matched = stability(weights, alive=[one.monoscore.support > 0 for one in found])
    return {"stability": matched.mean, "stability_chance": matched.chance}


def _dictionary(sae: Any) -> Tensor | None:
    """Return the decoder's directions (M, d), if the SAE has a ``W_dec``."""
    weight = getattr(getattr(sae, "sae", sae), "W_dec", None)
    return weight.detach() if isinstance(weight, Tensor) else None


def _has_classes(features: FeatureSet) -> bool:
    labels = features.labels
    return labels is not None and len(labels[labels >= 0].unique()) > 1


def _shown(items: Iterable[Any], name: str, progress: bool, total: int | None = None) -> list[Any]:
    return list(tqdm(items, desc=name, unit="SAE", total=total, disable=not progress))


def _cell(mean: float, spread: float, measure: str) -> str:
    if math.isnan(mean):
        return ""
    if measure.startswith("stability"):  # one number for all seeds together
        spread = math.nan
    digits = 1 if measure in ("l0", "dead_latents", "effective_latents", "num_images") else 3
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")

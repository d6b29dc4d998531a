"""SAEs side by side: each number is that of its own function, on the rows that the notes name."""

from __future__ import annotations

import json
import math
import statistics
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

from monoloss_plugin import functional, load_features, load_pretrained
from monoloss_plugin.comparison import Comparison, Group, compare, label_of
from monoloss_plugin.dictionary import redundancy, stability
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.probing import latents_of, preserved_accuracy, small_budget_probe
from monoloss_plugin.results import MEASURES
from monoloss_plugin.saes import make_baseline
from monoloss_plugin.saes.rows import Rows
from monoloss_plugin.saes.selection import effective_latents, k_robustness

TRAIN, HELD_OUT = load_features("digits", "train"), load_features("digits", "held_out")
SHARES = {"r2/0.25": 1, "r2/0.5": 2, "r2/2": 8, "r2/4": 16}


@cache
def topk(seed: int = 0, k: int = 4):
    return make_baseline("data points", TRAIN, num_latents=24, l0=k, seed=seed)


@cache
def jumprelu():
    """Latents with thresholds of their own."""
    made = topk()
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=24, apply_b_dec_to_input=False))
    thresholds = torch.linspace(0.02, 0.1, 24)
    sae.load_state_dict({**made.state_dict(), "threshold": thresholds})
    sae.cfg.metadata.monoloss = {"inputs": "unit norm"}
    return sae


class Plain:
    """An SAE that has ``encode`` and ``decode`` alone."""

    def __init__(self, sparse: bool = False) -> None:
        self.sparse = sparse

    def encode(self, x):
        latents = topk().encode(x)
        return latents.to_sparse() if self.sparse else latents

    def decode(self, latents):
        return topk().decode(latents.to_dense() if self.sparse else latents)


def set_of(x, labels=None, ids=None, **record) -> FeatureSet:
    return FeatureSet.from_tensors(x, labels, ids, record=record)


def quick(saes, features=HELD_OUT, **options) -> Comparison:
    """Compare without the slow measures."""
    return compare(saes, features, **{"train": TRAIN, "groups": (), **options})


@pytest.fixture(scope="module")
def whole() -> Comparison:
    saes = {"seeds": [topk(0), topk(1), topk(2)], "jump": jumprelu()}
    return compare(saes, HELD_OUT, train=TRAIN, spaces={"itself": HELD_OUT})


def test_each_seed_has_the_measures_of_its_own_functions(whole) -> None:
    assert [len(runs) for runs in whole.runs.values()] == [3, 1]
    for sae, run, evaluation in zip(
        [topk(0), topk(1), topk(2), jumprelu()],
        chain(*whole.runs.values()),
        chain(*whole.evaluations.values()),
        strict=True,
    ):
        expected = evaluate(sae, HELD_OUT)
        assert evaluation.summary() == expected.summary()
        assert {name: run[name] for name in MEASURES} == expected.summary()
        assert run["adjusted/itself"] == pytest.approx(expected.monoscore.mean_adjusted, abs=1e-6)
        assert run["effective_latents"] == effective_latents(sae, HELD_OUT)
        alive = expected.monoscore.support > 0
        assert run["redundancy"] == redundancy(sae.W_dec.detach(), alive=alive)


def test_r2_at_other_budgets_is_k_robustness_at_shares_of_the_l0(whole) -> None:
    assert whole.runs["seeds"][0]["l0"] == 4.0
    for seed, run in enumerate(whole.runs["seeds"]):
        found = k_robustness(topk(seed), HELD_OUT, ks=list(SHARES.values()))
        assert {name: run[name] for name in SHARES} == {n: found[k] for n, k in SHARES.items()}
    assert (
        "r2/4"
        not in compare({"a": topk(k=8)}, HELD_OUT, train=TRAIN, groups=["budgets"]).runs["a"][0]
    )  # 32 of 24 latents


def test_probes_are_fitted_on_training_rows_and_tested_on_held_out_ones(whole) -> None:
    x, tested = (
        Rows.for_sae(topk(), one, None).take(torch.arange(len(one))) for one in (TRAIN, HELD_OUT)
    )
    latents = [latents_of(topk(), [rows]) for rows in (x, tested)]
    run = whole.runs["seeds"][0]
    found = small_budget_probe(latents[0], TRAIN.labels, latents[1], HELD_OUT.labels)
    assert list(found) == [1, 2, 4, 8, 16]  # of 24 latents
    assert {name: value for name, value in run.items() if name.startswith("probe/")} == (
        {f"probe/{n}": pytest.approx(value, abs=2e-3) for n, value in found.items()}
    )
    with torch.no_grad():
        reconstructions = topk().decode(topk().encode(tested))
    on = preserved_accuracy(x, TRAIN.labels, tested, reconstructions, HELD_OUT.labels)
    assert run["accuracy/features"] == pytest.approx(on.on_features, abs=2e-3)
    assert run["accuracy/reconstructions"] == pytest.approx(on.on_reconstructions, abs=4e-3)


def test_stability_is_of_the_seeds_and_of_no_single_sae(whole) -> None:
    saes = [topk(seed) for seed in range(3)]
    alive = [evaluate(sae, HELD_OUT).monoscore.support > 0 for sae in saes]
    expected = stability([sae.W_dec.detach() for sae in saes], alive=alive)
    for run in whole.runs["seeds"]:
        assert (run["stability"], run["stability_chance"]) == expected
    assert "stability" not in whole.runs["jump"][0]
    assert math.isnan(whole.to_frame().loc["jump", "stability"])


def test_tables_hold_means_and_sample_deviations_over_seeds(whole) -> None:
    means, spreads = whole.to_frame(), whole.spread()
    assert list(means.index) == list(spreads.index) == ["seeds", "jump"]
    assert list(means.columns) == list(spreads.columns) == whole.measures()
    for measure in whole.measures():
        values = [run[measure] for run in whole.runs["seeds"]]
        assert means.loc["seeds", measure] == pytest.approx(statistics.fmean(values))
        assert spreads.loc["seeds", measure] == pytest.approx(statistics.stdev(values), abs=1e-12)
    assert spreads.loc["jump"].isna().all()
    assert means.loc["jump", "r2"] == whole.runs["jump"][0]["r2"]


def test_cells_and_the_saved_file_say_what_the_frame_says(whole, tmp_path: Path) -> None:
    means, spreads = whole.to_frame(), whole.spread()
    cells = {row[0]: row[1:] for row in whole.cells()}
    assert list(cells) == [label_of(measure) for measure in whole.measures()]
    r2, l0 = cells["R²"], cells["L0"]
    assert r2[0] == f"{means.loc['seeds', 'r2']:.3f} ± {spreads.loc['seeds', 'r2']:.3f}"
    assert r2[1] == f"{means.loc['jump', 'r2']:.3f}"
    assert l0[0] == "4.0 ± 0.0"
    assert cells["cosine of matched directions, over seeds"][1] == ""
    place = whole.save(str(tmp_path / "new" / "table.json"))
    saved = json.loads(place.read_text())
    assert saved == {"runs": whole.runs, "baselines": [], "notes": whole.notes}


def test_every_column_has_a_name_of_its_own_for_people(whole) -> None:
    labels = [label_of(measure) for measure in whole.measures()]
    assert len(set(labels)) == len(labels)
    assert not set(labels) & set(whole.measures())
    assert label_of("probe/1") == "probe accuracy, best 1 latent"
    assert label_of("probe/16") == "probe accuracy, best 16 latents"
    assert label_of("r2/0.25") == "R² at 0.25 times the L0"


def test_a_measure_that_is_nan_is_empty_in_the_table_and_null_in_the_file(tmp_path: Path) -> None:
    dead = Comparison({"a": [{"r2": 0.5}, {"r2": math.nan}]}, {"a": []}, [], [])
    assert math.isnan(dead.to_frame().loc["a", "r2"])
    assert math.isnan(dead.spread().loc["a", "r2"])
    assert dead.cells() == [["R²", ""]]
    saved = json.loads(dead.save(tmp_path / "a.json").read_text())
    assert saved["runs"]["a"] == [{"r2": 0.5}, {"r2": None}]


def test_a_notebook_shows_names_as_text() -> None:
    found = quick({"<b>mine</b>": topk()})
    shown = found._repr_html_()
    assert "<b>" not in shown
    assert shown.count("&lt;b&gt;mine") == 2  # in the table and in the note of its space
    assert repr(found) == f"Comparison of <b>mine</b> in {len(MEASURES)} measures"


def test_baselines_have_the_size_the_l0_and_the_seeds_of_the_first_sae() -> None:
    kinds = ["random directions", "PCA"]
    found = quick({"mine": [topk(0), topk(1)], "other": jumprelu()}, baselines=kinds)
    assert found.baselines == kinds
    assert list(found.runs) == ["mine", "other", *kinds]
    for kind in kinds:
        assert [e.num_latents for e in found.evaluations[kind]] == [24, 24]
        assert [run["l0"] for run in found.runs[kind]] == [4.0, 4.0]
    assert found.evaluations[kinds[0]][0].r2 != found.evaluations[kinds[0]][1].r2
    expected = make_baseline("random directions", TRAIN, num_latents=24, l0=4, seed=1)
    assert found.evaluations[kinds[0]][1].r2 == evaluate(expected, HELD_OUT).r2
    assert "Baselines have 24 latents, and 4 active ones per sample" in found.notes[0]
    assert not any(note.startswith("PCA") for note in found.notes)


def test_true_takes_every_baseline_and_false_none() -> None:
    found = quick({"mine": topk(k=2)}, baselines=True)
    assert found.baselines == ["random directions", "data points", "PCA", "ICA", "k-means"]
    assert quick({"mine": topk(k=2)}).baselines == []


def test_baselines_of_an_sae_of_features_as_they_are_take_them_as_they_are() -> None:
    sae = make_baseline("PCA", TRAIN, num_latents=24, l0=4, normalize=False)
    found = quick({"mine": sae}, baselines=["PCA"])
    assert found.runs["PCA"] == found.runs["mine"]


def test_matched_saes_have_the_first_one_s_l0_on_training_rows() -> None:
    saes = {"mine": topk(k=3), "wider": topk(1, k=8), "jump": jumprelu()}
    on_training = quick(saes, TRAIN, match="l0", baselines=["random directions", "ICA"])
    assert on_training.runs["mine"][0]["l0"] == pytest.approx(3.0, rel=0.02)
    for name, (run,) in on_training.runs.items():
        assert run["l0"] == pytest.approx(3.0, rel=0.02), name
    held_out = quick(saes, match="l0")
    assert all(run["l0"] == pytest.approx(3.0, rel=0.1) for (run,) in held_out.runs.values())
    assert any("one threshold, for an L0 of 3 on training rows" in n for n in held_out.notes)
    assert quick(saes).runs["wider"][0]["l0"] > 7.5


def test_a_matched_sae_has_its_decoder_in_the_dictionary_s_measures() -> None:
    found = quick({"mine": [topk(0), topk(1)]}, match="l0", groups=["dictionary", "budgets"])
    assert {"redundancy", "stability", "effective_latents"} <= set(found.measures())
    # Another k chooses from the SAE's own pre-activations, whatever the threshold lets through.
    assert {"r2/0.5", "r2/2"} <= set(found.measures())


def test_in_the_space_of_labels_images_of_one_class_are_alike_and_others_are_not() -> None:
    labels = HELD_OUT.labels.clone()
    labels[::7] = -1
    features = set_of(HELD_OUT.tensor(), labels)
    run = compare({"a": topk()}, features, train=TRAIN, groups=["spaces"]).runs["a"][0]
    known = labels >= 0
    with torch.no_grad():
        a = topk().encode(torch.nn.functional.normalize(HELD_OUT.tensor().float()[known], dim=1))
    one_hot = torch.nn.functional.one_hot(labels[known]).double()
    scores = functional.monoscore_pairwise(a.double(), one_hot)
    counts = one_hot.sum(0)
    chance = float((counts * (counts - 1)).sum() / (known.sum() * (known.sum() - 1)))
    defined = (a > 0).sum(0) >= 2
    expected = float(((scores[defined] - chance) / (1 - chance)).mean())
    assert run["adjusted/labels"] == pytest.approx(expected, abs=1e-6)


def test_a_space_in_another_order_is_matched_by_ids_and_may_lack_images() -> None:
    pixels = torch.rand(599, 5, generator=torch.Generator().manual_seed(0))
    features = set_of(HELD_OUT.tensor(), None, list(map(str, range(599))))
    order = torch.randperm(599, generator=torch.Generator().manual_seed(1))
    ids = [str(row) for row in order.tolist()]
    spaces = {
        "in order": set_of(pixels, None, features.ids_of(torch.arange(599))),
        "shuffled": set_of(pixels[order], None, ids),
        "fewer": set_of(pixels[order[:300]], None, ids[:300]),
    }
    run = quick({"a": topk()}, features, spaces=spaces, groups=["spaces"]).runs["a"][0]
    assert run["adjusted/shuffled"] == run["adjusted/in order"]
    assert run["adjusted/fewer"] != run["adjusted/in order"]
    assert "adjusted/labels" not in run
    rows = order[:300].sort().values
    some = evaluate(topk(), HELD_OUT.take(rows), embeddings=pixels[rows], normalize=True)
    assert run["adjusted/fewer"] == pytest.approx(some.monoscore.mean_adjusted, abs=1e-6)


@pytest.mark.parametrize("with_ids", [True, False])
def test_without_training_rows_half_is_for_fitting_and_the_other_half_is_scored(
    with_ids: bool, monkeypatch
) -> None:
    seen: dict[str, FeatureSet] = {}

    def fit(kind, features, **options):
        seen["fitted"] = features
        return make_baseline(kind, features, **options)

    def score(sae, features):
        seen["scored"] = features
        return evaluate(sae, features)

    monkeypatch.setattr("monoloss_plugin.comparison.make_baseline", fit)
    x = torch.cat((HELD_OUT.tensor().float(), torch.arange(599.0)[:, None] / 1e6), 1)
    ids = list(map(str, range(599))) if with_ids else None
    other = set_of(torch.rand(599, 3), None, ids)
    sae = make_baseline("PCA", set_of(x), num_latents=24, l0=4)
    found = compare(
        {"a": sae},
        set_of(x, HELD_OUT.labels, ids),
        spaces={"other": other},
        baselines=["PCA"],
        groups=["spaces", "probes"],
        score=score,
    )
    fitted, scored = (
        set((seen[name].tensor()[:, -1] * 1e6).round().long().tolist())
        for name in ("fitted", "scored")
    )
    assert not fitted & scored
    assert fitted | scored == set(range(599))
    assert min(fitted) < 20  # a random half, not the second
    assert max(fitted) > 580
    assert "There are no training features" in found.notes[0]
    assert f"({len(fitted)} rows)" in found.notes[0]
    assert f"({len(scored)} rows)" in found.notes[0]
    assert found.evaluations["a"][0].monoscore.num_samples == len(scored)
    # Where nothing is fitted, there is nothing to hold out.
    whole = compare({"a": sae}, set_of(x), groups=["budgets"])
    assert whole.evaluations["a"][0].monoscore.num_samples == 599
    assert whole.notes == ["a: samples are compared by features of an encoder without a name."]
    # The space is that of the scored images, row by row.
    rows = torch.tensor(sorted(scored))
    direct = evaluate(sae, x[rows], embeddings=other.take(rows), normalize=True)
    assert found.runs["a"][0]["adjusted/other"] == pytest.approx(
        direct.monoscore.mean_adjusted, abs=1e-6
    )
    assert found.runs["a"][0]["probe/16"] > 0.3


GROUPS: dict[Group, set[str]] = {
    "spaces": {"adjusted/labels"},
    "budgets": {*SHARES, "effective_latents"},
    "probes": {"accuracy/features", "accuracy/reconstructions"}
    | {f"probe/{n}" for n in (1, 2, 4, 8, 16)},
    "dictionary": {"redundancy"},
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_adds_its_measures_alone(group: Group) -> None:
    found = quick({"a": topk()}, groups=[group])
    assert set(found.measures()) == set(MEASURES) | GROUPS[group]


def test_without_classes_there_are_no_probes_and_no_space_of_labels() -> None:
    one_class = torch.full((599,), -1)
    one_class[:300] = 3
    for labels in (None, one_class):
        features = set_of(HELD_OUT.tensor(), labels)
        found = compare({"a": topk()}, features, train=TRAIN, groups=["spaces", "probes"])
        more = set(found.measures()) - set(MEASURES)
        assert not more


@pytest.mark.parametrize("sparse", [False, True])
def test_an_sae_with_encode_and_decode_alone_has_all_but_measures_of_its_dictionary(sparse):
    seeds = [Plain(sparse), Plain(sparse)]
    found = compare({"plain": seeds}, HELD_OUT, train=TRAIN, spaces={"itself": HELD_OUT})
    run, full = found.runs["plain"][0], compare({"a": topk()}, HELD_OUT, train=TRAIN).runs["a"][0]
    assert set(full) - set(run) == {"redundancy", "r2/2", "r2/4"}
    for name in set(full) & set(run):
        assert run[name] == pytest.approx(full[name], abs=2e-3), name
    matched = quick({"first": topk(k=2), "plain": Plain(sparse)}, match="l0")
    assert matched.runs["plain"][0]["l0"] == pytest.approx(2.0, rel=0.1)


def test_progress_is_shown_when_asked_for(capsys) -> None:
    quick({"mine": topk()}, progress=True)
    assert "mine: 100%" in capsys.readouterr().err
    quick({"mine": topk()})
    assert capsys.readouterr().err == ""


NARROW = set_of(torch.rand(20, 3), None, list(map(str, range(20))))
WRONG = [
    ({"saes": {}}, ValueError, "saes: expected at least one SAE of each name"),
    ({"saes": {"a": []}}, ValueError, "saes: expected at least one SAE of each name"),
    ({"saes": topk()}, TypeError, "saes: expected SAEs by name, got TopKSAE"),
    ({"saes": [topk()]}, TypeError, "saes: expected SAEs by name, got list"),
    ({"saes": {1: topk()}}, TypeError, "saes: expected SAEs by name"),
    ({"saes": {"PCA": topk()}}, ValueError, "saes: 'PCA' is the name of a baseline"),
    ({"saes": {"a": "b"}}, TypeError, "sae: expected an SAE with encode and decode, got str"),
    ({"saes": {"a": load_pretrained("digits")}}, TypeError, r"sae: expected .*; pass its \.sae"),
    ({"features": HELD_OUT.tensor()}, TypeError, "features: expected a FeatureSet, got Tensor"),
    ({"features": NARROW, "train": NARROW}, ValueError, r"features: expected \(N, 64\) for this"),
    ({"train": TRAIN.tensor()}, TypeError, "train: expected a FeatureSet, got Tensor"),
    ({"train": NARROW}, ValueError, "train: expected width 64 as features, got 3"),
    ({"spaces": HELD_OUT}, TypeError, "spaces: expected feature sets by name, got FeatureSet"),
    ({"spaces": {"a": torch.rand(599, 3)}}, TypeError, "spaces: 'a': expected a FeatureSet, got"),
    ({"spaces": {1: HELD_OUT}}, TypeError, "spaces: expected feature sets by name"),
    ({"spaces": {"labels": HELD_OUT}}, ValueError, "spaces: 'labels' is the space of the labels"),
    ({"spaces": {"a": NARROW}}, ValueError, "spaces: 'a': .*no image in common"),
    ({"spaces": {"a": TRAIN}}, ValueError, "spaces: 'a': .*of the same images"),
    ({"baselines": "PCA"}, TypeError, "baselines: expected a list, got str"),
    ({"baselines": ["NMF"]}, ValueError, "baselines: expected one of .*got 'NMF'"),
    ({"baselines": None}, TypeError, "baselines: expected a list, got NoneType"),
    ({"baselines": np.array(["PCA", "NMF"])}, ValueError, "baselines: expected one of .*got 'NMF'"),
    ({"match": "r2"}, ValueError, r"match: expected one of \['l0'\], got 'r2'"),
    ({"groups": ["all"]}, ValueError, "groups: expected one of .*got 'all'"),
    ({"groups": "probes"}, TypeError, "groups: expected a list, got str"),
    ({"progress": 1}, TypeError, "progress: expected True or False, got 1"),
]


@pytest.mark.parametrize(("arguments", "kind", "said"), WRONG)
def test_wrong_arguments_are_named(arguments, kind, said) -> None:
    right = {"saes": {"a": topk()}, "features": HELD_OUT, "train": TRAIN, "groups": ()}
    with pytest.raises(kind, match=f"^{said}"):
        compare(**{**right, **arguments})


def test_what_cannot_be_made_or_matched_is_blamed_on_the_argument_that_asked_for_it() -> None:
    few = set_of(HELD_OUT.tensor()[:20], HELD_OUT.labels[:20])
    with pytest.raises(ValueError, match=r"^baselines: 'data points': features: expected at le"):
        quick({"a": topk()}, train=few, baselines=["data points"])
    with pytest.raises(ValueError, match=r"^match: 'plain': l0: expected at most 3\.998"):
        quick({"a": topk(k=8), "plain": Plain()}, match="l0")
    dead = TopKSAE(TopKSAEConfig(d_in=64, d_sae=24, k=4))
    with torch.no_grad():
        dead.b_enc.fill_(-1e3)
    with pytest.raises(ValueError, match=r"^match: .*l0: expected a number above 0, got 0\.0"):
        quick({"a": dead}, match="l0")


def test_saes_that_are_all_dead_have_a_table(tmp_path: Path) -> None:
    dead = TopKSAE(TopKSAEConfig(d_in=64, d_sae=24, k=4))
    with torch.no_grad():
        dead.b_enc.fill_(-1e3)
    found = compare({"dead": [dead, dead]}, HELD_OUT, train=TRAIN, baselines=["PCA"])
    row = found.to_frame().loc["dead"]
    assert row["dead_latents"] == 24
    assert row[["monoscore_defined", "redundancy", "stability", "adjusted/labels"]].isna().all()
    assert found.runs["PCA"][0]["l0"] == 1.0
    assert "NaN" not in found.save(tmp_path / "a.json").read_text()
    assert len(found.cells()) == len(found.measures())

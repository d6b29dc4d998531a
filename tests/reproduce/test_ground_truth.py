"""The experiment on SAELens's synthetic models, at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens.synthetic import feature_uniqueness, mean_correlation_coefficient

from monoloss_plugin import MonoLoss
from monoloss_plugin.reproduce import ground_truth
from monoloss_plugin.reproduce.experiment import Found, Setting
from monoloss_plugin.reproduce.ground_truth import GROUND_TRUTH, Sizes, Source, Training
from monoloss_plugin.reproduce.saes import ShuffledMonoLoss

TINY = Sizes(24, 16, 0.05, batch_size=64, steps=20, learning_rate=3e-3, held_out=500)
WIDER = Sizes(128, 64, 0.01, batch_size=256, steps=1, learning_rate=3e-3, held_out=2000)


@pytest.fixture(scope="module")
def source() -> Source:
    return ground_truth.make_source("independent", TINY, 0, "cpu")


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("out"), seeds=(0,))


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_truth, "MODELS", ("hierarchical",))
        yield


@pytest.fixture(scope="module")
def found(setting) -> Found:
    return ground_truth.measure(setting, TINY)


@pytest.mark.parametrize("model", ["independent", "correlated", "hierarchical"])
def test_the_true_dictionary_is_found_and_random_weights_find_little(model) -> None:
    source = ground_truth.make_source(model, WIDER, 0, "cpu")
    true, random = (
        ground_truth.measure_recovery(lambda make=make: make(source), source, WIDER)["recovery"]
        for make in (ground_truth.true_dictionary, ground_truth.untrained)
    )
    assert true["mcc"] == pytest.approx(1)
    assert true["uniqueness"] == 1
    assert random["mcc"] < 0.5
    assert random["classification"]["f1_score"] < 0.2 < true["classification"]["f1_score"]


def test_the_numbers_are_saelens_s_own(source) -> None:
    sae = ground_truth.train(source, "batchtopk", Training(), TINY)
    recovery = ground_truth.measure_recovery(lambda: sae, source, TINY)["recovery"]
    dictionaries = sae.W_dec.detach(), source.model.feature_dict.feature_vectors.detach()
    assert recovery["mcc"] == mean_correlation_coefficient(*dictionaries)
    assert recovery["uniqueness"] == feature_uniqueness(*dictionaries)
    assert round(recovery["true_l0"]) == source.k


def test_children_are_active_only_with_their_parent() -> None:
    model = ground_truth.make_source("hierarchical", TINY, 0, "cpu").model
    _, features = model.sample_with_features(2000)
    assert model.hierarchy is not None
    parents = [node for node in model.hierarchy.roots if node.children]
    assert len(parents) == TINY.num_features // 4
    for parent in parents:
        absent = features[:, parent.feature_index] == 0
        for child in parent.children:
            assert features[:, child.feature_index].any()
            assert not features[absent, child.feature_index].any()


def test_runs_of_a_seed_differ_by_the_term_alone(source) -> None:
    def decoder(training: Training) -> torch.Tensor:
        return ground_truth.train(source, "topk", training, TINY).W_dec

    plain = decoder(Training())
    assert torch.equal(decoder(Training(MonoLoss(0.0, lam_units="nmse"))), plain)
    strong = MonoLoss(1.0, lam_units="nmse")
    unlike = [plain, decoder(Training(strong)), decoder(Training(ShuffledMonoLoss(**vars(strong))))]
    unlike.append(decoder(Training(from_data=True)))
    for i, one in enumerate(unlike):
        assert not any(torch.equal(one, other) for other in unlike[:i])


def test_every_recipe_is_measured_once_for_each_seed(found) -> None:
    runs = found["runs"]["hierarchical"]
    assert set(runs["batchtopk"]) == set(ground_truth.trainings("batchtopk"))
    assert {"OffSupportL1 0.01", "L1L2Ratio 0.01"} <= set(runs["topk"]) - set(runs["batchtopk"])
    assert all(len(of) == 1 for group in runs.values() for of in group.values())
    assert all(run["recovery"]["sae_l0"] < 24 for of in runs["topk"].values() for run in of)


def test_a_second_measurement_reads_the_runs_of_the_first(found, setting, monkeypatch) -> None:
    monkeypatch.setattr(ground_truth, "measure_recovery", lambda *_: pytest.fail("again"))
    assert ground_truth.measure(setting, TINY) == found


def test_other_sizes_are_other_runs(found, setting, monkeypatch) -> None:
    monkeypatch.setattr(ground_truth, "measure_recovery", lambda *_: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        ground_truth.measure(setting, WIDER)


def test_tables_and_figure_come_from_json_alone(found) -> None:
    read = json.loads(json.dumps(found))
    by_model, correlations = GROUND_TRUTH.tables(read)
    rows = {tuple(row[:2]): row for row in by_model.rows}
    assert rows["no training", "true features"][2] == "1.000"
    plain, mono = rows["TopK", "plain"], rows["TopK", "MonoLoss 1.0"]
    assert plain[3] == ""
    assert float(mono[3]) == pytest.approx(float(mono[2]) - float(plain[2]), abs=1.1e-3)
    assert all(len(row) == len(by_model.header) for row in by_model.rows)
    assert [row[1] for row in correlations.rows] == ["all", "BatchTopK", "TopK", "without MonoLoss"]
    assert GROUND_TRUTH.draw is not None
    _, labels = GROUND_TRUTH.draw(read).get_legend_handles_labels()
    assert labels == ["hierarchical, BatchTopK", "hierarchical, TopK"]


def test_rank_correlations_are_of_measures_with_the_mcc() -> None:
    def run(mcc: float, monoscore: float | None, r2: float) -> ground_truth.Run:
        return {"recovery": {"mcc": mcc}, "summary": {"monoscore_adjusted": monoscore, "r2": r2}}

    runs = {
        "batchtopk": {"plain": [run(0.5, 0.3, 0.1)], "MonoLoss 0.1": [run(0.6, 0.2, 0.2)]},
        "topk": {"plain": [run(0.7, 0.1, 0.3), run(0.8, None, 0.2)]},
    }
    of = ground_truth.rank_correlations(runs)
    assert of["all"]["monoscore_adjusted"] == pytest.approx(-1)
    assert of["all"]["saes"] == 4
    assert of["BatchTopK"]["r2"] == pytest.approx(1)
    assert of["TopK"]["monoscore_adjusted"] is None
    assert of["without MonoLoss"]["saes"] == 3


def test_it_runs_on_nothing_but_a_folder(tmp_path: Path) -> None:
    assert not GROUND_TRUTH.needs
    assert not Setting(tmp_path).features

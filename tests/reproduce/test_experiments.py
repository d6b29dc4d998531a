"""Each experiment: it measures once, its tables come from its JSON, and a stop loses no run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from sae_lens import SAE

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet, open_source
from monoloss_plugin.features.digits import digit_images
from monoloss_plugin.hub import list_pretrained
from monoloss_plugin.losses import MonoLoss, StepTensors
from monoloss_plugin.reproduce import (
    EXPERIMENTS,
    Features,
    collection,
    experiment,
    figure4,
    hard_budget,
    referee,
    reproduce,
    saes,
)
from monoloss_plugin.saes.selection import with_l0

SAE_EXPERIMENTS = ("figure4", "table1", "hard-budget", "referee", "collection")


@pytest.fixture(scope="module", params=SAE_EXPERIMENTS)
def done(request, setting):
    return request.param, reproduce(request.param, EXPERIMENTS[request.param], setting)


def test_its_files_hold_everything_that_its_tables_and_figure_show(done, setting) -> None:
    name, reproduction = done
    written = json.loads((setting.out / f"{name}.json").read_text())
    assert EXPERIMENTS[name].tables(written) == reproduction.tables
    assert written["features"]["digits"]["train"]["rows"] == 1198
    assert ("figure" in reproduction.files) == (EXPERIMENTS[name].draw is not None)
    if "figure" in reproduction.files:
        assert reproduction.files["figure"].stat().st_size > 5000


def test_every_table_has_a_number_for_each_column(done) -> None:
    for table in done[1].tables:
        assert table.rows, table.title
        for row in table.rows:
            assert len(row) == len(table.header), table.title
            cells = row[2:]
            assert all(one == "never" or re.search(r"\d", one) for one in cells), table.title


def test_a_second_run_trains_and_measures_nothing(done, setting, monkeypatch) -> None:
    name, first = done
    work = {"train", "compare", "evaluate", "make_baseline", "k_robustness", "write_sae"}
    for place in (saes, figure4, hard_budget, referee, collection):
        for part in work & vars(place).keys():
            monkeypatch.setattr(place, part, lambda *_, **__: pytest.fail("it measured again"))
    assert reproduce(name, EXPERIMENTS[name], setting).found == first.found


def test_experiments_share_their_saes(setting) -> None:
    folders = [path.parent for path in (setting.out / "saes" / "digits").rglob("cfg.json")]
    topk = [path for path in folders if "topk-64-k8" in path.parts and "batchtopk" not in str(path)]
    # plain, MonoLoss and recommended of figure 4; five others of hard-budget; two seeds each
    assert len(topk) == 2 * (3 + 5)


def test_the_numbers_are_those_of_evaluate(setting) -> None:
    found = json.loads((setting.out / "figure4.json").read_text())
    features = setting.features["digits"]
    sae = SAE.load_from_disk(setting.out / "saes/digits/batchtopk-64-k8/MonoLoss/seed-1")
    own = evaluate(sae, features.held_out).summary()
    matched = evaluate(with_l0(sae, features.train, 8), features.held_out).summary()
    for how, expected in (("as they are", own), ("at k", matched)):
        run = found["encoders"]["digits"]["batchtopk"][how]["MonoLoss"][1]
        assert {name: run[name] for name in expected} == pytest.approx(expected)


def test_the_control_compares_each_sample_by_another_s_embedding() -> None:
    latents, embeddings = torch.rand(6, 4), torch.randn(6, 3)
    term = saes.ShuffledMonoLoss(lam=1.0)
    found = term.compute_loss(StepTensors(latents, embeddings)).value
    moved = embeddings[[5, 0, 1, 2, 3, 4]]
    assert found == MonoLoss(lam=1.0).compute_loss(StepTensors(latents, moved)).value
    assert found != MonoLoss(lam=1.0).compute_loss(StepTensors(latents, embeddings)).value


def test_the_recipes_differ_only_in_what_their_names_say(setting) -> None:
    made = saes.recipes(setting, setting.features["digits"], "topk", k=4)
    plain = made.pop("plain")
    assert (plain.k, plain.terms) == (4, ())
    unrewarded = made.pop("recommended without MonoLoss")
    assert unrewarded == replace(plain, from_data=True, refit=True)
    for name, recipe in made.items():
        assert recipe.terms, name
        assert replace(recipe, terms=()) == (unrewarded if name == "recommended" else plain), name
    assert made["L1L2Ratio, all units"].terms[0].units == "all"
    assert made["L1L2Ratio"].terms[0].units == "batch_active"


def test_the_full_scale_is_the_paper_s(setting) -> None:
    full = replace(setting, full=True)
    recipe = saes.recipes(full, full.features["digits"], "jumprelu")["MonoLoss"]
    assert (recipe.num_latents, recipe.batch_size, recipe.epochs) == (8192, 2048, 50)
    assert (recipe.learning_rate, recipe.k) == (1e-4, 64)
    assert recipe.terms[0].lam == pytest.approx(5e-4 * 768 / 64)


def test_a_measure_at_one_r2_lies_between_its_neighbours() -> None:
    curve = [{"r2": 0.2, "l0": 8.0}, {"r2": 0.4, "l0": 16.0}, {"r2": 0.5, "l0": 32.0}]
    assert referee.at_r2(curve, 0.3, "l0") == pytest.approx(12.0)
    assert referee.at_r2(curve, 0.5, "l0") == pytest.approx(32.0)
    assert referee.at_r2(curve, 0.6, "l0") is None
    assert referee.at_r2(curve, 0.1, "l0") is None


def test_latents_that_are_active_together_are_alike(setting) -> None:
    class Copies:
        """Every latent twice."""

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :8].relu().repeat(1, 2)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    class Apart(Copies):
        """Each sample activates one latent."""

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x[:, :8].argmax(1), 8).float()

    features = setting.features["digits"]
    assert referee._share_alike(Copies(), features) == 1.0
    assert referee._share_alike(Apart(), features) == 0.0


def test_the_collection_can_be_read_before_it_is_published(setting) -> None:
    reproduce("collection", EXPERIMENTS["collection"], setting)
    models, datasets = (setting.out / "collection" / kind for kind in ("models", "datasets"))
    ids = [one.sae_id for one in list_pretrained(models)]
    assert len(ids) == 2 * 3 * 3  # encoders, k, recipes
    loaded = load_pretrained(models, "other/monoloss-k8")
    held_out = load_features(datasets, "held_out", config="other")
    assert evaluate(loaded.sae, held_out).summary() == pytest.approx(loaded.record.metrics)
    assert set(loaded.record.controls) == {"random directions", "data points", "PCA"}
    assert loaded.record.baseline == load_pretrained(models, "other/plain-k8").record.metrics
    assert not list(models.rglob("report.html"))  # no images were given


def test_with_images_the_collection_has_a_page_of_them(setting, tmp_path) -> None:
    features = setting.features["digits"].held_out
    pixels = (digit_images(features) * 255).byte().numpy()
    rows = Dataset.from_dict(
        {
            "image": [Image.fromarray(one) for one in pixels],
            "image_id": features.dataset["image_id"][:],
        }
    )
    only = {"digits": setting.features["digits"]}
    images = {"held_out": open_source(rows)}
    given = replace(setting, out=tmp_path, features=only, images=images, seeds=(0,))
    reproduce("collection", EXPERIMENTS["collection"], given)
    (page,) = (tmp_path / "collection").rglob("report.html")
    assert page.parent.relative_to(tmp_path).parts[-2:] == ("digits", "recommended-k8")


def test_other_features_in_the_same_folder_are_refused(setting) -> None:
    digits, other = setting.features.values()
    for features in ({"digits": other}, {"digits": Features(other.train, digits.held_out)}):
        with pytest.raises(ValueError, match="holds runs of another features"):
            reproduce("table1", EXPERIMENTS["table1"], replace(setting, features=features))
    with pytest.raises(ValueError, match="holds runs of another scale"):
        reproduce("table1", EXPERIMENTS["table1"], replace(setting, full=True))


def test_more_seeds_and_encoders_in_the_same_folder_are_measured(setting, tmp_path) -> None:
    name, digits = "digits", setting.features["digits"]
    first = replace(setting, out=tmp_path, features={name: digits}, seeds=(0,))
    reproduce("table1", EXPERIMENTS["table1"], first)
    second = replace(setting, out=tmp_path, seeds=(0, 1))
    found = reproduce("figure4", EXPERIMENTS["figure4"], second).found["encoders"][name]
    runs = found["batchtopk"]["at k"]["plain"]
    assert len(runs) == 2
    assert all("adjusted/other" in run for run in runs)


def test_features_that_are_held_out_from_themselves_are_refused(setting, tmp_path) -> None:
    train = setting.features["digits"].train
    given = replace(setting, out=tmp_path, features={"digits": Features(train, train)})
    with pytest.raises(ValueError, match="held-out features are the training features"):
        reproduce("table1", EXPERIMENTS["table1"], given)


def test_a_name_that_cannot_be_a_folder_is_refused_at_once(setting) -> None:
    with pytest.raises(ValueError, match="expected a name of letters"):
        replace(setting, features={"my features": setting.features["digits"]})


@pytest.mark.parametrize("name", ["figure4", "hard-budget", "referee", "collection"])
def test_features_without_labels_have_no_purity(setting, tmp_path, name) -> None:
    def without(features: FeatureSet) -> FeatureSet:
        ids = features.dataset["image_id"][:]
        return FeatureSet.from_tensors(features.tensor().float(), ids=ids)

    features = {"digits": Features(*map(without, setting.features["digits"]))}
    given = replace(setting, out=tmp_path, features=features, seeds=(0,))
    tables = reproduce(name, EXPERIMENTS[name], given).tables
    assert not any("purity" in column for table in tables for column in table.header)
    with pytest.raises(ValueError, match="table1: needs labels"):
        reproduce("table1", EXPERIMENTS["table1"], given)


def test_an_sae_that_was_deleted_is_written_again(setting) -> None:
    reproduce("collection", EXPERIMENTS["collection"], setting)
    folder = setting.out / "collection" / "models" / "digits" / "plain-k8"
    record = (folder / "monoloss.json").read_text()
    shutil.rmtree(folder)
    reproduce("collection", EXPERIMENTS["collection"], setting)
    assert (folder / "monoloss.json").read_text() == record


def test_spread() -> None:
    assert experiment.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert experiment.spread([0.25]) == "0.250"
    assert experiment.spread([0.25, None]) == ""
    assert experiment.spread([]) == ""


@pytest.mark.parametrize("name", SAE_EXPERIMENTS)
def test_an_experiment_without_features_says_what_it_needs(name, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{name}: needs features"):
        reproduce(name, EXPERIMENTS[name], experiment.Setting(tmp_path))

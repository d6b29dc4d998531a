"""What an evaluation says of latents and of the whole, on disk and in a notebook."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig

from monoloss_plugin import MonoLoss, load_features, load_pretrained
from monoloss_plugin.batch import Batch
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.results import MEASURES, Evaluation
from tests.adapters.conftest import BATCH, make_trainer

OF_ALL = ["score", "adjusted", "z", "p", "significant", "support", "frequency", "largest"]
OF_LABELLED = ["purity", "purity_adjusted", "class"]
NAMES = ["<b>cats</b>", "dogs & wolves", "birds"]


class Tied:
    """Latents are the features above zero; the last one is dead."""

    def encode(self, x):
        return torch.cat((x.relu(), torch.zeros(len(x), 1)), 1)

    def decode(self, latents):
        return latents[:, :-1]


@pytest.fixture(scope="module")
def animals() -> FeatureSet:
    """Ninety samples; the sixth latent is active on one alone."""
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    x[:, 5] = -1.0
    x[4, 5] = 2.5
    record = {"encoder": {"name": "<i>some</i> ViT"}}
    return FeatureSet.from_tensors(x, torch.arange(90) % 3, classes=NAMES, record=record)


@pytest.fixture(scope="module")
def found(animals: FeatureSet) -> Evaluation:
    return evaluate(Tied(), animals, normalize=False)


def test_the_table_of_latents_holds_each_measure_and_nan_where_it_is_not_defined(animals, found):
    table, a = found.latents(), Tied().encode(animals.tensor())
    assert list(table.columns) == OF_ALL + OF_LABELLED
    assert table.index.tolist() == list(range(7))
    assert table.index.name == "latent"
    assert [table[name].dtype.kind for name in OF_ALL] == list("ffffbiff")
    assert table["support"].tolist() == (a > 0).sum(0).tolist()
    np.testing.assert_allclose(table["frequency"], (a > 0).double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["largest"], a.amax(0))
    for name in ("score", "adjusted", "z", "p"):
        assert table[name].isna().tolist() == [False] * 5 + [True, True], name
    assert table["purity"].isna().tolist() == [False] * 6 + [True]
    assert table["purity_adjusted"].isna().tolist() == [False] * 5 + [True, True]
    np.testing.assert_array_equal(table["score"][:5], found.monoscore.scores[:5])


def test_classes_are_shown_by_name_or_else_by_number(animals, found) -> None:
    a = Tied().encode(animals.tensor())
    counts = torch.stack([(a[animals.labels == label] > 0).sum(0) for label in range(3)])
    expected = [NAMES[label] for label in counts.argmax(0)[:6]]
    assert expected[5] == NAMES[1]  # of row 4
    assert found.latents()["class"].tolist() == [*expected, ""]
    numbered = evaluate(Tied(), animals.tensor(), animals.labels).latents()["class"].tolist()
    assert numbered == [*(str(NAMES.index(name)) for name in expected), ""]


def test_without_labels_there_are_no_columns_of_purity(animals) -> None:
    found = evaluate(Tied(), animals.tensor())
    assert list(found.latents().columns) == OF_ALL
    assert not [name for name in found.to_frame().index if "purity" in name]


def test_the_table_of_the_whole_is_the_summary_under_names_for_people(found) -> None:
    table = found.to_frame()
    assert table.index.name == "measure"
    assert list(found.summary()) == list(MEASURES)
    assert table["value"].to_dict() == pytest.approx(
        {MEASURES[name]: value for name, value in found.summary().items()}
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_saved_comes_back(animals, labelled: bool, tmp_path: Path) -> None:
    data = animals if labelled else animals.tensor()
    found = evaluate(Tied(), data, normalize=False)
    place = found.save(str(tmp_path / "new" / "folder"))
    assert place == tmp_path / "new" / "folder"
    loaded = Evaluation.load(place)
    for name, value in found.monoscore.tensors().items():
        assert torch.equal(loaded.monoscore.tensors()[name], value) or name == "p_values"
    torch.testing.assert_close(
        loaded.monoscore.p_values, found.monoscore.p_values, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(loaded.purity, found.purity, rtol=0, atol=0, equal_nan=True)
    assert (loaded.purity is not None) == labelled
    assert loaded.summary() == pytest.approx(found.summary(), rel=0, abs=0, nan_ok=True)
    assert loaded.spaces == found.spaces
    assert loaded.classes == (NAMES if labelled else None)
    assert loaded.latents().equals(found.latents())
    content = json.loads((place / "evaluation.json").read_text())
    assert content["summary"]["r2"] == found.r2


def test_the_json_is_json_also_where_a_measure_is_nan(tmp_path: Path) -> None:
    nothing = evaluate(Tied(), -torch.rand(5, 6) - 1, torch.arange(5) % 2)
    assert math.isnan(nothing.summary()["monoscore_defined"])
    place = nothing.save(tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((place / "evaluation.json").read_text(), parse_constant=refuse)
    assert content["summary"]["monoscore_defined"] is None
    assert math.isnan(Evaluation.load(place).summary()["monoscore_defined"])


def test_missing_files_are_named(found, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: no such folder: .*nowhere"):
        Evaluation.load(tmp_path / "nowhere")
    for name in ("latents.safetensors", "evaluation.json"):
        found.save(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"folder: no such file: .*{name}"):
            Evaluation.load(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"folder: .*is a file"):
        Evaluation.load(tmp_path / "latents.safetensors")
    for folder in (3, None):
        with pytest.raises(TypeError, match="folder: expected a folder, got"):
            found.save(folder)
        with pytest.raises(TypeError, match="folder: expected a folder, got"):
            Evaluation.load(folder)


DAMAGES = {
    "cut tensors": ("latents.safetensors", lambda old: old[: len(old) // 2]),
    "no tensors": ("latents.safetensors", lambda old: b""),
    "cut JSON": ("evaluation.json", lambda old: old[: len(old) // 2]),
    "bytes": ("evaluation.json", lambda old: b"\xff\xfe" + old),
    "a list": ("evaluation.json", lambda old: b"[]"),
    "no spaces": ("evaluation.json", lambda old: old.replace(b'"spaces"', b'"spices"')),
    "other spaces": ("evaluation.json", lambda old: old.replace(b'"scored"', b'"scores"')),
    "other latents": ("latents.safetensors", lambda old: old.replace(b"support", b"suppose")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_an_error_that_names_the_folder(found, damage: str, tmp_path: Path):
    name, change = DAMAGES[damage]
    place = found.save(tmp_path / "saved") / name
    assert Evaluation.load(tmp_path / "saved").r2 == found.r2
    before = place.read_bytes()
    place.write_bytes(change(before))
    assert place.read_bytes() != before
    with pytest.raises(ValueError, match=r"saved: not what Evaluation\.save writes"):
        Evaluation.load(tmp_path / "saved")


def test_the_repr_is_one_line_with_the_scores(found) -> None:
    assert "\n" not in repr(found)
    assert repr(found).startswith("Evaluation(7 latents, r2=")
    assert f"chance={found.monoscore.chance:.4g}" in repr(found)
    assert repr(found).endswith("dead_latents=1)")


def test_a_notebook_shows_names_as_text(found) -> None:
    shown = found._repr_html_()
    for raw in ("<b>", "<i>", "dogs & wolves"):
        assert raw not in shown
    for text in ("&lt;b&gt;cats", "&lt;i&gt;some", "7 latents on 90 samples", MEASURES["r2"]):
        assert text in shown
    best = found.latents()["adjusted"].idxmax()
    assert f"<th>{best}</th>" in shown


def test_without_pandas_a_notebook_shows_the_repr_and_tables_say_what_to_install(
    found, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert found._repr_html_() is None
    for table in (found.latents, found.to_frame):
        with pytest.raises(
            ModuleNotFoundError, match="needs pandas, which is not installed: pip install"
        ):
            table()


def test_every_evaluation_says_what_samples_were_compared_by(animals) -> None:
    x, other = (
        animals.tensor(),
        FeatureSet.from_tensors(torch.rand(90, 3), record={"encoder": {"name": "another ViT"}}),
    )
    own = "features of <i>some</i> ViT"
    cases = {
        "the features": evaluate(Tied(), x),
        "other embeddings": evaluate(Tied(), x, embeddings=torch.rand(90, 3)),
        own: evaluate(Tied(), animals),
        f"{own} ": evaluate(Tied(), FeatureBatches(animals, batch_size=30)),
        "features of another ViT": evaluate(
            Tied(), FeatureBatches(animals, embeddings=[other], batch_size=30)
        ),
        "embeddings of the batches": evaluate(Tied(), [Batch(x)]),
    }
    for expected, evaluation in cases.items():
        assert evaluation.spaces.scored == expected.strip()
        assert evaluation.spaces.trained == ""
        assert str(evaluation.spaces) == f"samples are compared by {expected.strip()}"


@pytest.mark.parametrize("of", ["the inputs", "a callable", "a feature set"])
def test_an_sae_says_what_monoloss_compared_by_in_training(of: str, tmp_path: Path) -> None:
    train, held_out = load_features("digits", "train"), load_features("digits", "held_out")
    other = FeatureSet(train.dataset, train.record)
    other.record.encoder["name"] = "another ViT"
    sets = [other] if of == "a feature set" else []
    batches = FeatureBatches(train, embeddings=sets, batch_size=BATCH)
    embeddings = {"the inputs": None, "a callable": torch.sin}.get(of, batches.embeddings_of)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=64, d_sae=32, k=4))
    trainer = make_trainer(sae, batches.tensors(), steps=3)
    trainer.add_loss(MonoLoss(lam=0.01), embeddings=embeddings)
    trainer.fit()
    sae.save_inference_model(str(tmp_path))
    loaded = SAE.load_from_disk(str(tmp_path))
    expected = {"the inputs": "the SAE's inputs", "a callable": "other embeddings"}.get(
        of, "features of another ViT"
    )
    terms = loaded.cfg.metadata.monoloss["terms"]
    assert [term["compared_by"] for term in terms.values()] == [expected]
    spaces = evaluate(loaded, held_out, normalize=True).spaces
    assert spaces.trained == expected
    assert spaces.scored == held_out.compared_by
    assert str(spaces).endswith(f"; MonoLoss was trained on {expected}")


def test_an_sae_that_says_nothing_of_its_training_has_no_space_of_training() -> None:
    sae = load_pretrained("digits").sae
    for record in ({}, {"terms": []}, {"terms": {"some": 3}}, {"terms": {"some": {"lam": 1}}}):
        sae.cfg.metadata.monoloss = record
        assert evaluate(sae, torch.rand(8, 64)).spaces.trained == ""

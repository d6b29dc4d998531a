"""Features that were made elsewhere: arrays, files and datasets become feature sets."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import normalize

import monoloss_plugin.adapters.sae_lens  # noqa: F401
from monoloss_plugin import MonoLoss, load_features
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches, FeatureRecord, FeatureSet
from monoloss_plugin.hub import publish_features
from tests.features.test_batches import sae_trainer
from tests.hub.server import OWNER_TOKEN

DIGITS = load_digits()
X = torch.tensor(DIGITS.data[:600], dtype=torch.float32)
LABELS = torch.tensor(DIGITS.target[:600])
IDS = [f"{i:04d}" for i in range(600)]


def same(found: FeatureSet, *, x: Tensor = X, labels: bool = True, ids: bool = True) -> bool:
    assert torch.equal(found.tensor(), x)
    assert torch.equal(found.labels, LABELS) if labels else found.labels is None
    assert found.ids.to_pylist() == IDS if ids else found.ids is None
    return True


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors_arrays_and_lists_become_a_set(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    assert same(FeatureSet.from_tensors(x, LABELS, IDS), x=x)
    assert same(FeatureSet.from_tensors(x.numpy(), LABELS.numpy(), np.array(IDS)), x=x)
    assert same(FeatureSet.from_tensors(x.T.contiguous().T, LABELS.tolist(), iter(IDS)), x=x)
    assert same(FeatureSet.from_tensors(X.tolist()), labels=False, ids=False)
    rounded = FeatureSet.from_tensors(X.bfloat16(), ids=torch.arange(600))
    assert (rounded.dtype, rounded.ids_of(torch.tensor([7]))) == (torch.float32, ["7"])


def test_floats_are_not_copied() -> None:
    x = X.clone()
    features = FeatureSet.from_tensors(x)
    x[3] = 99
    assert torch.equal(features.take(torch.tensor([3])), x[3:4])


def test_labels_are_numbers_or_names() -> None:
    few = X[:4]
    named = FeatureSet.from_tensors(few, ["dog", "cat", "dog", "emu"])
    assert (named.classes, named.labels.tolist()) == (["cat", "dog", "emu"], [1, 0, 1, 2])
    given = FeatureSet.from_tensors(few, np.array(["b", "a", "b", "b"]), classes=["c", "b", "a"])
    assert (given.classes, given.labels.tolist()) == (["c", "b", "a"], [1, 2, 1, 1])
    numbered = FeatureSet.from_tensors(few, [1, -1, 0, 1], classes=["cat", "dog"])
    assert (numbered.classes, numbered.labels.tolist()) == (["cat", "dog"], [1, -1, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"x": None}, TypeError, "x: expected a tensor, a numpy array or a list"),
        ({"x": LABELS[:, None]}, TypeError, "x: expected a floating-point tensor"),
        ({"x": X[0]}, ValueError, "x: expected at least 2 dimensions"),
        ({"x": X.view(60, 10, 64)}, ValueError, r"grid: 10 patches are no square"),
        ({"x": X.view(6, 10, 10, 64)}, ValueError, r"x: expected \(N, d\), .* or \(N, P, d\)"),
        ({"x": X / 0}, ValueError, "x: contains NaN or infinite values"),
        ({"labels": LABELS[:9]}, ValueError, "labels: expected 600, .* got 9"),
        ({"labels": LABELS.float()}, TypeError, "labels: expected integers"),
        ({"labels": LABELS - 2}, ValueError, "labels: expected a class, or -1 .*, got -2"),
        ({"labels": LABELS, "classes": ["a"]}, ValueError, "label: expected numbers below 1"),
        ({"labels": ["a"] * 600, "classes": ["b"]}, ValueError, "names of the classes, got 'a'"),
        ({"ids": IDS[:9]}, ValueError, "ids: expected 600, one for each row of x, got 9"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], error, said: str) -> None:
    with pytest.raises(error, match=said):
        FeatureSet.from_tensors(**{"x": X, **arguments})


def saved(folder: Path, kind: str) -> tuple[Path, bool, bool]:
    """Save the digits; return the file, and whether it holds labels and ids."""
    path = folder / f"x.{kind.split('-')[0]}"
    if kind == "npy":
        np.save(path, X.numpy())
        return path, False, False
    if kind == "npz":
        np.savez(path, x=X.numpy(), y=LABELS.numpy(), ids=np.array(IDS))
    elif kind == "pt-tensor":
        torch.save(X, path)
        return path, False, False
    elif kind == "pt":
        torch.save({"features": X, "labels": LABELS, "ids": IDS, "notes": "mine"}, path)
    elif kind == "safetensors":
        save_file({"embeddings": X, "labels": LABELS}, path)
        return path, True, False
    else:
        columns = {"embedding": X.tolist(), "label": LABELS.tolist(), "id": IDS}
        Dataset.from_dict(columns).to_parquet(path)
    return path, True, True


KINDS = ["npy", "npz", "pt-tensor", "pt", "safetensors", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_become_a_set(kind: str, tmp_path: Path) -> None:
    path, labels, ids = saved(tmp_path, kind)
    x = X.double() if kind == "parquet" else X
    assert same(FeatureSet.open(path), x=x, labels=labels, ids=ids)
    assert len(FeatureSet.open(str(path))) == 600


def test_a_file_of_one_array_is_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    path, *_ = saved(tmp_path, "npy")
    features = FeatureSet.open(path)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(99).tobytes())
    assert features.tensor()[-1, -1] == 99


def test_datasets_with_other_names_and_lists_become_a_set() -> None:
    columns = {"embeddings": X.tolist(), "labels": [str(DIGITS.target[i]) for i in range(600)]}
    dataset = Dataset.from_dict(columns)
    found = FeatureSet.open(dataset.shuffle(seed=0).sort("labels"))
    assert found.classes == list("0123456789")
    order = LABELS.argsort(stable=True)
    assert torch.equal(found.labels, LABELS[order])
    uneven = Dataset.from_dict({"x": [[1.0, 2.0], [3.0]]})
    with pytest.raises(ValueError, match="features: expected rows of one length, got 1 to 2"):
        FeatureSet.open(uneven)


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch planted",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Planted()], dtype=object)
    np.save("a.npy", objects, allow_pickle=True)
    np.savez("b.npz", features=X.numpy(), ids=objects)
    torch.save({"features": X, "ids": Planted()}, "c.pt")
    Path("d.npy").write_bytes(pickle.dumps(Planted()))
    Path("e.parquet").write_bytes(pickle.dumps(Planted()))
    Path("f.safetensors").write_bytes(pickle.dumps(Planted()))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(
            ValueError, match=rf"^source: .*{path.name} cannot be read: .*unpickled"
        ):
            FeatureSet.open(path)
    assert not Path("planted").exists()


def test_what_is_unclear_is_said_with_what_was_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=X.numpy(), b=LABELS.numpy())
    with pytest.raises(ValueError, match=r"x\.npz, found a \(600, 64\), b \(600,\); pass the"):
        FeatureSet.open(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=X.numpy(), embeddings=X.numpy())
    with pytest.raises(ValueError, match=r"expected one of features, x, .*, found x \(600"):
        FeatureSet.open(tmp_path / "x.npz")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"a file that ends in \.npy, \.npz, .*, got .*x\.csv"):
        FeatureSet.open(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match=r"source: no feature dataset in .*none\.npy"):
        FeatureSet.open(tmp_path / "none.npy")
    with pytest.raises(TypeError, match=r"got Tensor; use FeatureSet\.from_tensors for arrays"):
        FeatureSet.open(X)


def test_such_a_set_goes_the_way_of_any(tmp_path: Path, hub, monkeypatch) -> None:
    """Batches, training with another space by id, scores, and the Hub and back."""
    path, *_ = saved(tmp_path, "npz")
    features = FeatureSet.open(path)
    order = torch.randperm(600)
    record = {"encoder": {"name": "noise"}, "source": {"name": "digits", "split": "train"}}
    other = torch.randn(600, 5)
    second = FeatureSet.from_tensors(other[order], ids=[IDS[i] for i in order], record=record)
    batches = FeatureBatches(features, embeddings=second, batch_size=128)
    batch = next(iter(batches))
    torch.testing.assert_close(batch.features, normalize(X[batch.rows], dim=1))
    torch.testing.assert_close(batch.embeddings, normalize(other[batch.rows], dim=1))
    trainer = sae_trainer(batches.tensors())
    trainer.add_loss(MonoLoss(lam=3e-3), embeddings=batches.embeddings_of)
    sae = trainer.fit()
    found = evaluate(sae, FeatureBatches(features, shuffle="none", drop_last=False))
    assert found.purity is not None
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    publish_features(second, "alice/noise")
    back = load_features("alice/noise", "train", cache_dir=tmp_path)
    assert torch.equal(back.tensor(), second.tensor())
    assert (back.record.encoder, back.record.source) == (record["encoder"], record["source"])
    second.dataset.save_to_disk(tmp_path / "kept")
    assert FeatureSet.open(tmp_path / "kept").record == FeatureRecord.of(record)

"""Patch sets against the tensors that they were made of."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from safetensors.torch import save_file
from torch import Tensor

from monoloss_plugin.batch import Batch
from monoloss_plugin.features import FeatureRecord, FeatureSet
from monoloss_plugin.features.patches import Patches, spans
from monoloss_plugin.finetuning.embeddings import aligned_embeddings
from monoloss_plugin.training.run import split

WIDTH = 5
LABELS = torch.tensor([1, 0, 2, -1, 1, 2, 0])
IDS = [f"image {n}" for n in range(7)]
GRIDS = [(2, 3), (1, 4), (2, 2), (2, 3), (3, 1), (2, 3), (1, 1)]
"""Each image but the third has all patches of its grid, and the first has a class token too."""


def images() -> list[Tensor]:
    """The patches of seven images of different sizes, in order."""
    torch.manual_seed(0)
    sizes = [7, 4, 2, 6, 3, 6, 1]
    return [torch.randn(size, WIDTH).half() for size in sizes]


PLACES = [[-1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [1, 3], [*range(6)], [0, 1, 2], [*range(6)], [0]]


def dataset_of(some: list[int] | None = None) -> Dataset:
    """The images as a dataset that knows nothing of this package."""
    vector = List(Value("float16"), length=WIDTH)
    columns = Features(
        {
            "features": List(vector),
            "places": List(Value("int16")),
            "grid": List(Value("int16"), length=2),
            "pooled": vector,
            "label": Value("int64"),
            "image_id": Value("string"),
        }
    )
    chosen = range(7) if some is None else some
    x = images()
    rows = {
        "features": [x[n].tolist() for n in chosen],
        "places": [PLACES[n] for n in chosen],
        "grid": [list(GRIDS[n]) for n in chosen],
        "pooled": [pooled(n).tolist() for n in chosen],
        "label": [int(LABELS[n]) for n in chosen],
        "image_id": [IDS[n] for n in chosen],
    }
    return Dataset.from_dict(rows, features=columns)


def pooled(number: int) -> Tensor:
    in_grid = [at for at, place in enumerate(PLACES[number]) if place >= 0]
    return images()[number][in_grid].float().mean(0).half()


def in_memory(_: Path) -> Dataset:
    return dataset_of()


def many_files(folder: Path) -> Dataset:
    dataset_of().save_to_disk(folder / "many", num_shards=3)
    return Dataset.load_from_disk(str(folder / "many"))


def sliced(folder: Path) -> Dataset:
    """Pieces that start within their file, and one in memory."""
    whole = many_files(folder)
    parts = [whole.select(range(a, b)) for a, b in ((0, 1), (1, 4), (4, 6))]
    return concatenate_datasets([*parts, dataset_of().select(range(6, 7))])


def shuffled(folder: Path) -> Dataset:
    return many_files(folder).shuffle(seed=0).sort("image_id")


def from_parquet(folder: Path) -> Dataset:
    dataset_of().to_parquet(folder / "x.parquet", batch_size=2)
    return Dataset.from_parquet(str(folder / "x.parquet"), cache_dir=str(folder / "cache"))


FORMS = [in_memory, many_files, sliced, shuffled, from_parquet]


def same(found: FeatureSet, numbers: list[int]) -> bool:
    """Compare everything that a set says with the images of some numbers, in this order."""
    x = [images()[n] for n in numbers]
    counts = torch.tensor([len(one) for one in x])
    image = torch.arange(len(x)).repeat_interleave(counts)
    assert (len(found), found.num_rows, found.num_images) == (len(image), len(image), len(x))
    rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.tensor(), torch.cat(x))
    assert torch.equal(found.take(rows), torch.cat(x)[rows])
    assert torch.equal(found.image_of(rows), image[rows])
    assert torch.equal(found.labels, LABELS[numbers][image])
    assert found.ids_of(rows) == [IDS[numbers[i]] for i in image[rows]]
    assert found.ids.to_pylist() == [IDS[n] for n in numbers]
    patches = found.patches
    assert torch.equal(patches.image_of(rows), image[rows])
    assert patches.places.tolist() == [place for n in numbers for place in PLACES[n]]
    assert patches.grids.tolist() == [list(GRIDS[n]) for n in numbers]
    assert patches.num_images == len(x)
    assert patches.are_whole == (2 not in numbers)
    means = found.images
    assert (means.patches, means.num_images, means.images) == (None, len(x), means)
    assert torch.equal(means.tensor(), torch.stack([pooled(n) for n in numbers]))
    assert torch.equal(means.labels, LABELS[numbers])
    assert means.ids.to_pylist() == [IDS[n] for n in numbers]
    return True


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_rows_are_the_patches_of_the_images_wherever_they_lie(form, tmp_path: Path) -> None:
    features = FeatureSet(form(tmp_path))
    assert same(features, [*range(7)])
    assert same(features.select(torch.tensor([5, 0, 3])), [5, 0, 3])
    assert same(features.select(torch.tensor([5, 0, 3, 2])).select(torch.tensor([3, 1])), [2, 0])
    assert same(pickle.loads(pickle.dumps(features.select(torch.tensor([4])))), [4])
    assert same(FeatureSet.open(features.dataset), [*range(7)])


def test_mapped_patches_are_read_from_the_file_and_not_copied(tmp_path: Path) -> None:
    dataset = many_files(tmp_path)
    features = FeatureSet(dataset)
    some = features.select(torch.tensor([6, 0]))
    assert len(pickle.dumps(some)) < 20_000
    file = Path(dataset.cache_files[0]["filename"])
    wanted = images()[0][3]
    with file.open("r+b") as mapped:
        content = mapped.read()
        mapped.seek(content.index(wanted.numpy().tobytes()))
        mapped.write((wanted + 1).numpy().tobytes())
    assert torch.equal(features.take(torch.tensor([3]))[0], wanted + 1)
    assert torch.equal(some.take(torch.tensor([4]))[0], wanted + 1)


def test_a_batch_says_the_image_the_place_and_the_mean_of_each_patch() -> None:
    features = FeatureSet(dataset_of())
    rows = torch.tensor([0, 9, 22, 1, 28])
    batch = features.batch_of(rows, features.take(rows))
    assert batch.images.tolist() == [0, 1, 5, 0, 6]
    assert batch.places.tolist() == [-1, 2, 0, 0, 0]
    assert batch.places.dtype == torch.int16
    assert batch.labels.tolist() == [1, 0, 2, 1, 0]
    assert torch.equal(batch.embeddings, torch.stack([pooled(n) for n in (0, 1, 5, 0, 6)]).float())
    one = features[9]
    assert (int(one.images), int(one.places), int(one.labels), one.ids) == (1, 2, 0, ["image 1"])
    assert torch.equal(one.embeddings, pooled(1).float())
    assert features.__getitems__([0, 9]).ids == ["image 0", "image 1"]
    plain = features.images.batch_of(torch.tensor([2]), torch.ones(1, WIDTH))
    assert plain.images is plain.places is plain.embeddings is None


@pytest.mark.parametrize(("size", "wanted"), [(9, 4), (1, 7), (13, 3), (99, 1), (11, 3)])
def test_every_row_gives_whole_images(size: int, wanted: int) -> None:
    features = FeatureSet(dataset_of())
    batches: list[Batch] = list(features.every_row(size))
    assert len(batches) == wanted
    assert torch.equal(torch.cat([batch.features for batch in batches]), features.tensor().float())
    assert torch.cat([batch.rows for batch in batches]).tolist() == [*range(len(features))]
    held = [set(batch.images.tolist()) for batch in batches]
    assert sum(len(one) for one in held) == 7
    assert all(len(b.rows) <= size or len(one) == 1 for b, one in zip(batches, held, strict=True))


def test_a_record_is_completed_from_the_patches() -> None:
    features = FeatureSet(dataset_of())
    assert features.record.patches == {"grid": None, "kept": 7, "class_token": True}
    whole = FeatureSet(dataset_of([3, 5]))
    assert whole.record.patches == {"grid": [2, 3], "kept": None, "class_token": False}
    record = FeatureRecord(encoder={"name": "vit", "output": "cls+patches"}, dtype="float16")
    named = FeatureSet(dataset_of(), record)
    assert named.images.record.encoder == {"name": "vit", "output": "mean"}
    assert (named.images.record.patches, named.images.record.dtype) == ({}, "float16")
    assert FeatureRecord.of(named.record.to_dict()) == named.record


def test_sets_of_other_patches_have_other_fingerprints() -> None:
    features = FeatureSet(dataset_of())
    assert features.fingerprint() == FeatureSet(dataset_of()).fingerprint()
    others = [features.images, features.select(torch.arange(6)), features.select(torch.tensor([3]))]
    assert len({one.fingerprint() for one in (features, *others)}) == 4


def test_columns_that_do_not_fit_are_named() -> None:
    dataset = dataset_of()
    with pytest.raises(ValueError, match=r"expected columns places, grid, pooled .* no places"):
        FeatureSet(dataset.remove_columns("places"))
    fewer = [[0]] * 7
    places = dataset.remove_columns("places").add_column(
        "places", fewer, feature=List(Value("int16"))
    )
    with pytest.raises(ValueError, match="places: expected one for each patch"):
        FeatureSet(places)
    narrow = dataset.remove_columns("pooled").add_column(
        "pooled", [[1.0]] * 7, feature=List(Value("float16"), length=1)
    )
    with pytest.raises(ValueError, match="pooled: expected width 5 as features, got 1"):
        FeatureSet(narrow)
    none = dataset.map(lambda row: {"features": [], "places": []} if row["label"] < 0 else row)
    with pytest.raises(ValueError, match="features: expected at least one patch of each image"):
        FeatureSet(none)


X = torch.randn(6, 12, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_patches_become_a_patch_set(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    stored = torch.float32 if dtype == torch.bfloat16 else dtype
    features = FeatureSet.from_tensors(x, ["a", "b"] * 3, range(6), grid=(3, 4))
    assert torch.equal(features.tensor(), x.to(stored).flatten(0, 1))
    means = x.to(stored).double().mean(1)
    torch.testing.assert_close(features.images.tensor(), means.to(stored))
    assert features.patches.grids.tolist() == [[3, 4]] * 6
    assert features.patches.places.tolist() == [*range(12)] * 6
    assert features.patches.are_whole
    assert features.labels.tolist() == ([0] * 12 + [1] * 12) * 3
    assert (features.num_classes, features.classes) == (2, ["a", "b"])
    assert features.record.patches == {"grid": [3, 4], "kept": None, "class_token": False}
    square = FeatureSet.from_tensors(X[:, :9])
    assert square.patches.grids.tolist() == [[3, 3]] * 6


def test_patches_of_tensors_are_not_copied() -> None:
    x = X.clone()
    features = FeatureSet.from_tensors(x, grid=(3, 4))
    x[1, 2] = 99
    assert torch.equal(features.take(torch.tensor([14])), x[1, 2:3])


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, ValueError, r"grid: 12 patches are no square; give their grid"),
        ({"grid": (3, 5)}, ValueError, r"a height and a width of 12 patches, got \(3, 5\)"),
        ({"grid": 12}, TypeError, r"grid: expected \(height, width\), two integers, got 12"),
        ({"grid": (3, 4), "labels": [0]}, ValueError, "labels: expected 6, .* got 1"),
        ({"x": X[0], "grid": (3, 4)}, ValueError, "grid: expected none for one vector"),
    ],
)
def test_patches_that_do_not_fit_are_named(given, error, said: str) -> None:
    with pytest.raises(error, match=said):
        FeatureSet.from_tensors(**{"x": X, **given})


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "safetensors", "parquet"])
def test_files_of_patches_become_a_patch_set(kind: str, tmp_path: Path) -> None:
    x, labels = X[:, :9].contiguous(), torch.tensor([0, 1, 2, 0, 1, 2])
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, x.numpy())
    elif kind == "npz":
        np.savez(path, x=x.numpy(), y=labels.numpy())
    elif kind == "pt":
        torch.save({"features": x, "labels": labels}, path)
    elif kind == "safetensors":
        save_file({"embeddings": x, "labels": labels}, path)
    else:
        Dataset.from_dict({"x": x.double().tolist(), "y": labels.tolist()}).to_parquet(path)
    features = FeatureSet.open(path)
    assert torch.equal(features.tensor().float(), x.flatten(0, 1))
    assert features.patches.grids.tolist() == [[3, 3]] * 6
    assert features.labels is None or torch.equal(features.labels, labels.repeat_interleave(9))
    assert (features.labels is None) == (kind == "npy")


def test_a_table_of_another_library_keeps_its_places_and_grids(tmp_path: Path) -> None:
    """Its lists have no fixed length, and it holds no metadata of datasets."""
    rows = dataset_of().to_dict()
    plain = Dataset.from_dict(rows)
    pq.write_table(plain.data.table.replace_schema_metadata(None), tmp_path / "x.parquet")
    found = FeatureSet.open(tmp_path / "x.parquet")
    assert same(FeatureSet(found.dataset.cast(dataset_of().features)), [*range(7)])
    assert found.images.ids.to_pylist() == IDS


def test_held_out_parts_are_of_whole_images() -> None:
    x = torch.randn(20, 4, 6)
    features = FeatureSet.from_tensors(x, torch.arange(20) % 2, range(20))
    rest, tenth = split(features, seed=0)
    assert (rest.num_images, tenth.num_images, len(tenth)) == (18, 2, 8)
    assert set(rest.ids.to_pylist()).isdisjoint(tenth.ids.to_pylist())
    for part in (rest, tenth):
        numbers = [int(one) for one in part.ids.to_pylist()]
        assert torch.equal(part.tensor(), x[numbers].flatten(0, 1))


def test_patches_of_one_grid() -> None:
    patches = Patches.whole(2, (1, 3))
    assert patches.are_whole
    assert patches.rows_of(torch.tensor([1, 0])).tolist() == [3, 4, 5, 0, 1, 2]
    twice = Patches(patches.starts, torch.tensor([0, 1, 1, 0, 1, 2]), patches.grids)
    beyond = Patches(patches.starts, torch.tensor([0, 1, 3, 0, 1, 2]), patches.grids)
    assert not twice.are_whole
    assert not beyond.are_whole
    assert spans(torch.tensor([4, 0]), torch.tensor([6, 3])).tolist() == [4, 5, 0, 1, 2]


def test_images_are_found_by_id_for_fine_tuning() -> None:
    features = FeatureSet(dataset_of())
    found = aligned_embeddings(features, ["image 4", "image 1"])
    assert torch.equal(found, torch.stack([pooled(4), pooled(1)]).float())

"""Feature sets and batches against plain indexing of the same data in memory."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Sequence,
    Value,
    concatenate_datasets,
    load_dataset,
)
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    SAETrainer,
    StandardSAE,
    StandardSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import monoloss_plugin.adapters.sae_lens  # noqa: F401
from monoloss_plugin import MonoLoss, functional
from monoloss_plugin.batch import Batch
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.features.batches import epoch_order

DIGITS = load_digits()
PIXELS = torch.tensor(DIGITS.data, dtype=torch.float32)


def dataset_of(
    x: Tensor, *, dtype: str = "float32", labels: bool = True, ids: list[str] | None = None
) -> Dataset:
    columns = {"features": Sequence(Value(dtype), length=x.shape[1]), "image_id": Value("string")}
    data = {"features": x.numpy(), "image_id": ids or [f"{i:04d}" for i in range(len(x))]}
    if labels:
        columns["label"] = Value("int64")
        data["label"] = DIGITS.target[: len(x)]
    return Dataset.from_dict(data, features=Features(columns))


@pytest.fixture
def digits() -> FeatureSet:
    return FeatureSet(dataset_of(PIXELS))


def in_memory(_: Path, dtype: str) -> Dataset:
    return dataset_of(PIXELS, dtype=dtype)


def one_file(folder: Path, dtype: str) -> Dataset:
    dataset_of(PIXELS, dtype=dtype).save_to_disk(folder / "one")
    return Dataset.load_from_disk(str(folder / "one"))


def many_files(folder: Path, dtype: str) -> Dataset:
    dataset_of(PIXELS, dtype=dtype).save_to_disk(folder / "many", num_shards=7)
    return Dataset.load_from_disk(str(folder / "many"))


def from_parquet(folder: Path, dtype: str) -> Dataset:
    """As a Hub dataset arrives: one Arrow file of many record batches."""
    dataset_of(PIXELS, dtype=dtype).to_parquet(folder / "x.parquet", batch_size=100)
    data_files = str(folder / "x.parquet")
    return load_dataset("parquet", data_files=data_files, cache_dir=folder / "c", split="train")


def sliced(folder: Path, dtype: str) -> Dataset:
    """Pieces that start within their file, and one in memory."""
    whole = many_files(folder, dtype)
    parts = [whole.select(range(a, b)) for a, b in ((0, 100), (100, 1003), (1003, 1700))]
    return concatenate_datasets([*parts, dataset_of(PIXELS, dtype=dtype).select(range(1700, 1797))])


def shuffled(folder: Path, dtype: str) -> Dataset:
    return one_file(folder, dtype).shuffle(seed=0).sort("image_id")


FORMS = [in_memory, one_file, many_files, from_parquet, sliced, shuffled]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_rows_are_those_of_the_dataset_wherever_they_lie(
    form: Callable[[Path, str], Dataset], dtype: str, tmp_path: Path
) -> None:
    features = FeatureSet(form(tmp_path, dtype))
    expected = PIXELS.to(getattr(torch, dtype))
    rows = torch.randperm(len(PIXELS), generator=torch.Generator().manual_seed(3))
    assert features.dtype == expected.dtype
    assert torch.equal(features.take(rows), expected[rows])
    assert torch.equal(features.take(rows[:1]), expected[rows[:1]])
    assert torch.equal(features.tensor(), expected)
    assert features.ids_of(rows[:3]) == [f"{int(i):04d}" for i in rows[:3]]
    assert torch.equal(features.labels, torch.tensor(DIGITS.target))


def test_mapped_rows_are_read_from_the_file_and_not_copied(tmp_path: Path) -> None:
    """What changes in the file afterwards changes in the rows."""
    dataset = from_parquet(tmp_path, "float16")
    features = FeatureSet(dataset)
    assert dataset.data.column("features").num_chunks > 10
    file = Path(dataset.cache_files[0]["filename"])
    with file.open("r+b") as mapped:
        content = mapped.read()
        row = PIXELS[1000].half().numpy().tobytes()
        mapped.seek(content.index(row))
        mapped.write((PIXELS[1000].half() + 1).numpy().tobytes())
    found = features.take(torch.tensor([1000]))
    assert torch.equal(found[0], PIXELS[1000].half() + 1)


@pytest.mark.parametrize("number", [-1, 1797])
def test_rows_beyond_the_set_are_refused(tmp_path: Path, number: int) -> None:
    """Above all where they would lie between two pieces."""
    with pytest.raises(IndexError, match="of 1797"):
        FeatureSet(many_files(tmp_path, "float32")).take(torch.tensor([5, number]))


def test_a_set_is_a_map_style_dataset(digits: FeatureSet) -> None:
    one = digits[-1]
    assert torch.equal(one.features, PIXELS[-1])
    assert (int(one.labels), one.ids) == (DIGITS.target[-1], ["1796"])
    with pytest.raises(IndexError):
        digits[len(digits)]
    loader = DataLoader(digits, batch_size=500, collate_fn=lambda batch: batch, num_workers=1)
    batches = list(loader)
    assert [len(b.features) for b in batches] == [500, 500, 500, 297]
    assert torch.equal(torch.cat([b.features for b in batches]), PIXELS)
    assert batches[0].ids[:2] == ["0000", "0001"]


def test_a_set_without_any_label_has_no_labels() -> None:
    """As the test split of ImageNet-1K, whose labels are all -1."""
    some = dataset_of(PIXELS[:3])
    none = some.remove_columns("label").add_column("label", [-1, -1, -1])
    assert FeatureSet(none).labels is None
    partly = some.remove_columns("label").add_column("label", [-1, 4, None])
    assert FeatureSet(partly).labels.tolist() == [-1, 4, -1]


def test_a_label_beyond_the_classes_is_refused_before_it_takes_memory() -> None:
    def labelled(kind) -> Dataset:
        labels = dataset_of(PIXELS[:3]).remove_columns("label").add_column("label", [0, -1, 10**7])
        columns = pa.Table.from_batches(labels.data.to_batches())
        named = Features({**labels.features, "label": kind})
        return Dataset(columns.cast(named.arrow_schema))

    named = labelled(ClassLabel(names=["cat", "dog"]))
    with pytest.raises(ValueError, match=r"label: expected numbers below 2, .* got 10000000"):
        FeatureSet(named)
    batches = FeatureBatches(FeatureSet(labelled(Value("int64"))), batch_size=3)
    with pytest.raises(ValueError, match="label: expected classes from 0 to 65535, got 10000000"):
        evaluate(StandardSAE(StandardSAEConfig(d_in=64, d_sae=128)), batches)


def test_an_empty_set_can_be_opened_but_not_batched(digits: FeatureSet) -> None:
    empty = FeatureSet(digits.dataset.select([]))
    assert (len(empty), empty.width) == (0, 64)
    assert empty.tensor().shape == (0, 64)
    with pytest.raises(ValueError, match="got an empty set"):
        FeatureBatches(empty)


def test_a_pickled_set_holds_no_copy_of_its_rows(tmp_path: Path) -> None:
    features = FeatureSet(one_file(tmp_path, "float32"))
    pickled = pickle.dumps(features)
    assert len(pickled) < PIXELS.nbytes / 20
    assert torch.equal(pickle.loads(pickled).tensor(), PIXELS)


@pytest.mark.parametrize("shuffle", ["all", "buffer", "none"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_has_every_row_once(digits: FeatureSet, shuffle, drop_last) -> None:
    batches = FeatureBatches(digits, batch_size=256, shuffle=shuffle, drop_last=drop_last)
    found = list(batches)
    assert len(found) == len(batches) == (7 if drop_last else 8)
    rows = torch.cat([batch.rows for batch in found])
    assert len(rows.unique()) == len(rows) == (7 * 256 if drop_last else len(PIXELS))
    for batch in found:
        torch.testing.assert_close(batch.features, normalize(PIXELS[batch.rows], dim=1))
        assert torch.equal(batch.labels, torch.tensor(DIGITS.target)[batch.rows])
    assert batches.epoch == 1


def rows_of(batches: FeatureBatches) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


def test_epochs_and_seeds_give_different_orders(digits: FeatureSet) -> None:
    orders = []
    for seed in (0, 1):
        batches = FeatureBatches(digits, seed=seed, batch_size=900)
        orders += [rows_of(batches), rows_of(batches)]
    assert len({str(order) for order in orders}) == 4
    again = FeatureBatches(digits, seed=1, batch_size=900)
    again.set_epoch(1)
    assert rows_of(again) == orders[3]


def test_features_as_they_are(digits: FeatureSet) -> None:
    batches = FeatureBatches(digits, batch_size=100, normalize=False)
    batch = next(iter(batches))
    assert torch.equal(batch.features, PIXELS[batch.rows])
    assert torch.equal(batch.embeddings, batch.features)


def test_float16_features_become_unit_vectors_of_float32() -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * 30
    x[7] = 0
    batches = FeatureBatches(
        FeatureSet(dataset_of(x.half().float(), dtype="float16", labels=False)),
        batch_size=300,
        shuffle="none",
    )
    (batch,) = batches
    assert batch.features.dtype == torch.float32
    torch.testing.assert_close(batch.features, normalize(x.half().float(), dim=1))
    assert batch.labels is None


@pytest.mark.parametrize("shuffle", ["all", "buffer"])
@pytest.mark.parametrize("stop", [0, 3, 6, 7, 10])
def test_a_state_resumes_exactly(digits: FeatureSet, shuffle, stop: int) -> None:
    """Before, within, at the end of and after an epoch of 7 batches."""

    def some() -> FeatureBatches:
        return FeatureBatches(digits, batch_size=256, seed=5, shuffle=shuffle, buffer_rows=4096)

    whole = some().tensors()
    expected = [next(whole) for _ in range(stop + 9)]
    begun = some()
    stream = begun.tensors()
    for _ in range(stop):
        next(stream)
    state = pickle.loads(pickle.dumps(begun.state_dict()))
    resumed = some()
    resumed.load_state_dict(state)
    going_on = resumed.tensors()
    for x in expected[stop:]:
        assert torch.equal(next(going_on), x)


def test_every_loop_is_an_epoch_of_its_own(digits: FeatureSet) -> None:
    batches = FeatureBatches(digits, batch_size=256)
    for number, _ in enumerate(batches):
        if number == 2:
            break
    assert batches.state_dict()["batch"] == 3
    assert len(list(batches)) == 7
    stream = batches.tensors()
    first = [next(stream) for _ in range(9)]
    assert len(list(batches)) == 7  # as an evaluation in the middle of training
    following = next(stream)
    state = batches.state_dict()
    assert (state["epoch"], state["batch"]) == (3, 3)
    again = FeatureBatches(digits, batch_size=256)
    again.set_epoch(2)
    expected = again.tensors()
    for x in [*first, following]:
        assert torch.equal(next(expected), x)


def test_a_loop_goes_on_after_a_state_is_loaded(digits: FeatureSet) -> None:
    batches = FeatureBatches(digits, batch_size=256)
    rows = rows_of(batches)
    batches.load_state_dict({**batches.state_dict(), "epoch": 0, "batch": 5})
    assert rows_of(batches) == rows[5:]
    assert len(list(batches)) == 7


def test_a_state_of_other_settings_is_refused(digits: FeatureSet) -> None:
    state = FeatureBatches(digits, batch_size=256, seed=5).state_dict()
    with pytest.raises(ValueError, match="seed was 5 when it was taken, is 6 here"):
        FeatureBatches(digits, batch_size=256, seed=6).load_state_dict(state)
    other = FeatureSet(dataset_of(PIXELS.flip(0)))
    with pytest.raises(ValueError, match="features was "):
        FeatureBatches(other, batch_size=256, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="normalize was True"):
        FeatureBatches(digits, batch_size=256, seed=5, normalize=False).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_rows was 256"):
        FeatureBatches(digits, batch_size=128, seed=5).load_state_dict(state)


def test_processes_share_an_epoch(digits: FeatureSet) -> None:
    shares = [list(FeatureBatches(digits, batch_size=128, shard=(i, 3))) for i in range(3)]
    whole = list(FeatureBatches(digits, batch_size=384))
    assert [len(share) for share in shares] == [len(whole)] * 3
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([p.rows for p in parts]).sort()[0], batch.rows.sort()[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_the_same_wherever_they_are_held(
    digits: FeatureSet, device: str, resident: bool, monkeypatch
) -> None:
    """With torch's device without values in place of a GPU: places, order and threads."""
    in_main_thread = set()
    take = FeatureSet.take

    def noting(self, rows):
        in_main_thread.add(threading.current_thread() is threading.main_thread())
        return take(self, rows)

    expected = list(FeatureBatches(digits, batch_size=256))
    batches = FeatureBatches(digits, batch_size=256, device=device, resident=resident)
    monkeypatch.setattr(FeatureSet, "take", noting)
    found = list(batches)
    assert in_main_thread == (set() if resident else {device == "cpu"})
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert one.features.device.type == one.labels.device.type == device
        if device == "cpu":
            assert torch.equal(one.features, other.features)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_as_the_source_of_a_dataloader(digits: FeatureSet, workers: int) -> None:
    batches = FeatureBatches(digits, batch_size=256, seed=2)
    expected = [batch.rows for batch in FeatureBatches(digits, batch_size=256, seed=2)]
    batches.set_epoch(0)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    found = list(loader)
    assert all(isinstance(batch, Batch) for batch in found)
    assert [b.rows.tolist() for b in found] == [rows.tolist() for rows in expected]


def test_other_encoders_are_matched_by_image_id(digits: FeatureSet) -> None:
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(len(PIXELS), 5, generator=generator)
    order = torch.randperm(len(PIXELS), generator=generator)[:1500]
    ids = [f"{int(i):04d}" for i in order]
    second = FeatureSet(dataset_of(other[order], labels=False, ids=ids))
    batches = FeatureBatches(digits, embeddings=second, batch_size=500)
    assert batches.num_rows == 1500
    found = list(batches)
    assert len(found) == 3
    for batch in found:
        torch.testing.assert_close(batch.features, normalize(PIXELS[batch.rows], dim=1))
        torch.testing.assert_close(batch.embeddings, normalize(other[batch.rows], dim=1))
        assert torch.equal(batch.labels, torch.tensor(DIGITS.target)[batch.rows])


def test_an_ensemble_averages_similarities(digits: FeatureSet) -> None:
    others = [torch.randn(len(PIXELS), d) for d in (5, 9)]
    sets = [FeatureSet(dataset_of(x, labels=False)) for x in others]
    batch = next(iter(FeatureBatches(digits, embeddings=sets, batch_size=64)))
    mean = sum(normalize(x[batch.rows], dim=1) @ normalize(x[batch.rows], dim=1).T for x in others)
    torch.testing.assert_close(batch.embeddings @ batch.embeddings.T, mean / 2)
    assert batch.embeddings.shape == (64, 14)


def test_sets_that_cannot_be_matched_are_refused(digits: FeatureSet) -> None:
    other = FeatureSet(dataset_of(PIXELS[:20], ids=[f"x{i}" for i in range(20)]))
    with pytest.raises(ValueError, match="no image in common"):
        FeatureBatches(digits, embeddings=other)
    twice = FeatureSet(dataset_of(PIXELS[:20], ids=["a"] * 20))
    with pytest.raises(ValueError, match="an id occurs twice"):
        FeatureBatches(digits, embeddings=twice)
    unnamed = FeatureSet(dataset_of(PIXELS[:20]).remove_columns("image_id"))
    with pytest.raises(ValueError, match="without image_id must be equally long, got 1797, 20"):
        FeatureBatches(digits, embeddings=unnamed)


def test_a_buffer_holds_whole_blocks_and_mixes_within_itself() -> None:
    rows, buffer = 100_000, 16_000
    order = epoch_order(rows, "buffer", seed=0, epoch=3, buffer_rows=buffer)
    assert torch.equal(order.sort().values, torch.arange(rows))
    for part in order.split(buffer):
        assert (part.diff() == 1).float().mean() < 0.01
        # All but the first and the last block that it reads are whole.
        assert len((part // 4096).unique()) <= -(-buffer // 4096) + 2


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_a_buffer_is_read_at_once_and_once(tmp_path, shard, monkeypatch) -> None:
    features = FeatureSet(many_files(tmp_path, "float32"))
    asked: list[Tensor] = []
    take = FeatureSet.take
    monkeypatch.setattr(
        FeatureSet, "take", lambda self, rows: asked.append(rows) or take(self, rows)
    )
    batches = FeatureBatches(
        features, batch_size=50, shuffle="buffer", buffer_rows=620, drop_last=False, shard=shard
    )
    rows = [batch.rows for batch in batches]
    # 12 batches of 50 rows are a buffer; with two processes, 6 of 100.
    assert [len(part) for part in asked] == [600 // shard[1]] * 2 + [len(PIXELS[1200:]) // shard[1]]
    # Read in the order of the file, given in the order of the epoch.
    of_buffers = torch.cat(rows).split(600 // shard[1])
    assert [part.tolist() for part in asked] == [part.sort().values.tolist() for part in of_buffers]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 5000}, "batch_size: expected at most 1797 of 1797 images"),
        ({"shuffle": "some"}, "shuffle: "),
        ({"shard": (2, 2)}, "shard: expected"),
        ({"shuffle": "buffer", "resident": True}, "resident: "),
        ({"buffer_rows": 0}, "buffer_rows: "),
    ],
)
def test_arguments_out_of_range_are_named(digits: FeatureSet, arguments, said) -> None:
    with pytest.raises(ValueError, match=said):
        FeatureBatches(digits, **arguments)


def test_what_is_no_feature_set_is_named(digits: FeatureSet, tmp_path: Path) -> None:
    loader = DataLoader(digits)
    for wrong in (PIXELS, PIXELS.numpy(), None, str(tmp_path), loader):
        said = f"expected a FeatureSet, got {type(wrong).__name__}; use FeatureSet.open for"
        with pytest.raises(TypeError, match=f"^features: {said}"):
            FeatureBatches(wrong)
        for inside in (wrong, [wrong]):
            with pytest.raises(TypeError, match=f"^embeddings: {said}"):
                FeatureBatches(digits, embeddings=inside)
    with pytest.raises(TypeError, match=r"use FeatureSet\.open for a folder"):
        FeatureSet(str(tmp_path))
    with pytest.raises(ValueError, match="expected a column 'features', found x"):
        FeatureSet(Dataset.from_dict({"x": [1]}))
    with pytest.raises(ValueError, match="fixed-length lists of floats"):
        FeatureSet(Dataset.from_dict({"features": [[1.0, 2.0]]}))
    missing = dataset_of(PIXELS[:2]).map(lambda row, i: {"features": None}, with_indices=True)
    with pytest.raises(ValueError, match="2 rows have no features"):
        FeatureSet(missing.cast(dataset_of(PIXELS[:2]).features))
    with pytest.raises(FileNotFoundError, match="no feature dataset in"):
        FeatureSet.open(tmp_path)


def sae_trainer(data_provider, **options) -> SAETrainer:
    torch.manual_seed(0)
    sizes = {"d_in": 64, "d_sae": 128, "k": 4}
    return SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=256 * 10,
            train_batch_size_samples=256,
            lr=1e-3,
            lr_end=1e-3,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, **options)),
        data_provider=data_provider,
    )


def test_sae_lens_trains_from_batches_as_from_tensors(digits: FeatureSet) -> None:
    batches = FeatureBatches(digits, batch_size=256, seed=1)
    ours = sae_trainer(batches.tensors())
    ours.fit()
    again = FeatureBatches(digits, batch_size=256, seed=1)
    given = [b.features for b in again] + [b.features for b in again]
    theirs = sae_trainer(iter(given))
    theirs.fit()
    assert torch.equal(ours.sae.W_dec, theirs.sae.W_dec)
    assert (batches.epoch, batches.state_dict()["batch"]) == (1, 3)


def test_sae_lens_uses_another_encoders_similarities(digits: FeatureSet) -> None:
    other = FeatureSet(dataset_of(torch.randn(len(PIXELS), 6), labels=False))
    batches = FeatureBatches(digits, embeddings=other, batch_size=256)
    trainer = sae_trainer(batches.tensors())
    trainer.add_loss(MonoLoss(lam=3e-3), embeddings=batches.embeddings_of)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    inner = trainer.sae.training_forward_pass

    def forward(step_input):
        out = inner(step_input)
        embeddings = batches.embeddings_of(step_input.sae_in)
        seen.append((out.feature_acts.detach(), embeddings, out.metrics["monoscore"]))
        return out

    trainer.sae.training_forward_pass = forward
    trainer.fit()
    assert len(seen) == 10
    for acts, embeddings, logged in seen:
        value = logged() if callable(logged) else logged
        expected = functional.monoscore(acts, embeddings, undefined=float("nan")).nanmean()
        np.testing.assert_allclose(float(value), float(expected), rtol=1e-4)


def ahead(stream: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """A reader that fetches batches ahead and gives them on, scaled and in another type."""
    waiting = [next(stream) for _ in range(count)]
    while True:
        waiting.append(next(stream))
        yield (3 * waiting.pop(0)).bfloat16()


@pytest.mark.parametrize("shuffle", ["all", "buffer"])
def test_embeddings_are_of_the_batch_that_is_asked_for_not_of_the_last(digits, shuffle) -> None:
    other = torch.randn(len(PIXELS), 6)
    second = FeatureSet(dataset_of(other, labels=False))
    batches = FeatureBatches(digits, embeddings=second, batch_size=256, shuffle=shuffle)
    same = FeatureBatches(digits, batch_size=256, shuffle=shuffle)
    rows = [batch.rows for _ in range(2) for batch in same][:10]
    stream = ahead(batches.tensors(), 5)
    for expected in rows:
        x = next(stream)
        for _ in range(2):  # as two terms ask
            torch.testing.assert_close(batches.embeddings_of(x), normalize(other[expected], dim=1))


def test_a_whitened_batch_finds_its_embeddings(digits: FeatureSet) -> None:
    """SAELens whitens what it trains on; the adapter asks for the embeddings of what it was."""
    other = FeatureSet(dataset_of(torch.randn(len(PIXELS), 6), labels=False))
    batches = FeatureBatches(digits, embeddings=other, batch_size=256)
    trainer = sae_trainer(batches.tensors(), normalize_activations="covariance_whitening")
    trainer.add_loss(MonoLoss(lam=3e-3), embeddings=batches.embeddings_of)
    trainer.fit()


def test_rows_that_no_batch_had_are_refused(digits: FeatureSet) -> None:
    batches = FeatureBatches(digits, batch_size=256)
    with pytest.raises(ValueError, match="these 256 rows are none of the last 0 batches"):
        batches.embeddings_of(PIXELS[:256])
    stream = batches.tensors()
    one, other = next(stream), next(stream)
    swapped = one.clone()
    swapped[101] = other[101]
    for wrong in (swapped, one[:100], one.flip(0), -one, torch.cat((one, other)), 0 * one):
        with pytest.raises(ValueError, match="none of the last 2 batches"):
            batches.embeddings_of(wrong)
    mixed = mixing_buffer(1024, 256, batches.tensors())
    with pytest.raises(ValueError, match="do not mix or cut its batches"):
        batches.embeddings_of(next(mixed))


def test_evaluate_takes_batches_with_their_labels_and_embeddings(digits: FeatureSet) -> None:
    other = torch.randn(len(PIXELS), 6)
    batches = FeatureBatches(
        digits,
        embeddings=FeatureSet(dataset_of(other, labels=False)),
        batch_size=500,
        shuffle="none",
        drop_last=False,
    )
    sae = sae_trainer(iter([])).sae
    unit = normalize(PIXELS, dim=1)
    labels = torch.tensor(DIGITS.target)
    expected = evaluate(sae, unit, labels, embeddings=other, batch_size=500)
    found = evaluate(sae, batches)
    torch.testing.assert_close(found.monoscore.scores, expected.monoscore.scores)
    torch.testing.assert_close(found.purity.binary, expected.purity.binary, equal_nan=True)
    assert found.summary() == pytest.approx(expected.summary(), rel=1e-5)
    with pytest.raises(ValueError, match="batches bring their own"):
        evaluate(sae, batches, labels)
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(sae, [])
    with pytest.raises(ValueError, match="num_classes: needed"):
        evaluate(sae, list(batches))
    loaded = DataLoader(batches, batch_size=None)
    assert evaluate(sae, loaded, num_classes=10).summary() == pytest.approx(found.summary())
    with pytest.raises(TypeError, match="expected batches of the class Batch, got list"):
        evaluate(sae, DataLoader(TensorDataset(unit), batch_size=500))


def test_samples_without_a_label_do_not_count_for_purity(digits: FeatureSet) -> None:
    labels = torch.tensor(DIGITS.target)
    partly = labels.clone()
    partly[::3] = -1
    named = digits.dataset.remove_columns("label").add_column("label", partly.tolist())
    batches = FeatureBatches(FeatureSet(named), batch_size=500, shuffle="none", drop_last=False)
    unit, known = normalize(PIXELS, dim=1), partly >= 0
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
    expected = evaluate(sae, unit[known], labels[known], batch_size=2000).purity
    for found in (evaluate(sae, batches), evaluate(sae, unit, partly)):
        torch.testing.assert_close(found.purity.binary, expected.binary, equal_nan=True)
        torch.testing.assert_close(
            found.purity.weighted, expected.weighted, equal_nan=True, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"split": "test"},
            r"photos \(split train\), got photos \(split test\); .* differ in split",
        ),
        ({"name": "cifar"}, r"photos \(split train\), got cifar \(split train\); .* in name"),
        ({"ids_sha256": "b"}, "differ in ids_sha256"),
        ({"kind": "dataset"}, "differ in kind"),
        ({"encoder": "another", "revision": "c"}, None),
    ],
)
@pytest.mark.parametrize("with_ids", [True, False])
def test_ids_of_different_sources_and_splits_match_nothing(change, said, with_ids) -> None:
    """The same ids, for different photographs: paths within the split."""
    dataset = dataset_of(PIXELS) if with_ids else dataset_of(PIXELS).remove_columns("image_id")
    source = {"kind": "folder", "name": "photos", "split": "train", "ids_sha256": "a"}
    one, other = (FeatureSet(dataset, {"source": s}) for s in (source, {**source, **change}))
    FeatureBatches(one, embeddings=FeatureSet(other.dataset, record={}), batch_size=9)
    if said is None:
        FeatureBatches(one, embeddings=other, batch_size=9)
    else:
        with pytest.raises(ValueError, match=said):
            FeatureBatches(one, embeddings=other, batch_size=9)


def test_parts_of_open_images_and_streams_match_their_wholes(digits: FeatureSet) -> None:
    def of(record: dict[str, object]) -> FeatureSet:
        return FeatureSet(digits.dataset, {"source": {"name": "x", "split": "train", **record}})

    parts = [of({"kind": "open-images", "ids_sha256": digest}) for digest in ("a", "b")]
    FeatureBatches(parts[0], embeddings=parts[1], batch_size=9)
    whole = of({"kind": "hub", "sample_sha256": "a", "images": 1797})
    FeatureBatches(whole, embeddings=of({"kind": "hub", "sample_sha256": "b"}), batch_size=9)
    with pytest.raises(ValueError, match="differ in sample_sha256"):
        FeatureBatches(whole, embeddings=of({"kind": "hub", "sample_sha256": "b", "images": 9}))


def test_sets_without_ids_are_matched_row_by_row_and_that_is_said(digits, caplog) -> None:
    unnamed = FeatureSet(dataset_of(PIXELS + 1).remove_columns("image_id"))
    batch = next(iter(FeatureBatches(digits, embeddings=unnamed, batch_size=10)))
    torch.testing.assert_close(batch.embeddings, normalize(PIXELS[batch.rows] + 1, dim=1))
    assert "row i of each set is taken for the same image" in caplog.text


def test_columns_of_other_types_are_taken_or_named() -> None:
    plain = dataset_of(PIXELS[:3])
    columns = plain.remove_columns(["label", "image_id"])
    small = columns.add_column("label", [1, 2, 3]).cast_column("label", Value("uint8"))
    numbered = small.add_column("image_id", [7, 8, 9])
    opened = FeatureSet(numbered)
    assert opened.labels.tolist() == [1, 2, 3]
    assert opened.ids_of(torch.tensor([2, 0])) == ["9", "7"]
    with pytest.raises(TypeError, match="label: expected integers, got string"):
        FeatureSet(columns.add_column("label", ["a", "b", "c"]))
    data = {"features": [[1.0, None], [2.0, 3.0]]}
    kind = Features({"features": Sequence(Value("float32"), length=2)})
    with pytest.raises(ValueError, match="1 values are missing within rows"):
        FeatureSet(Dataset.from_dict(data, features=kind))


def test_pieces_at_odd_addresses_are_read_right() -> None:
    memory = np.zeros(4 * 12 + 2, np.uint8)
    values = PIXELS[:3, 20:24].contiguous().numpy()
    memory[2:] = values.view(np.uint8).reshape(-1)
    odd = pa.Array.from_buffers(pa.float32(), 12, [None, pa.py_buffer(memory).slice(2)])
    pieces = [pa.FixedSizeListArray.from_arrays(piece, 4) for piece in (odd, pa.array(values[0]))]
    features = FeatureSet(Dataset(pa.table({"features": pa.chunked_array(pieces)})))
    expected = np.concatenate((values, values[:1]))
    assert np.array_equal(features.take(torch.arange(4)).numpy(), expected)
    assert np.array_equal(features.take(torch.tensor([3, 1])).numpy(), expected[[3, 1]])

"""Batches of patches against plain indexing of the tensors that they were made of."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from monoloss_plugin.batch import Batch
from monoloss_plugin.comparison import compare
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches, FeatureSet
from tests.features.test_batches import ahead
from tests.features.test_patches import LABELS, dataset_of, images, pooled

N, P, D = 40, 6, 5
X = torch.randn(N, P, D, generator=torch.Generator().manual_seed(4))
Y = torch.arange(N) % 3
IDS = [f"{n:02d}" for n in range(N)]
SHUFFLES = ["all", "buffer", "images", "none"]


@pytest.fixture
def features() -> FeatureSet:
    return FeatureSet.from_tensors(X, Y, IDS, grid=(2, 3))


@pytest.fixture
def uneven() -> FeatureSet:
    """Seven images with 7, 4, 2, 6, 3, 6 and 1 patches."""
    return FeatureSet(dataset_of())


def check(batch: Batch, embeddings: Tensor | None = None) -> None:
    """Compare a batch of the whole set with the tensors."""
    image, place = batch.rows // P, batch.rows % P
    means = X.mean(1) if embeddings is None else embeddings
    torch.testing.assert_close(batch.features, normalize(X[image, place], dim=1))
    torch.testing.assert_close(batch.embeddings, normalize(means[image], dim=1))
    assert torch.equal(batch.labels, Y[image])
    assert torch.equal(batch.images, image)
    assert torch.equal(batch.places, place.to(torch.int16))


@pytest.mark.parametrize("resident", [True, False, None])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_an_epoch_has_every_patch_once(features, shuffle, resident) -> None:
    if resident and shuffle == "buffer":
        return
    batches = FeatureBatches(
        features, batch_size=50, shuffle=shuffle, drop_last=False, resident=resident
    )
    assert (batches.num_rows, batches.num_images, len(batches)) == (N * P, N, 5)
    orders = []
    for _ in range(2):
        found = list(batches)
        for batch in found:
            check(batch)
        orders.append(torch.cat([batch.rows for batch in found]))
        assert torch.equal(orders[-1].sort().values, torch.arange(N * P))
    assert torch.equal(*orders) == (shuffle == "none")


def test_shuffled_images_keep_their_patches_together(features, uneven) -> None:
    batches = FeatureBatches(features, batch_size=3 * P, shuffle="images", seed=1)
    order = []
    for batch in batches:
        image = batch.images.view(3, P)
        assert (image == image[:, :1]).all()
        assert torch.equal(batch.places.view(3, P), torch.arange(P).to(torch.int16).expand(3, P))
        order += image[:, 0].tolist()
    assert len(set(order)) == len(order) == N - N % 3
    assert order != sorted(order)
    whole = FeatureBatches(uneven, batch_size=5, shuffle="images", drop_last=False)
    images_in_order = torch.cat([batch.images for batch in whole]).unique_consecutive()
    assert sorted(images_in_order.tolist()) == [*range(7)]
    plain = FeatureBatches(features.images, batch_size=N, shuffle="images")
    (batch,) = plain
    assert sorted(batch.rows.tolist()) == [*range(N)]
    assert batch.images is batch.places is None


def test_images_of_different_sizes(uneven) -> None:
    x, counts = torch.cat(images()).float(), torch.tensor([len(one) for one in images()])
    image = torch.arange(7).repeat_interleave(counts)
    means = torch.stack([pooled(n) for n in range(7)]).float()
    for shuffle in SHUFFLES:
        for batch in FeatureBatches(uneven, batch_size=6, shuffle=shuffle, normalize=False):
            assert torch.equal(batch.features, x[batch.rows])
            assert torch.equal(batch.images, image[batch.rows])
            assert torch.equal(batch.labels, LABELS[image[batch.rows]])
            torch.testing.assert_close(batch.embeddings, normalize(means[batch.images], dim=1))


@pytest.mark.parametrize("others", ["plain", "patches", "both"])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_other_sets_are_matched_by_image(features, others, shuffle) -> None:
    generator = torch.Generator().manual_seed(0)
    e, patches = torch.randn(N, 3, generator=generator), torch.randn(N, 4, 2, generator=generator)
    order = torch.randperm(N, generator=generator)[:30]
    ids = [IDS[n] for n in order]
    plain = FeatureSet.from_tensors(e[order], ids=ids)
    other = FeatureSet.from_tensors(patches[order], ids=ids)
    given, expected = {
        "plain": (plain, e),
        "patches": (other, patches.mean(1)),
        "both": ([plain, other], None),
    }[others]
    batches = FeatureBatches(features, embeddings=given, batch_size=36, shuffle=shuffle)
    assert (batches.num_images, batches.num_rows, len(batches)) == (30, 180, 5)
    seen = []
    for batch in batches:
        seen.append(batch.rows)
        if expected is None:
            parts = normalize(e, dim=1), normalize(patches.mean(1), dim=1)
            check(batch, torch.cat(parts, 1))
        else:
            check(batch, expected)
    assert sorted(set((torch.cat(seen) // P).tolist())) == sorted(order.tolist())


def test_a_plain_set_may_be_compared_by_a_patch_set(features) -> None:
    plain = FeatureSet.from_tensors(torch.randn(N, 3), ids=IDS)
    (batch,) = FeatureBatches(plain, embeddings=features, batch_size=N)
    torch.testing.assert_close(batch.embeddings, normalize(X.mean(1)[batch.rows], dim=1))
    assert batch.images is None


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_state_resumes_exactly(features, shuffle) -> None:
    def some() -> FeatureBatches:
        return FeatureBatches(features, batch_size=48, shuffle=shuffle, seed=5, buffer_rows=96)

    whole = some().tensors()
    expected = [next(whole) for _ in range(12)]
    begun = some()
    stream = begun.tensors()
    for _ in range(4):
        next(stream)
    resumed = some()
    resumed.load_state_dict(pickle.loads(pickle.dumps(begun.state_dict())))
    for x, found in zip(expected[4:], resumed.tensors(), strict=False):
        assert torch.equal(x, found)
    other = FeatureBatches(features.select(torch.arange(N).flip(0)), batch_size=48, seed=5)
    with pytest.raises(ValueError, match="was "):
        other.load_state_dict(begun.state_dict())


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_processes_share_an_epoch(features, shuffle) -> None:
    shares = [
        list(FeatureBatches(features, batch_size=2 * P, shuffle=shuffle, shard=(i, 2)))
        for i in range(2)
    ]
    whole = list(FeatureBatches(features, batch_size=4 * P, shuffle=shuffle))
    assert [len(share) for share in shares] == [10, 10]
    for one, other, batch in zip(*shares, whole, strict=True):
        assert len(one.rows) == len(other.rows) == 2 * P
        together = torch.cat((one.rows, other.rows)).sort().values
        assert torch.equal(together, batch.rows.sort().values)
        if shuffle == "images":
            assert len(one.images.unique()) == len(other.images.unique()) == 2


@pytest.mark.parametrize("shard", [(0, 1), (1, 3)])
def test_every_row_gives_whole_images(uneven, shard) -> None:
    batches = FeatureBatches(uneven, batch_size=9, shuffle="all", shard=shard, drop_last=False)
    found = list(batches.every_row(100))
    mine = [*range(7)][shard[0] :: shard[1]]
    assert [n for batch in found for n in batch.images.unique_consecutive().tolist()] == mine
    counts = [len(one) for one in images()]
    assert sum(len(batch.rows) for batch in found) == sum(counts[n] for n in mine)
    for batch in found:
        assert len(batch.rows) <= 9
        assert len(batch.rows) == sum(counts[n] for n in batch.images.unique())


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_samples_are_of_the_batch_that_is_asked_for(features, shuffle) -> None:
    batches = FeatureBatches(features, batch_size=48, shuffle=shuffle)
    same = FeatureBatches(features, batch_size=48, shuffle=shuffle)
    expected = [batch for _ in range(2) for batch in same]
    stream = ahead(batches.tensors(), 3)
    for batch in expected[:6]:
        x = next(stream)
        with pytest.raises(ValueError, match=r"pass embeddings=batches\.samples_of"):
            batches.embeddings_of(x)
        found = batches.samples_of(x)
        check(found)
        assert torch.equal(found.rows, batch.rows)
        assert torch.equal(found.features, batch.features)
    with pytest.raises(ValueError, match="these 48 rows are none of the last"):
        batches.samples_of(torch.randn(48, D))


def test_samples_of_a_plain_set_bring_what_embeddings_of_gives(features) -> None:
    batches = FeatureBatches(features.images, batch_size=10)
    x = next(batches.tensors())
    found = batches.samples_of(x)
    assert torch.equal(found.similarity, batches.embeddings_of(x))
    assert torch.equal(found.labels, Y[found.rows])


def test_workers_of_a_dataloader_give_the_same(features) -> None:
    batches = FeatureBatches(features, batch_size=48, shuffle="images")
    expected = [batch.rows.tolist() for batch in batches]
    batches.set_epoch(0)
    loaded = list(DataLoader(batches, batch_size=None, num_workers=2))
    assert [batch.rows.tolist() for batch in loaded] == expected
    for batch in loaded:
        check(batch)


def test_no_more_of_the_means_is_read_than_a_batch_needs(features, monkeypatch) -> None:
    """They are not expanded to the patches."""
    asked: list[tuple[bool, int]] = []
    take = FeatureSet.take

    def noting(self, rows):
        asked.append((self.patches is None, len(rows)))
        return take(self, rows)

    monkeypatch.setattr(FeatureSet, "take", noting)
    batches = FeatureBatches(features, batch_size=2 * P, shuffle="images")
    next(iter(batches))
    assert asked[-2:] == [(False, 2 * P), (True, 2)]


def test_too_few_patches_for_a_batch(features) -> None:
    with pytest.raises(ValueError, match="expected at most 240 of 240 patches over 1 process"):
        FeatureBatches(features, batch_size=241)


class Identity:
    """An SAE with a latent for each dimension."""

    def encode(self, x: Tensor) -> Tensor:
        return x.relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def test_spaces_of_a_comparison_are_matched_by_image(features) -> None:
    """Another set of the same images, in another order, gives the same as in this order."""
    e = torch.randn(N, 3)
    order = torch.randperm(N)
    spaces = [
        FeatureSet.from_tensors(e, ids=IDS),
        FeatureSet.from_tensors(e[order], ids=[IDS[n] for n in order]),
    ]
    found = [
        compare({"sae": Identity()}, features, spaces={"other": one}, groups=("spaces",)).runs
        for one in spaces
    ]
    (one,), (other,) = (runs["sae"] for runs in found)
    assert one["adjusted/other"] == pytest.approx(other["adjusted/other"])
    assert one["adjusted/labels"] == pytest.approx(other["adjusted/labels"])


def test_a_comparison_without_training_features_halves_the_images(features) -> None:
    scored: list[FeatureSet] = []

    def score(sae, given: FeatureSet):
        scored.append(given)
        return evaluate(sae, given)

    found = compare({"sae": Identity()}, features, groups=("probes",), score=score)
    (half,) = scored
    assert (half.num_images, len(half)) == (N // 2, N // 2 * P)
    assert half.patches.are_whole
    assert "on a random half (120 rows)" in found.notes[0]


def test_a_batch_of_zeros_is_found_too() -> None:
    batches = FeatureBatches(FeatureSet.from_tensors(torch.zeros(10, 4, 3)), batch_size=8)
    features = next(batches.tensors())
    assert len(batches.samples_of(features).images) == 8
    with pytest.raises(ValueError, match="none of the last 1 batches"):
        batches.samples_of(features + 1)

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from monoloss_plugin import Batch, load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.gallery import near_misses
from monoloss_plugin.gallery.reservoir import Entries, Reservoir, hashes_of_rows
from monoloss_plugin.gallery.samples import activating_samples


class DenseSAE:
    """Random directions and a ReLU; its activations are rounded, so that many are equal."""

    def __init__(self, width: int, num_latents: int, threshold: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(num_latents, width, generator=generator)
        self.weight[3] = 0.0  # never active
        self.threshold = threshold

    def encode(self, x: Tensor) -> Tensor:
        return ((x @ self.weight.T).mul(4).round().div(4) - self.threshold).relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ (self.weight / 50) + 0.25


@pytest.fixture(params=["dense", "sparse"])
def sae(request: pytest.FixtureRequest) -> DenseSAE:
    return DenseSAE(16, 24, 0.0 if request.param == "dense" else 7.0)


@pytest.fixture
def features() -> FeatureSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 16, generator=generator)
    return FeatureSet.from_tensors(x, torch.arange(300) % 5)


def rows_by_definition(activations: Tensor) -> list[int]:
    """The rows that activate a latent, strongest first, equal ones by row."""
    active = [n for n in range(len(activations)) if activations[n] > 0]
    return sorted(active, key=lambda n: (-float(activations[n]), n))


def listed(rows: Tensor) -> list[int]:
    return [n for n in rows.tolist() if n >= 0]


@pytest.mark.parametrize("batch_size", [300, 37])
def test_bands_are_those_of_all_activations(
    sae: DenseSAE, features: FeatureSet, batch_size: int
) -> None:
    found = activating_samples(sae, features, count=4, normalize=False, batch_size=batch_size)
    activations = sae.encode(features.tensor())
    for k in range(24):
        ranking = rows_by_definition(activations[:, k])
        assert listed(found.top.rows[k]) == ranking[:4]
        # Of equal activations, the lowest rows are kept at this end too.
        weakest = sorted(ranking, key=lambda n: (float(activations[n, k]), n))[:4]
        assert sorted(listed(found.bottom.rows[k])) == sorted(set(weakest) - set(ranking[:4]))
        ends = {*ranking[:4], *weakest}
        assert not ends & set(listed(found.middle.rows[k]))
        for band in (found.top, found.bottom):
            values = band.values[k][: len(ranking)].tolist()
            rows = listed(band.rows[k])
            assert values[: len(rows)] == [float(activations[n, k]) for n in rows]
            assert values == sorted(values, reverse=True)
    assert listed(found.top.rows[3]) == []  # never active
    expected = evaluate(sae, features, normalize=False, batch_size=batch_size)
    assert found.evaluation.summary() == expected.summary()


def test_the_middle_is_exact_for_rare_latents_and_near_the_median_for_others() -> None:
    generator = torch.Generator().manual_seed(2)
    activations = torch.rand(3000, 40, generator=generator)
    activations[60:, :20] = 0.0  # rare latents, active on 60 samples
    found = activating_samples(Identity(), activations, count=5, normalize=False)
    for k in range(20):
        ranking = rows_by_definition(activations[:, k])
        start = (len(ranking) - 5) // 2
        assert found.middle.rows[k].tolist() == ranking[start : start + 5]
    errors = []
    for k in range(20, 40):
        ranking = rows_by_definition(activations[:, k])
        places = [ranking.index(n) / len(ranking) for n in found.middle.rows[k].tolist()]
        errors.append(sum(places) / 5 - 0.5)
    deviation = math.sqrt(sum(e * e for e in errors) / len(errors))
    assert 0.02 < deviation < 0.12  # stated: 0.5 / sqrt(64) = 0.06


class Identity:
    def encode(self, x: Tensor) -> Tensor:
        return x.relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@pytest.mark.parametrize("batch_size", [300, 37])
def test_near_misses_are_the_most_similar_samples_that_are_not_active(
    sae: DenseSAE, features: FeatureSet, batch_size: int
) -> None:
    found = activating_samples(sae, features, count=4, normalize=False, batch_size=batch_size)
    x = features.tensor().double()
    activations = sae.encode(features.tensor()).double()
    unit = torch.nn.functional.normalize(x, dim=1)
    for k in range(24):
        weights = activations[:, k] - activations[:, k].min()
        if not weights.any():
            assert listed(found.near_misses.rows[k]) == []
            continue
        mean = torch.nn.functional.normalize((weights @ unit)[None], dim=1)[0]
        inactive = [n for n in range(300) if activations[n, k] == 0]
        ranking = sorted(inactive, key=lambda n: -float(unit[n] @ mean))
        assert found.near_misses.rows[k].tolist() == ranking[:4]
        expected = [float(unit[n] @ mean) for n in ranking[:4]]
        assert found.near_misses.values[k].tolist() == pytest.approx(expected, abs=1e-5)


def test_near_misses_of_many_samples_come_from_a_random_choice(
    features: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where a batch ends with the last sample that there is room for, and its key is small.
    room = int(hashes_of_rows(torch.arange(20, 80)).argmin()) + 21
    monkeypatch.setattr(near_misses, "CANDIDATES", room)
    sae = DenseSAE(16, 24, 7.0)
    runs = [
        activating_samples(sae, features, count=room, normalize=False, batch_size=size).near_misses
        for size in (300, 37, room)
    ]
    assert torch.equal(runs[0].rows, runs[1].rows)
    assert torch.equal(runs[0].rows, runs[2].rows)
    chosen = set(listed(runs[0].rows.flatten()))
    assert len(chosen) == room
    assert max(chosen) > 150 > min(chosen)
    activations = sae.encode(features.tensor())
    for k in range(24):
        assert all(activations[n, k] == 0 for n in listed(runs[0].rows[k]))


@pytest.mark.parametrize("num_latents", [1, 7, 8, 21])
def test_packed_masks_are_unpacked_for_any_latents(num_latents: int) -> None:
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(5, num_latents, generator=generator) > 0.5
    packed = near_misses.pack_active(active)
    assert packed.shape == (5, math.ceil(num_latents / 8))  # an eighth of a byte for each latent
    for start in range(num_latents):
        for stop in range(start + 1, num_latents + 1):
            found = near_misses.unpack_active(packed, slice(start, stop))
            assert torch.equal(found, active[:, start:stop])


def test_the_histogram_counts_every_activation(sae: DenseSAE, features: FeatureSet) -> None:
    found = activating_samples(sae, features, normalize=False)
    activations = sae.encode(features.tensor())
    assert found.histogram.sum(1).tolist() == (activations > 0).sum(0).tolist()
    edges = [2 ** ((found.first_bin + b) / 4) for b in range(found.histogram.shape[1] + 1)]
    for b, (low, high) in enumerate(pairwise(edges)):
        inside = (activations.double() >= low) & (activations.double() < high)
        assert found.histogram[:, b].tolist() == inside.sum(0).tolist()


def test_activations_of_any_size_are_counted() -> None:
    found = activating_samples(
        Identity(), torch.tensor([[1e-30, 1e30], [0.0, 2.0]]), normalize=False
    )
    assert found.histogram.sum(1).tolist() == [1, 2]


def test_class_counts_are_those_of_active_samples(sae: DenseSAE, features: FeatureSet) -> None:
    found = activating_samples(sae, features, normalize=False)
    active = sae.encode(features.tensor()) > 0
    labels = torch.arange(300) % 5
    expected = [active[labels == c].sum(0).tolist() for c in range(5)]
    assert found.class_counts is not None
    assert found.class_counts.tolist() == expected


def test_shares_of_the_reconstruction_add_up_to_one() -> None:
    sae, features = load_pretrained("digits").sae, load_features("digits", "held_out")
    found = activating_samples(sae, features)
    x = torch.nn.functional.normalize(features.tensor().float(), dim=1)
    latents = sae.encode(x)
    few = (latents > 0).sum(1) <= 12
    assert few.sum() > 300
    assert found.of_rows.shares[few].sum(1).tolist() == pytest.approx([1.0] * int(few.sum()), 1e-4)
    assert found.of_rows.rows.tolist() == list(range(len(features)))
    n = int(few.nonzero()[0])
    shown = found.of_rows.latents[n].long()
    assert set(shown[shown >= 0].tolist()) == set((latents[n] > 0).nonzero().flatten().tolist())
    without = latents[n].clone()
    without[shown[0]] = 0.0
    whole = sae.decode(latents[n][None])[0] - sae.b_dec
    part = sae.decode(latents[n][None])[0] - sae.decode(without[None])[0]
    assert float(found.of_rows.shares[n, 0]) == pytest.approx(
        float(part @ whole / (whole @ whole)), abs=1e-4
    )


@pytest.mark.parametrize("scaling", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["standard", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore:sae. R²")
def test_shares_of_saelens_saes_are_those_of_their_decoders(
    kind: str, scaling: Any, dtype: torch.dtype
) -> None:
    options: Any = {"d_in": 8, "d_sae": 24, "normalize_activations": scaling}
    sae: Any = StandardSAE(StandardSAEConfig(**options))
    if kind == "sparse":
        config = TopKTrainingSAEConfig(k=3, use_sparse_activations=True, **options)
        sae = TopKTrainingSAE(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    features = torch.randn(24, 8, generator=generator).to(dtype)  # as many as latents
    found = activating_samples(sae, features, normalize=False)
    with torch.no_grad():
        latents = sae.encode(features)
        latents = (latents if latents.layout == torch.strided else latents.to_dense()).double()
    weights = sae.W_dec.detach().double()
    if kind == "sparse":  # SAELens scales these latents by the lengths of the directions
        weights = torch.nn.functional.normalize(weights, dim=1)
    whole = latents @ weights
    shares = latents * (whole @ weights.T) / whole.square().sum(1, keepdim=True)
    shown = found.of_rows.latents.long()
    assert (shown >= 0).sum(1).min() >= 3
    torch.testing.assert_close(
        found.of_rows.shares.where(shown >= 0, torch.tensor(0.0)).double(),
        shares.gather(1, shown.clamp(min=0)).where(shown >= 0, torch.tensor(0.0)),
        atol=1e-4,
        rtol=0,
    )


def test_a_large_bias_does_not_round_away_the_directions_of_an_sae_in_half_precision() -> None:
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).bfloat16() / 16

    class Half(Identity):
        def decode(self, latents: Tensor) -> Tensor:
            return latents @ weight + torch.tensor(4.0, dtype=torch.bfloat16)

    found = activating_samples(Half(), torch.eye(12).bfloat16(), normalize=False)
    assert found.directions is not None
    torch.testing.assert_close(found.directions, weight.float(), atol=1e-3, rtol=0.02)


def test_the_strongest_latents_of_a_sample_are_kept(sae: DenseSAE, features: FeatureSet) -> None:
    found = activating_samples(sae, features, normalize=False, batch_size=37)
    strength = sae.encode(features.tensor()) * sae.weight.norm(dim=1)
    for n in range(0, 300, 50):
        active = [k for k in range(24) if strength[n, k] > 0]
        ranking = sorted(active, key=lambda k: (-float(strength[n, k]), k))[:12]
        assert listed(found.of_rows.latents[n]) == ranking


def test_rows_are_those_of_the_batches_also_if_they_are_shuffled() -> None:
    sae, features = load_pretrained("digits").sae, load_features("digits", "held_out")
    in_order = activating_samples(sae, features)
    x = torch.nn.functional.normalize(features.tensor().float(), dim=1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    batches = [Batch(x[rows], rows=rows) for rows in order.split(100)]
    shuffled = activating_samples(sae, batches)
    for name, band in in_order.bands.items():
        assert torch.equal(band.rows, shuffled.bands[name].rows), name
    assert torch.equal(in_order.of_rows.latents, shuffled.of_rows.latents)


def test_batches_of_any_kind_are_counted_as_they_come() -> None:
    batches = (Batch(torch.full((2, 2), float(n + 1))) for n in range(3))
    found = activating_samples(Identity(), batches, count=2, normalize=False)
    assert found.top.rows.tolist() == [[4, 5], [4, 5]]
    assert found.class_counts is None


def test_a_count_above_the_number_of_samples_takes_no_more_memory() -> None:
    found = activating_samples(Identity(), torch.eye(3), count=10**9, normalize=False)
    assert {band.rows.shape for band in found.bands.values()} == {(3, 3)}
    assert found.top.rows.tolist() == [[n, -1, -1] for n in range(3)]


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count: expected at least 1"):
        activating_samples(Identity(), torch.eye(3), count=count)


def test_a_decoder_that_cannot_be_asked_gives_no_shares() -> None:
    class OnlyItsOwn(Identity):
        def decode(self, latents: Tensor) -> Tensor:
            if len(latents) != 3:
                raise RuntimeError("not the batch that was encoded")
            return latents

    found = activating_samples(OnlyItsOwn(), torch.eye(3), normalize=False)
    assert found.of_rows.shares.isnan().all()
    assert found.of_rows.latents[:, 0].tolist() == [0, 1, 2]


def test_a_reservoir_keeps_the_same_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (400,), generator=generator).float()
    latents = torch.randint(0, 6, (400,), generator=generator)
    entries = Entries(latents, torch.arange(400), values)
    whole, parts = (Reservoir(6, 3, torch.device("cpu")) for _ in range(2))
    whole.add(entries, values)
    for part in torch.randperm(400, generator=generator).split(23):
        parts.add(Entries(*(one[part] for one in entries)), values[part])
    assert torch.equal(whole.rows, parts.rows)
    for k in range(6):
        mine = [n for n in range(400) if latents[n] == k]
        assert whole.rows[k].tolist() == sorted(mine, key=lambda n: (-float(values[n]), n))[:3]


def test_hashes_look_uniform() -> None:
    entries = Entries(torch.arange(20000) % 7, torch.arange(20000), torch.ones(20000))
    hashes = entries.hashes()
    assert len(hashes.unique()) == 20000
    counts = torch.histc(hashes.float(), 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 50  # 19 degrees of freedom

"""Latents of patches as latents of images, against loops over images, latents and places."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from torch import Tensor

from monoloss_plugin.kernels.support import Support, support_of
from monoloss_plugin.spatial import ImagesOfBatch, Spatial, maps_of, pool

ROOK = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
LATENTS = 7


def moran(grid: np.ndarray) -> float:
    """Moran's I of a map (h, w), from its definition."""
    c = grid - grid.mean()
    if np.ptp(grid) == 0:
        return math.nan
    weights = convolve(np.ones_like(grid), ROOK, mode="constant")
    neighbours = convolve(c, ROOK, mode="constant")
    return float(grid.size / weights.sum() * (c * neighbours).sum() / (c * c).sum())


class Data:
    """Images with different grids, one with a single patch, some with a class token."""

    grids = ((3, 4), (1, 1), (2, 2), (4, 3), (1, 5), (5, 2))
    with_token = (True, True, False, True, False, False)

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        images, places, grids = [], [], []
        for number, (h, w) in enumerate(self.grids):
            own = [-1] * self.with_token[number] + list(range(h * w))
            images += [10 + 3 * number] * len(own)
            places += own
            grids += [(h, w)] * len(own)
        self.images, self.places = torch.tensor(images), torch.tensor(places, dtype=torch.int16)
        self.grids_of_samples = torch.tensor(grids, dtype=torch.int16)
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(len(images), LATENTS, generator=generator, dtype=torch.float64)
        a[:, 1] = a[:, 1].abs() + 1e4  # active everywhere, far from zero
        a[:, 2] = 1.5  # constant maps
        a[:, 3] = -1.0  # never active
        a[:, 4] = torch.where(self.places == -1, 2.0, 0.0)  # active on class tokens alone
        a[:, 5] = torch.where(torch.arange(len(a)) == 5, 3.0, 0.0)  # on one patch alone
        self.latents = a.to(dtype)

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (
            self.latents[rows],
            self.images[rows],
            self.places[rows],
            self.grids_of_samples[rows],
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """Coherence and extent (M,), from loops."""
        numbers = self.images.unique().tolist()
        coherence, extent = [], []
        for latent in range(LATENTS):
            found, shares = [], []
            for number, (h, w) in zip(numbers, self.grids, strict=True):
                own = (self.images == number) & (self.places >= 0)
                grid = np.zeros(h * w)
                grid[self.places[own].numpy()] = self.latents[own, latent].clamp(min=0).numpy()
                if not (grid > 0).any():
                    continue
                shares.append((grid > 0).mean())
                found.append(moran(grid.reshape(h, w)))
            found = [one for one in found if not math.isnan(one)]
            coherence.append(np.mean(found) if found else math.nan)
            extent.append(np.mean(shares) if shares else math.nan)
        return torch.from_numpy(np.array(coherence)), torch.from_numpy(np.array(extent))


@pytest.fixture
def data() -> Data:
    return Data()


FORMS = {
    "dense": lambda a: a,
    "coo": lambda a: a.to_sparse(),
    "support": support_of,
    "any order": lambda a: _shuffled(support_of(a)),
}


def _shuffled(a: Support) -> Support:
    """The same entries; those of a latent in another order."""
    order = torch.randperm(len(a.rows), generator=torch.Generator().manual_seed(0))
    order = order[a.columns[order].sort(stable=True).indices]
    return Support(a.rows[order], a.columns, a.offsets, a.values[order], a.num_rows)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_has_the_largest_and_the_mean_of_its_samples(data, form: str) -> None:
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(1))
    images, a = data.images[order], data.latents[order]
    of = ImagesOfBatch.of(images, torch.device("cpu"))
    pooled = pool(FORMS[form](a), of)
    assert of.numbers.tolist() == [10, 13, 16, 19, 22, 25]
    by_image = [a[images == number].clamp(min=0) for number in of.numbers]
    for found, expected in (
        (pooled.largest, torch.stack([one.amax(0) for one in by_image])),
        (pooled.mean, torch.stack([one.mean(0) for one in by_image])),
    ):
        assert found.shape == (6, LATENTS)
        assert bool((found.columns.diff() >= 0).all())
        assert len(found.rows) == int((expected > 0).sum())
        torch.testing.assert_close(found.by_sample().to_dense(), expected)
        again = support_of(expected)
        assert torch.equal(found.offsets, again.offsets)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coherence_and_extent_are_means_of_loops_over_maps(form: str, dtype) -> None:
    data = Data(dtype)
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(1))
    latents, *others = data.of(order)
    metric = Spatial()
    metric.update(FORMS[form](latents), *others)
    coherence, extent = data.expected()
    assert coherence.isnan().tolist() == [False, False, True, True, True, False, False]
    assert extent.isnan().tolist() == [False, False, False, True, True, False, False]
    found = metric.compute()
    torch.testing.assert_close(found.coherence, coherence, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(found.extent, extent, rtol=1e-12, atol=0, equal_nan=True)


def test_every_map_of_a_small_grid_has_the_moran_of_its_definition() -> None:
    """All 2^6 - 1 patterns of a 2 x 3 grid, as latents of one image."""
    maps = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))[1:].double()
    of = ImagesOfBatch.of(torch.zeros(6).long(), torch.device("cpu"))
    found = maps_of(maps.T, of, torch.arange(6), torch.tensor([[2, 3]]).repeat(6, 1))
    expected = [moran(one.reshape(2, 3).numpy()) for one in maps]
    assert found.latents.tolist() == list(range(63))
    np.testing.assert_allclose(found.moran, expected, atol=1e-12)
    assert math.isnan(expected[-1])
    np.testing.assert_allclose(found.extent, maps.mean(1))


def test_halves_lie_together_and_a_chessboard_is_apart() -> None:
    half = torch.tensor([[1.0] * 8] * 4 + [[0.0] * 8] * 4)
    board = torch.arange(8)[:, None].add(torch.arange(8)).remainder(2).float()
    spot = torch.zeros(8, 8)
    spot[3, 4] = 1.0
    latents = torch.stack([half.flatten(), board.flatten(), spot.flatten()], 1)
    metric = Spatial()
    metric.update(latents, torch.zeros(64).long(), torch.arange(64), torch.full((64, 2), 8))
    together, apart, alone = metric.compute().coherence.tolist()
    assert together == pytest.approx(1 - 16 / 112)  # 8 of 112 edges join unlike patches
    assert apart == pytest.approx(-1.0)
    assert alone == pytest.approx(moran(spot.numpy()))
    assert alone == pytest.approx((64 / 224) * (-8 / 64 + 224 / 64**2) / (1 - 1 / 64))


def test_shuffled_maps_have_the_expected_moran() -> None:
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([torch.randperm(12, generator=generator) for _ in range(4000)], 1)
    of = ImagesOfBatch.of(torch.zeros(12).long(), torch.device("cpu"))
    grids = torch.tensor([[3, 4]]).repeat(12, 1)
    found = maps_of(shuffled.double(), of, torch.arange(12), grids).moran
    assert float(found.mean()) == pytest.approx(-1 / 11, abs=4 * float(found.std()) / 4000**0.5)


def test_batches_and_parts_give_what_one_pass_gives(data) -> None:
    everything = torch.arange(len(data.images))
    whole = Spatial()
    whole.update(*data.of(everything))
    parts = [Spatial(), Spatial()]
    for number, image in enumerate(data.images.unique()):
        parts[number % 2].update(*data.of((data.images == image).nonzero().squeeze(1)))
    parts[0].merge(parts[1])
    loaded = Spatial()
    loaded.load_state_dict(parts[0].state_dict())
    for found, expected in zip(loaded.compute(), whole.compute(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


def test_a_state_of_something_else_is_named() -> None:
    with pytest.raises(ValueError, match="state: expected 4 sums, got 3"):
        Spatial().load_state_dict({"sums": torch.zeros(3, 5)})


def test_images_without_all_places_have_an_extent_and_no_moran(data) -> None:
    kept = (data.places != 0).nonzero().squeeze(1)
    metric = Spatial()
    metric.update(*data.of(kept))
    assert metric.compute().coherence.isnan().all()
    assert metric.compute().extent[1] == 1.0
    twice = ImagesOfBatch.of(torch.zeros(4).long(), torch.device("cpu"))
    places, grids = torch.tensor([0, 1, 2, 2]), torch.full((4, 2), 2)
    assert maps_of(torch.rand(4, 2), twice, places, grids).moran.isnan().all()


def test_without_places_every_sample_is_a_patch(data) -> None:
    metric = Spatial()
    metric.update(data.latents, data.images)
    assert metric.compute().coherence.isnan().all()
    tokens = torch.tensor([1 / 13, 1 / 2, 1 / 13]).double()
    assert float(metric.compute().extent[4]) == pytest.approx(float(tokens.mean()))
    places_alone = Spatial()
    places_alone.update(data.latents, data.images, data.places)
    assert places_alone.compute().coherence.isnan().all()
    expected = data.expected()[1]
    torch.testing.assert_close(places_alone.compute().extent, expected, equal_nan=True)


def test_no_latents_and_no_samples_are_no_error(data) -> None:
    metric = Spatial()
    metric.update(torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0).long())
    metric.update(torch.zeros(4, 3), torch.arange(4), torch.zeros(4).long(), torch.ones(4, 2).int())
    assert metric.compute().extent.isnan().all()
    assert metric.compute().coherence.isnan().all()


WRONG = [
    ({"latents": torch.ones(4, 2).long()}, TypeError, "latents: expected a floating-point"),
    ({"latents": torch.full((4, 2), math.nan)}, ValueError, "latents: contains NaN"),
    ({"images": torch.zeros(4)}, TypeError, "images: expected integer"),
    ({"images": torch.zeros(3).long()}, ValueError, "images: expected 4 to match latents, got 3"),
    ({"images": torch.zeros(4, 1).long()}, ValueError, r"images: expected \(B,\), got \(4, 1\)"),
    ({"places": torch.zeros(3).long()}, ValueError, r"places: expected shape \(4,\) as images"),
    ({"places": torch.zeros(4)}, TypeError, "places: expected integer"),
    ({"places": torch.arange(4) + 1}, ValueError, "places: expected places below height x width"),
    ({"grids": torch.full((4, 2), 2.0)}, TypeError, "grids: expected integer"),
    ({"grids": torch.full((2,), 2)}, ValueError, r"grids: expected \(4, 2\), got \(2,\)"),
    ({"grids": torch.full((4, 2), 0)}, ValueError, "grids: expected a height and a width of at"),
    (
        {"grids": torch.tensor([[2, 2], [2, 2], [2, 2], [1, 4]])},
        ValueError,
        "grids: expected the same for all samples of an image",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "said"), WRONG)
def test_what_is_wrong_is_named_and_changes_nothing(arguments, kind, said) -> None:
    right = {
        "latents": torch.rand(4, 2, generator=torch.Generator().manual_seed(0)),
        "images": torch.zeros(4).long(),
        "places": torch.arange(4),
        "grids": torch.full((4, 2), 2),
    }
    metric = Spatial()
    metric.update(**right)
    before = metric.state_dict()
    with pytest.raises(kind, match=said):
        metric.update(**{**right, **arguments})
    assert torch.equal(metric.state_dict()["sums"], before["sums"])


def test_a_latent_of_another_width_is_named() -> None:
    metric = Spatial()
    metric.update(torch.rand(4, 2), torch.zeros(4).long())
    with pytest.raises(ValueError, match="latents: expected width 2 as in earlier batches, got 3"):
        metric.update(torch.rand(4, 3), torch.zeros(4).long())

"""Decoder directions: matched, repeated and nearest, against brute force and scipy."""

from __future__ import annotations

import math
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from monoloss_plugin import load_pretrained
from monoloss_plugin.dictionary import nearest_latents, redundancy, stability


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def decoders():
    """Real decoders of 256 latents: with MonoLoss, and without."""
    listed = ("batchtopk-256", "batchtopk-256-monoloss-0.003")
    return [load_pretrained("digits", name).sae.W_dec.detach() for name in listed]


def cosines_of(first, second) -> np.ndarray:
    a, b = first.double().numpy(), second.double().numpy()
    return np.array([[x @ y / math.sqrt(x @ x) / math.sqrt(y @ y) for y in b] for x in a])


@pytest.mark.parametrize("sizes", [(5, 5), (3, 6), (6, 4)])
def test_matching_is_the_best_of_all_permutations(generator, sizes) -> None:
    first, second = (torch.randn(size, 3, generator=generator) for size in sizes)
    small, large = sorted((first, second), key=len)
    cosines = cosines_of(small, large)
    best = max(
        np.mean([cosines[i, j] for i, j in enumerate(chosen)])
        for chosen in permutations(range(len(large)), len(small))
    )
    assert stability([first, second]).mean == pytest.approx(best, abs=1e-6)


def test_stability_of_real_decoders_equals_scipy_on_cosines_from_loops(decoders) -> None:
    cosines = cosines_of(*decoders)
    rows, columns = linear_sum_assignment(-cosines)
    expected = cosines[rows, columns].mean()
    assert 0.3 < expected < 0.999
    assert stability(decoders).mean == pytest.approx(expected, abs=1e-5)


def test_stability_is_the_mean_over_all_pairs(generator) -> None:
    three = [torch.randn(20, 8, generator=generator) for _ in range(3)]
    pairs = [stability([three[i], three[j]]).mean for i, j in ((0, 1), (0, 2), (1, 2))]
    assert stability(three).mean == pytest.approx(np.mean(pairs), abs=1e-6)


def test_permuted_copies_of_any_length_match_fully_and_far_above_chance(
    decoders, generator
) -> None:
    order = torch.randperm(256, generator=generator)
    copy = decoders[0][order] * (0.1 + torch.rand(256, 1, generator=generator))
    found = stability([decoders[0], copy])
    assert found.mean == pytest.approx(1, abs=1e-5)
    assert found.chance < 0.8


def test_opposite_directions_do_not_match() -> None:
    assert stability([torch.eye(3), -torch.eye(3)]).mean == 0


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_independent_random_dictionaries_are_at_chance(generator, power, shift) -> None:
    scales = torch.arange(1, 65) ** -power
    dictionaries = [
        shift * scales.norm() + torch.randn(400, 64, generator=generator) * scales for _ in range(3)
    ]
    found = stability(dictionaries)
    assert found.mean == pytest.approx(found.chance, abs=0.005)


def test_chance_of_directions_with_a_shared_mean_is_that_mean_squared_or_more(generator) -> None:
    u = torch.nn.functional.normalize(3 + torch.randn(300, 16, generator=generator))
    found = stability([u, u[:, torch.randperm(16, generator=generator)]])
    assert found.chance > float(u.mean(0).square().sum()) > 0.8


def test_latents_that_are_dead_or_zero_are_left_out(generator) -> None:
    first, second = (torch.randn(12, 6, generator=generator) for _ in range(2))
    kept = torch.arange(12) % 3 > 0
    expected = stability([first[kept], second])
    assert stability([first, second], alive=[kept, torch.ones(12, dtype=torch.bool)]) == expected
    assert stability([first * kept[:, None], second]) == expected
    twins = torch.cat((first, first[:4]))
    of_eight = torch.arange(16) < 14
    assert redundancy(twins) == 8 / 16
    assert redundancy(twins, alive=of_eight) == 4 / 14
    assert redundancy(torch.cat((twins, torch.zeros(4, 6)))) == 8 / 16


def test_without_latents_there_is_no_number() -> None:
    assert math.isnan(redundancy(torch.zeros(3, 2)))
    assert all(map(math.isnan, stability([torch.eye(2), torch.zeros(3, 2)])))


def test_redundancy_of_real_decoders_equals_loops(decoders) -> None:
    cosines = cosines_of(decoders[0], decoders[0])
    for threshold in (0.6, 0.7, 0.75):
        expected = np.mean(
            [any(cosines[i, j] > threshold for j in range(256) if j != i) for i in range(256)]
        )
        assert 0 < expected < 1
        assert redundancy(decoders[0], threshold) == expected


def test_redundancy_looks_in_every_chunk(generator, monkeypatch) -> None:
    u = torch.randn(50, 30, generator=generator)
    u[49] = 2 * u[0]
    monkeypatch.setattr("monoloss_plugin.dictionary._COSINES", 150)
    assert redundancy(u) == 2 / 50


@pytest.mark.parametrize("of_another", [False, True])
def test_nearest_latents_of_real_decoders_equal_a_sort_of_cosines_from_loops(
    decoders, of_another
) -> None:
    cosines = cosines_of(decoders[0], decoders[1] if of_another else decoders[0])
    if not of_another:
        np.fill_diagonal(cosines, -2)
    expected = np.argsort(-cosines, axis=1)[:, :4]
    found = nearest_latents(decoders[0], decoders[1] if of_another else None, count=4)
    np.testing.assert_allclose(
        found.cosines, np.take_along_axis(cosines, expected, axis=1), atol=1e-6
    )
    # Two cosines may be the same but for rounding.
    assert (found.latents.numpy() == expected).mean() > 0.99
    taken = np.take_along_axis(cosines, found.latents.numpy(), axis=1)
    np.testing.assert_allclose(found.cosines, taken, atol=1e-6)
    assert found.latents.dtype == torch.int64
    assert found.cosines.dtype == torch.float32


def test_nearest_latents_leave_out_what_is_dead_or_zero(generator) -> None:
    u = torch.randn(12, 6, generator=generator)
    u[3] = 0
    alive = torch.arange(12) % 4 > 0  # 1, 2, 3, 5, 6, 7, 9, 10, 11, of which 3 is zero
    asked = [1, 2, 5, 6, 7, 9, 10, 11]
    found = nearest_latents(u, count=9, alive=alive)
    cosines = cosines_of(u[asked], u[asked])
    for i, latent in enumerate(asked):
        others = sorted(set(range(8)) - {i}, key=lambda j: -cosines[i, j])
        assert found.latents[latent].tolist() == [asked[j] for j in others] + [-1, -1]
        assert found.cosines[latent, 7:].isnan().all()
    rest = torch.tensor([0, 3, 4, 8])
    assert (found.latents[rest] == -1).all()
    assert found.cosines[rest].isnan().all()
    # In another dictionary, all count that are not zero, also the latent with the same number.
    in_other = nearest_latents(u, 2 * u, count=1, alive=alive)
    assert in_other.latents[asked, 0].tolist() == asked
    assert (in_other.latents[rest] == -1).all()
    assert (nearest_latents(torch.eye(1), count=2).latents == -1).all()
    assert (nearest_latents(torch.eye(2), torch.zeros(3, 2)).latents == -1).all()


def test_nearest_latents_look_in_every_chunk(generator, monkeypatch) -> None:
    u, v = (torch.randn(50, 30, generator=generator) for _ in range(2))
    whole, in_other = nearest_latents(u), nearest_latents(u, v)
    monkeypatch.setattr("monoloss_plugin.dictionary._COSINES", 150)
    torch.testing.assert_close(nearest_latents(u), whole)
    torch.testing.assert_close(nearest_latents(u, v), in_other)


def test_only_matching_needs_scipy(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert redundancy(torch.eye(2)) == 0
    assert nearest_latents(torch.eye(2), count=1).latents.tolist() == [[1], [0]]
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy\S*, which is not installed"):
        stability([torch.eye(2), torch.eye(2)])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: stability([torch.eye(2)]), ValueError, "dictionaries: expected at least two"),
        (lambda: stability(torch.eye(2)[0]), TypeError, "dictionaries: expected"),
        (lambda: stability([torch.eye(2), torch.eye(3)]), ValueError, "dictionaries: .*width 2"),
        (lambda: stability([torch.eye(2)] * 2, alive=[]), ValueError, "alive: expected one mask"),
        (lambda: stability([torch.full((2, 2), torch.nan)] * 2), ValueError, "dictionaries: cont"),
        (lambda: redundancy(torch.eye(2), 1.5), ValueError, "threshold: expected a cosine"),
        (lambda: redundancy(torch.eye(2), alive=torch.ones(2)), TypeError, "alive: expected bool"),
        (lambda: redundancy(torch.eye(2), alive=[True]), ValueError, r"alive: expected \(2,\)"),
        (lambda: redundancy([[1, 2]]), TypeError, "dictionary: expected a floating"),
        (lambda: nearest_latents(torch.eye(2), count=0), ValueError, "count: expected at least 1"),
        (lambda: nearest_latents(torch.eye(2), torch.eye(3)), ValueError, "other: expected width"),
        (lambda: nearest_latents(torch.eye(2), [[1, 2]]), TypeError, "other: expected a floating"),
    ],
)
def test_errors_name_the_argument(call, error, text) -> None:
    with pytest.raises(error, match=f"^{text}"):
        call()

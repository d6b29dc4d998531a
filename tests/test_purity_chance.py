"""Purity above chance: what the module says sample by sample, and 0 for what knows no class."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from monoloss_plugin import ClassPurity, functional
from monoloss_plugin.kernels.support import support_of
from tests import oracle


def adjusted_by_loops(latents: Tensor, labels: Tensor) -> np.ndarray:
    """Deal the samples of each class in turn; choose a class in one half, test it in the other."""
    classes, seen = labels.tolist(), Counter()
    halves: list[list[int]] = [[], []]
    for sample, label in enumerate(classes):
        halves[seen[label] % 2].append(sample)
        seen[label] += 1
    found = []
    for column in latents.T.tolist():
        active = above = 0.0
        for chosen_from, tested_on in (halves, halves[::-1]):
            votes = Counter(classes[n] for n in chosen_from if column[n] > 0)
            tested = [classes[n] for n in tested_on if column[n] > 0]
            if votes and tested:
                dominant = min(votes, key=lambda label: (-votes[label], label))
                share = sum(classes[n] == dominant for n in tested_on) / len(tested_on)
                active += len(tested)
                above += (tested.count(dominant) - len(tested) * share) / (1 - share)
        found.append(above / active if active else math.nan)
    return np.array(found)


def adjusted(latents: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    return functional.class_purity(latents, labels, num_classes).adjusted.numpy()


def labels_of(shares: list[float], num_rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(shares), num_rows, True, generator=generator)


@pytest.mark.parametrize("case", oracle.activation_cases())
@pytest.mark.parametrize("shares", [[1.0] * 5, [6.0, 3.0, 0.5, 0.5]])
def test_purity_above_chance_is_that_of_the_loops(case: str, shares: list[float], way: str):
    a, labels = oracle.activation_cases()[case], labels_of(shares, 40)
    found = adjusted(a, labels, len(shares))
    np.testing.assert_allclose(found, adjusted_by_loops(a, labels), rtol=1e-12, atol=1e-12)
    assert np.isnan(found).all() == (case == "one sample each")


def test_ties_go_to_the_lowest_label() -> None:
    labels = torch.tensor([0, 0, 1, 1])  # rows 0 and 2 are one half
    a = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    # Rows 0 and 2 tie, so they choose class 0, which row 1 has; row 1 chooses it too, and row 0 has
    # it: two hits of three, where chance is half.
    assert adjusted(a, labels, 2).tolist() == [pytest.approx((2 - 1.5) / (3 - 1.5))]
    # With the labels exchanged, the tie gives the class that row 1 does not have.
    assert adjusted(a, 1 - labels, 2).tolist() == [pytest.approx((1 - 1.5) / (3 - 1.5))]


def test_it_is_nan_where_a_half_has_no_active_sample_or_there_is_one_class() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    a = torch.zeros(4, 3)
    a[0, 0] = 1  # one sample
    a[[0, 2], 1] = 1  # two of the same half
    assert np.isnan(adjusted(a, labels, 2)).all()
    assert np.isnan(adjusted(torch.ones(4, 1), torch.zeros(4, dtype=torch.long), 1)).all()
    found = functional.class_purity(a, labels, 2)
    assert found.binary[:2].tolist() == [1.0, 0.5]
    assert math.isnan(found.mean_adjusted)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.8, 0.1, 0.1], [0.1] * 10])
def test_a_latent_of_one_class_has_one(shares: list[float]) -> None:
    labels = labels_of(shares, 300)
    a = torch.nn.functional.one_hot(labels).float()
    few = a * (torch.rand(300, 1) < 0.6)
    assert adjusted(torch.cat((a, few), 1), labels, len(shares)) == pytest.approx(1.0, abs=1e-12)


def random_latents(active: int, num_rows: int, count: int) -> Tensor:
    """Return latents (N, M) that are active on so many samples, chosen at random."""
    generator = torch.Generator().manual_seed(active)
    rows = torch.rand(count, num_rows, generator=generator).topk(active, dim=1).indices
    heights = 0.1 + torch.rand(count, active, generator=generator)
    return torch.zeros(count, num_rows).scatter_(1, rows, heights).T.contiguous()


ORDERS = {
    "as they come": lambda labels: labels,
    "sorted": lambda labels: labels.sort().values,
    "alternating": lambda labels: torch.arange(len(labels)) % 10,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("active", [2, 3, 5, 10])
def test_random_latents_are_at_chance_in_any_order_of_labels(active: int, order: str) -> None:
    labels = ORDERS[order](labels_of([0.1] * 10, 400))
    found = functional.class_purity(random_latents(active, 400, 8000), labels, 10)
    assert abs(found.mean_adjusted) < 0.02
    assert found.mean_binary > 0.1 + 0.15  # what it corrects


@pytest.mark.parametrize("active", [2, 3, 5])
def test_random_latents_are_at_chance_where_one_class_is_frequent(active: int) -> None:
    found = functional.class_purity(
        random_latents(active, 400, 8000), labels_of([0.8, 0.1, 0.1], 400), 3
    )
    assert abs(found.mean_adjusted) < 0.06


@pytest.mark.parametrize("case", ["sparse", "dense", "signed", "dead latents"])
def test_dense_sparse_and_support_agree_in_batches_of_any_size(case: str) -> None:
    a, labels = oracle.activation_cases()[case], labels_of([0.5, 0.3, 0.2], 40)
    whole = adjusted(a, labels, 3)
    assert not np.isnan(whole).all()
    forms = {"dense": lambda x: x, "sparse": lambda x: x.to_sparse(), "support": support_of}
    for form, make in forms.items():
        for size in (1, 7, 40):
            metric = ClassPurity(3)
            for rows in torch.arange(40).split(size):
                metric.update(make(a[rows]), labels[rows])
            np.testing.assert_array_equal(metric.compute().adjusted, whole, err_msg=form)

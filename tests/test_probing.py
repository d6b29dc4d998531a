"""Linear probes, against logistic regression and analysis of variance written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.feature_selection import f_classif

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.batch import Batch
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.probing import (
    anova_f,
    latents_of,
    preserved_accuracy,
    probe,
    small_budget_probe,
)


def digits(split):
    features = load_features("digits", split)
    every = next(iter(features.every_row(2000)))
    return unit_rows(every.features, torch.float32)[0], every.labels


@pytest.fixture(scope="module")
def train():
    return digits("train")


@pytest.fixture(scope="module")
def held_out():
    return digits("held_out")


@pytest.fixture(scope="module")
def sae():
    return load_pretrained("digits").sae


@pytest.fixture(scope="module")
def latents(sae, train, held_out):
    with torch.no_grad():
        return sae.encode(train[0]), sae.encode(held_out[0])


def predictions_by_torch(train, labels, *tests):
    """Predict with sum of cross-entropies + |w|²/2, minimized by torch on standardized columns."""
    x = train.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std[std == 0] = 1
    w = torch.zeros(x.shape[1], 10, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w, b], max_iter=2000, line_search_fn="strong_wolfe")

    def loss():
        lbfgs.zero_grad()
        scores = (x - mean) / std @ w + b
        total = torch.nn.functional.cross_entropy(scores, labels.long(), reduction="sum")
        value = (total + w.square().sum() / 2) / len(x)
        value.backward()
        return value

    lbfgs.step(loss)
    return [((t.double() - mean) / std @ w + b).argmax(1) for t in tests]


def share(predicted, labels) -> float:
    return (predicted == labels).double().mean().item()


def test_accuracy_on_features_and_latents_equals_logistic_regression_by_torch(
    train, held_out, latents
) -> None:
    for rows, tested in ((train[0], held_out[0]), latents):
        (predicted,) = predictions_by_torch(rows, train[1], tested)
        expected = share(predicted, held_out[1])
        assert 0.9 < expected < 1
        assert probe(rows, train[1], tested, held_out[1]) == pytest.approx(expected, abs=1e-3)


def test_sparse_and_dense_latents_agree(train, held_out, latents) -> None:
    sparse = [csr_array(part.numpy()) for part in latents]
    labels = train[1], held_out[1]
    dense_accuracy = probe(latents[0], labels[0], latents[1], labels[1])
    assert probe(sparse[0], labels[0], sparse[1], labels[1]) == pytest.approx(
        dense_accuracy, abs=1e-3
    )
    by_budget = small_budget_probe(latents[0], labels[0], latents[1], labels[1])
    assert small_budget_probe(sparse[0], labels[0], sparse[1], labels[1]) == by_budget
    torch.testing.assert_close(anova_f(sparse[0], labels[0]), anova_f(latents[0], labels[0]))


def test_one_probe_is_tested_on_features_and_on_reconstructions(
    train, held_out, latents, sae
) -> None:
    rebuilt = sae.decode(latents[1]).detach()
    predicted = predictions_by_torch(train[0], train[1], held_out[0], rebuilt)
    found = preserved_accuracy(*train, held_out[0], rebuilt, held_out[1])
    expected = [share(one, held_out[1]) for one in predicted]
    assert expected[0] != expected[1]
    assert found == pytest.approx(expected, abs=1e-3)


def test_f_equals_analysis_of_variance_written_out_and_scikit_learn(train, latents) -> None:
    a, y = latents[0].double().numpy(), train[1].numpy()
    groups = [a[y == c] for c in range(10)]
    between = sum(len(g) * (g.mean(0) - a.mean(0)) ** 2 for g in groups) / 9
    within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups) / (len(a) - 10)
    varies = a.std(0) > 0
    assert 100 < varies.sum() < 256
    f = anova_f(latents[0], train[1]).numpy()
    np.testing.assert_allclose(f[varies], between[varies] / within[varies], rtol=1e-8)
    np.testing.assert_allclose(f[varies], f_classif(a[:, varies], y)[0], rtol=1e-8)
    assert (f[~varies] == 0).all()


def test_budgets_probe_the_latents_with_the_largest_f(train, held_out, latents) -> None:
    best = anova_f(latents[0], train[1]).argsort(descending=True)
    found = small_budget_probe(latents[0], train[1], latents[1], held_out[1], (2, 16))
    for n in (2, 16):
        chosen = best[:n]
        (predicted,) = predictions_by_torch(latents[0][:, chosen], train[1], latents[1][:, chosen])
        assert found[n] == pytest.approx(share(predicted, held_out[1]), abs=1e-3)
    assert found[16] > found[2] + 0.2


@pytest.mark.parametrize("height", [0.1, 0.3, 1.0, 7.7])
def test_one_latent_that_equals_a_class_is_the_best_at_any_height(height) -> None:
    labels = torch.arange(90) % 2
    noise = torch.rand(90, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.cat((noise, height * (labels == 1).float().unsqueeze(1)), 1).double()
    assert int(anova_f(rows, labels).argmax()) == 5
    assert small_budget_probe(rows, labels, rows, labels, [1]) == {1: 1.0}


def test_shuffled_labels_give_chance(train, held_out, latents) -> None:
    shuffled = train[1][torch.randperm(1198, generator=torch.Generator().manual_seed(0))]
    for n, accuracy in small_budget_probe(
        latents[0], shuffled, latents[1], held_out[1], (4, 64)
    ).items():
        # 599 rows: the standard error of a share of 0.1 is 0.012.
        assert accuracy == pytest.approx(0.1, abs=0.05), n


def test_rows_without_a_class_change_nothing(train, held_out, latents) -> None:
    garbage = torch.full((7, 256), 1e3)
    none = torch.full((7,), -1)
    padded = [
        (torch.cat((garbage, rows)), torch.cat((none, labels.long())))
        for rows, labels in zip(latents, (train[1], held_out[1]), strict=True)
    ]
    expected = small_budget_probe(latents[0], train[1], latents[1], held_out[1], (8,))
    assert small_budget_probe(*padded[0], *padded[1], (8,)) == expected


def test_budgets_above_the_number_of_latents_are_left_out(train, held_out) -> None:
    found = small_budget_probe(train[0][:, :5], train[1], held_out[0][:, :5], held_out[1])
    assert list(found) == [1, 2, 4]


def test_dead_latents_give_the_share_of_the_most_frequent_class() -> None:
    dead, labels = torch.ones(6, 3), torch.tensor([1, 1, 1, 1, 0, 0])
    assert small_budget_probe(dead, labels, dead, labels, [2]) == {2: 4 / 6}


def test_latents_of_batches_equal_encode(sae, train, latents) -> None:
    rows = train[0]
    found = latents_of(sae, [rows[:500], Batch(rows[500:900]), rows[900:]])
    assert found.shape == (1198, 256)
    assert found.nnz == int((latents[0] != 0).sum())
    np.testing.assert_allclose(found.toarray(), latents[0].numpy(), atol=1e-5)


X, Y = torch.eye(4), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: probe(X, Y[:3], X, Y), ValueError, "train_labels: expected 4 rows"),
        (lambda: probe(X, Y * 0, X, Y), ValueError, "train_labels: expected at least two classes"),
        (lambda: probe(X, Y, X, Y * 0 - 1), ValueError, "held_out_labels: expected at least one"),
        (lambda: probe(X, Y, X[:, :3], Y), ValueError, "held_out: expected width 4"),
        (lambda: probe(X / 0, Y, X, Y), ValueError, "train: contains NaN"),
        (lambda: probe(X, Y.float(), X, Y), TypeError, "train_labels: expected integers"),
        (lambda: probe(X.int(), Y, X, Y), TypeError, "train: expected a floating-point"),
        (lambda: small_budget_probe(X, Y, X, Y, [0]), ValueError, "budgets: expected at least 1"),
        (lambda: anova_f(X, Y[:1]), ValueError, "labels: expected 4 rows"),
        (lambda: latents_of(None, []), ValueError, "batches: expected at least one"),
    ],
)
def test_errors_name_the_argument(call, error, text) -> None:
    with pytest.raises(error, match=f"^{text}"):
        call()

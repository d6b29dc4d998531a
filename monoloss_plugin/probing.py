"""What linear probes can read: from features, from latents, from few latents.

Every probe here is one multinomial logistic regression on inputs of unit variance. Latents may
come as a scipy CSR array, as :func:`latents_of` gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_labels,
    as_list,
    as_rows,
    require_at_least,
    require_finite,
)
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._sae import SAE
from monoloss_plugin.batch import Batch
from monoloss_plugin.spatial import ImagesOfBatch, pool

try:
    import numpy as np
    from scipy.sparse import coo_array, csr_array, issparse, vstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ModuleNotFoundError as error:
    raise missing_extra(error, "referee") from error

__all__ = [
    "PreservedAccuracy",
    "anova_f",
    "latents_of",
    "preserved_accuracy",
    "probe",
    "small_budget_probe",
]

_MOST_STEPS = 1000


class PreservedAccuracy(NamedTuple):
    """Held-out accuracies of one probe, which is trained on features."""

    on_features: float
    on_reconstructions: float


def probe(
    train: Tensor | csr_array,
    train_labels: Tensor,
    held_out: Tensor | csr_array,
    held_out_labels: Tensor,
) -> float:
    """Return the held-out accuracy of a linear probe.

    The probe is scikit-learn's multinomial ``LogisticRegression`` with its default penalty (C = 1)
    and an intercept, on columns scaled to unit variance on the training rows. Dense columns are
    centred too. That changes the speed and not the optimum, because the intercept has no penalty;
    so sparse inputs, which stay sparse, give the same probe.

    Args:
        train: (N, d), finite; a tensor or a scipy sparse array.
        train_labels: (N,) integer classes; rows with -1, no class, are dropped.
        held_out: (N', d), finite.
        held_out_labels: (N',) as ``train_labels``. A class without training rows counts as wrong.

    Returns:
        The share of held-out rows whose class the probe finds.

    Raises:
        TypeError: inputs that are not floating-point, or labels that are not integers.
        ValueError: shapes that do not match, NaN or infinite values, fewer than two classes to
            train on, or no held-out row with a class.

    Examples:
        >>> rows, labels = torch.tensor([[0.0], [0.1], [1.0], [1.1]]), torch.tensor([0, 0, 1, 1])
        >>> probe(rows, labels, torch.tensor([[-1.0], [2.0]]), torch.tensor([0, 0]))
        0.5
    """
    rows, classes = _to_train_on(train, train_labels, "train")
    return _accuracy(
        _fitted(rows, classes), *_to_test_on(held_out, held_out_labels, "held_out", rows.shape[1])
    )


def preserved_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    held_out_features: Tensor,
    held_out_reconstructions: Tensor,
    held_out_labels: Tensor,
) -> PreservedAccuracy:
    """Return how well a probe for features does on an SAE's reconstructions of them.

    The probe is that of :func:`probe`. It never sees a reconstruction in training.

    Args:
        train_features: (N, d), finite.
        train_labels: (N,) integer classes; rows with -1, no class, are dropped.
        held_out_features: (N', d), finite.
        held_out_reconstructions: (N', d), finite: what the SAE makes of ``held_out_features``.
        held_out_labels: (N',) as ``train_labels``.

    Raises:
        TypeError, ValueError: as :func:`probe`.
    """
    rows, classes = _to_train_on(train_features, train_labels, "train_features")
    fitted = _fitted(rows, classes)
    return PreservedAccuracy(
        *(
            _accuracy(fitted, *_to_test_on(given, held_out_labels, name, rows.shape[1]))
            for name, given in (
                ("held_out_features", held_out_features),
                ("held_out_reconstructions", held_out_reconstructions),
            )
        )
    )


def small_budget_probe(
    train_latents: Tensor | csr_array,
    train_labels: Tensor,
    held_out_latents: Tensor | csr_array,
    held_out_labels: Tensor,
    budgets: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
) -> dict[int, float]:
    """Return the held-out accuracy of probes that read only the n best latents.

    The best latents are those with the largest F over classes (:func:`anova_f`) on the training
    rows. Each latent is judged alone, so two of the best may say the same. Latents that never vary
    are not chosen; if fewer than n vary, the probe reads those.

    Args:
        train_latents: (N, M), finite; a tensor or a scipy sparse array.
        train_labels: (N,) integer classes; rows with -1, no class, are dropped.
        held_out_latents: (N', M), finite.
        held_out_labels: (N',) as ``train_labels``.
        budgets: the numbers of latents n, 1 or more; those above M are left out.

    Returns:
        For each n, the accuracy of :func:`probe`.

    Raises:
        TypeError, ValueError: as :func:`probe`; or a budget that is not an integer, or below 1.

    Examples:
        >>> latents, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
        >>> small_budget_probe(latents, labels, latents, labels)
        {1: 0.6666666666666666, 2: 1.0}

    Source: the k-sparse probing of Gurnee et al. 2023, arXiv 2305.01610, for many classes.
    """
    wanted = as_list(budgets, "budgets")
    for n in wanted:
        require_at_least(1, n, "budgets")
    rows, classes = _to_train_on(train_latents, train_labels, "train_latents")
    tested, tested_classes = _to_test_on(
        held_out_latents, held_out_labels, "held_out_latents", rows.shape[1]
    )
    best = _best_latents(rows, classes)[: max((n for n in wanted if n <= rows.shape[1]), default=0)]
    # Columns of so few latents are small, also as dense arrays.
    few, few_tested = (_dense(csr_array(given)[:, best]) for given in (rows, tested))
    return {
        n: _accuracy(_fitted(few[:, :n], classes), few_tested[:, :n], tested_classes)
        for n in wanted
        if n <= rows.shape[1]
    }


def anova_f(latents: Tensor | csr_array, labels: Tensor) -> Tensor:
    """Return the F of a one-way analysis of variance over classes, of each latent.

    It is scikit-learn's ``f_classif``, except where the variance within classes is zero: there
    rounding makes ``f_classif`` negative for about half of such latents, so that it ranks a latent
    that says the class perfectly last. Here their F is infinite, or as large as rounding lets it.

    Args:
        latents: (N, M), finite; a tensor or a scipy sparse array.
        labels: (N,) integer classes; rows with -1, no class, are dropped.

    Returns:
        (M,) float64 on the CPU, at least 0; 0 for latents that never vary.

    Raises:
        TypeError, ValueError: as :func:`probe`.
    """
    return torch.from_numpy(_anova_f(*_to_train_on(latents, labels, "latents")))


@torch.no_grad()
def latents_of(sae: SAE, batches: Iterable[Batch | Tensor]) -> csr_array:
    """Return the latents of all batches as a scipy CSR array (N, M) in float32.

    It takes 8 bytes for each entry that is not zero. There is never a dense array but of one batch.

    If samples are patches, there is a row for each image: the mean of its patches' latents, of
    which only positive ones count. All patches of an image must be in one batch. The images of a
    batch are in ascending order.

    Args:
        sae: anything with ``encode``, such as a SAELens SAE.
        batches: features (B, d_in), or a :class:`~monoloss_plugin.batch.Batch` of them, on the
            SAE's device and scaled as it was trained.

    Raises:
        TypeError: features that are not floating-point.
        ValueError: no batches.
    """
    parts = []
    for batch in batches:
        features = as_rows(batch.features if isinstance(batch, Batch) else batch, "batches")
        latents = as_rows(sae.encode(features), "sae.encode(features)", keep_sparse=True)
        if isinstance(batch, Batch) and batch.images is not None:
            images = ImagesOfBatch.of(batch.images, latents.device)
            latents = pool(latents, images).mean.by_sample().to_sparse_coo()
        entries = latents.to_sparse().coalesce().cpu()
        values = entries.values().float().numpy()
        parts.append(coo_array((values, tuple(entries.indices().numpy())), latents.shape).tocsr())
    if not parts:
        raise ValueError("batches: expected at least one, got none")
    return vstack(parts, format="csr")


def _to_train_on(rows: Any, labels: Any, name: str) -> tuple[Any, Any]:
    """Return the rows (n, d) in float64 that have a class, and their classes (n,)."""
    label_name = "labels" if name == "latents" else "train_labels"
    rows, classes = _labelled(rows, labels, name, label_name)
    if len(np.unique(classes)) < 2:
        raise ValueError(
            f"{label_name}: expected at least two classes, got {len(np.unique(classes))}"
        )
    return rows, classes


def _to_test_on(rows: Any, labels: Any, name: str, width: int) -> tuple[Any, Any]:
    """Return the rows (n, width) in float64 that have a class, and their classes (n,)."""
    rows, classes = _labelled(rows, labels, name, "held_out_labels")
    if rows.shape[1] != width:
        raise ValueError(f"{name}: expected width {width} as in training, got {rows.shape[1]}")
    if not len(classes):
        raise ValueError("held_out_labels: expected at least one row with a class, got none")
    return rows, classes


def _labelled(rows: Any, labels: Any, name: str, label_name: str) -> tuple[Any, Any]:
    classes = as_labels(labels, label_name).detach().cpu().flatten().numpy()
    if issparse(rows):
        matrix = csr_array(rows, dtype=np.float64)
        require_finite(torch.from_numpy(matrix.data), name)
    else:
        tensor = as_rows(rows, name).detach().cpu().double()
        require_finite(tensor, name)
        matrix = tensor.numpy()
    if matrix.shape[0] != len(classes):
        raise ValueError(
            f"{label_name}: expected {matrix.shape[0]} rows to match {name}, got {len(classes)}"
        )
    has_class = classes != -1
    return (matrix, classes) if has_class.all() else (matrix[has_class], classes[has_class])


def _fitted(rows: Any, classes: Any) -> Any:
    # lbfgs takes sparse rows and all classes at once; each step costs as the entries.
    return make_pipeline(
        StandardScaler(with_mean=not issparse(rows)), LogisticRegression(max_iter=_MOST_STEPS)
    ).fit(rows, classes)


def _accuracy(fitted: Any, rows: Any, classes: Any) -> float:
    return float((fitted.predict(rows) == classes).mean())


def _anova_f(rows: Any, classes: Any) -> Any:
    """Return F of each column (M,), for rows (N, M) and their classes."""
    latents = csr_array(rows)
    _, member, counts = np.unique(classes, return_inverse=True, return_counts=True)
    total, groups = len(member), len(counts)
    ones = np.ones(total)
    sums = _dense(csr_array((ones, (member, np.arange(total))), (groups, total)) @ latents)
    means = sums / counts[:, None]
    between = (counts[:, None] * (means - sums.sum(0) / total) ** 2).sum(0)
    squares = np.asarray(latents.power(2).sum(axis=0)).ravel()
    within = (squares - (sums * means).sum(0)).clip(min=0)  # rounding may take it below 0
    # An exact look: rounding would give a constant latent some variance.
    varies = _dense(latents.max(axis=0)).ravel() != _dense(latents.min(axis=0)).ravel()
    with np.errstate(divide="ignore", invalid="ignore"):
        f = (between / (groups - 1)) / (within / max(total - groups, 1))
    return np.where(varies, f, 0.0)


def _best_latents(rows: Any, classes: Any) -> Any:
    """Return the latents that vary, best first; ties go to the lowest index."""
    f = _anova_f(rows, classes)
    # If none varies, one that is constant lets the probe learn the most frequent class.
    return np.argsort(-f, kind="stable")[: max(1, int((f > 0).sum()))]


def _dense(matrix: Any) -> Any:
    return matrix.toarray()

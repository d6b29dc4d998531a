"""The streaming metrics as ``torchmetrics.Metric``, for Lightning and MetricCollection.

These are thin shells around :mod:`monoloss_plugin.metrics`. They reduce over ranks by all-reduce,
because torchmetrics would gather the whole state of every rank. So they do not use ``add_state``,
and a ``state_dict`` does not hold their state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from monoloss_plugin import metrics
from monoloss_plugin._checks import require_choice
from monoloss_plugin._optional import missing_extra

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.exceptions import TorchMetricsUserError
except ModuleNotFoundError as error:
    raise missing_extra(error, "metrics") from error


_Ours = metrics.MonoScore | metrics.ClassPurity


class _AllReduced(Metric):
    """A torchmetrics metric that holds one of our metrics."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, make: Callable[[], _Ours], **options: Any) -> None:
        super().__init__(**options)
        self._make = make
        self._state = make()
        self._own: _Ours | None = None
        """This rank's own state, while the state of all ranks is in use."""

    def update(self, *inputs: Tensor) -> None:
        """Add a batch, with the arguments of the metric in :mod:`monoloss_plugin.metrics`."""
        self._state.update(*inputs)

    def forward(self, *inputs: Tensor) -> Any:
        """Add a batch, and return the value of that batch."""
        self.update(*inputs)
        whole, self._state = self._state, self._make()
        try:
            self._state.update(*inputs)
            return self._value()
        finally:
            self._state = whole

    def compute(self) -> Any:
        """Return the value over everything that all ranks have seen."""
        return self._value()

    def _value(self) -> Any:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._state = self._make()
        self._own = None

    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> None:
        """Use the state of all ranks, until :meth:`unsync`."""
        if self._is_synced and should_sync:
            raise TorchMetricsUserError("The metric has already been synced.")
        available = distributed_available or self.distributed_available_fn
        if not should_sync or available is None or not available():
            return
        self._own, self._state = self._state, copy.deepcopy(self._state)
        self._state.all_reduce_(process_group or self.process_group)
        self._is_synced = True

    def unsync(self, should_unsync: bool = True) -> None:
        """Use this rank's own state again."""
        if not should_unsync:
            return
        if self._own is None:
            raise TorchMetricsUserError("The metric has not been synced.")
        self._state, self._own = self._own, None
        self._is_synced = False


class MonoScore(_AllReduced):
    """MonoScore over a dataset; see :class:`monoloss_plugin.MonoScore`.

    Args:
        reduction: "mean" over all latents (an undefined score counts as 0), "mean_defined" over
            the defined latents, or "none" for the (M,) scores.
        options: options of ``torchmetrics.Metric``.

    Raises:
        ValueError: an unknown reduction.

    Examples:
        >>> metric = MonoScore()
        >>> metric.update(torch.tensor([[1.0], [1.0], [0.0]]), torch.eye(2)[[0, 0, 1]])
        >>> metric.compute()
        tensor(1., dtype=torch.float64)

    Source: Nasiri-Sarvi et al. 2026, eq. 2; Pach et al. 2025.
    """

    _state: metrics.MonoScore

    def __init__(
        self, reduction: Literal["mean", "mean_defined", "none"] = "mean", **options: Any
    ) -> None:
        require_choice(reduction, "reduction", ("mean", "mean_defined", "none"))
        super().__init__(metrics.MonoScore, **options)
        self.reduction = reduction

    def _value(self) -> Tensor:
        result = self._state.compute()
        if self.reduction == "none":
            return result.scores
        mean = result.mean if self.reduction == "mean" else result.mean_defined
        return torch.tensor(mean, dtype=torch.float64, device=result.scores.device)


class ClassPurity(_AllReduced):
    """Mean class purity over the latents that are ever active.

    ``compute`` returns a dict with "purity_binary" and "purity_weighted"; see
    :class:`monoloss_plugin.ClassPurity`.

    Args:
        num_classes: number of classes.
        options: options of ``torchmetrics.Metric``.

    Raises:
        ValueError: num_classes below 1.

    Examples:
        >>> purity = ClassPurity(num_classes=2)
        >>> purity.update(torch.tensor([[2.0], [1.0], [1.0]]), torch.tensor([0, 0, 1]))
        >>> purity.compute()["purity_weighted"]
        tensor(0.7500, dtype=torch.float64)

    Source: Nasiri-Sarvi et al. 2026, section 4.1.
    """

    _state: metrics.ClassPurity

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(lambda: metrics.ClassPurity(num_classes), **options)

    def _value(self) -> dict[str, Tensor]:
        purity = self._state.compute()
        return {
            "purity_binary": purity.binary.nanmean(),
            "purity_weighted": purity.weighted.nanmean(),
        }

"""What the streaming metrics share: merging, reduction over ranks, saving and loading.

A metric's state is a few tensors that its updates change in place. The metric says once, in
``REDUCED_BY``, how each of them combines over two parts of the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from monoloss_plugin._places import kind_of
from monoloss_plugin._ranks import gather_numbers


class State(Protocol):
    """The sums of a metric."""

    @property
    def shape(self) -> tuple[int, int]:
        """The two sizes on which all parts of the data must agree."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        ...


S = TypeVar("S", bound=State)

_IN_PLACE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda mine, theirs: mine.add_(theirs),
    "min": lambda mine, theirs: torch.minimum(mine, theirs, out=mine),
    "max": lambda mine, theirs: torch.maximum(mine, theirs, out=mine),
}


class StreamingMetric(ABC, Generic[S]):
    """A metric over data that comes in batches, shards and ranks, in any order."""

    REDUCED_BY: ClassVar[Mapping[str, Literal["sum", "min", "max"]]]
    """How each tensor of the state combines over parts of the data."""
    SIZES: ClassVar[str]
    """What the two sizes of the state's shape are, as an error calls them."""
    SIZED_BY: ClassVar[str]
    """The tensor of the state that has this shape."""

    def __init__(self) -> None:
        self._state: S | None = None
        self._is_a_copy = False
        """After all_reduce_ all ranks hold the same sums, and only rank 0 counts them again."""

    @abstractmethod
    def _zeros(self, shape: tuple[int, int], device: torch.device) -> S:
        """Return a state of no samples."""

    def _check_sizes(self, shape: tuple[int, ...], argument: str) -> None:
        """Raise ValueError if a state of this shape is not this metric's."""

    def _lower_to_(self, state: S, minima: dict[str, Tensor]) -> None:
        """Rewrite a state for lower minima. Sums of two states add up only if these agree."""

    def _own(self, shape: tuple[int, int], device: torch.device) -> S:
        """Return the state to add to: this rank's own, or a new one.

        Call :meth:`_keep` once the update has succeeded; until then the metric is unchanged.
        """
        if self._state is None or self._is_a_copy:
            return self._zeros(shape, device)
        return self._state

    def _keep(self, state: S) -> None:
        self._state, self._is_a_copy = state, False

    def _seen(self) -> S:
        if self._state is None:
            raise ValueError(f"{type(self).__name__}.compute: no data yet; call update first")
        return self._state

    @torch.no_grad()
    def merge(self, other: Any) -> None:
        """Add what another metric of the same class has seen; ``other`` does not change.

        Raises:
            TypeError: a metric of another class.
            ValueError: the two metrics saw data of different sizes.
        """
        if not isinstance(other, type(self)):
            raise TypeError(f"other: expected a {type(self).__name__}, got {kind_of(other)}")
        if other._state is None:
            return
        self._check_sizes(other._state.shape, "other")
        mine = self._own(other._state.shape, _device_of(other._state))
        if mine.shape != other._state.shape:
            raise ValueError(f"other: expected {self.SIZES} {mine.shape}, got {other._state.shape}")
        theirs = self._zeros(mine.shape, _device_of(mine))
        _fill_(theirs, other._state.tensors())
        held, added = mine.tensors(), theirs.tensors()
        minima = {name: torch.minimum(held[name], added[name]) for name in self._minima()}
        for state in (mine, theirs):
            self._lower_to_(state, minima)
        for name, how in self.REDUCED_BY.items():
            _IN_PLACE[how](held[name], added[name])
        self._keep(mine)

    @torch.no_grad()
    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> None:
        """Give every rank the sums of all ranks, by all-reduce.

        Each rank sends its state once, however many ranks there are. Ranks that saw no data take
        part too. You may call it again: what all ranks hold counts once. After more updates, call
        it again before you compute.

        Raises:
            ValueError: no rank has seen any data, or ranks saw data of different sizes. Every rank
                raises the same error.
        """
        device = _device_of(self._state) if self._state is not None else _collective_device(group)
        own = None if self._is_a_copy else self._state
        said = {(a, b) for a, b in gather_numbers(own.shape if own else (0, 0), device, group)}
        shapes = sorted(said - {(0, 0)})
        call = f"{type(self).__name__}.all_reduce_"
        if not shapes:
            raise ValueError(f"{call}: no rank has seen any data")
        if len(shapes) > 1:
            found = ", ".join(map(str, shapes))
            raise ValueError(f"{call}: ranks have different {self.SIZES}: {found}")
        state = self._own(shapes[0], device)
        held = state.tensors()
        minima = {name: held[name].clone() for name in self._minima()}
        for tensor in minima.values():
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group)
        self._lower_to_(state, minima)
        for name, how in self.REDUCED_BY.items():
            dist.all_reduce(held[name], getattr(dist.ReduceOp, how.upper()), group)
        self._state, self._is_a_copy = state, dist.get_rank(group) != 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state, by name; empty before the first batch."""
        tensors = {} if self._state is None else self._state.tensors()
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            TypeError: not tensors by name.
            ValueError: an entry is missing or has another shape than the others ask for.
        """
        if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
            raise TypeError(
                f"state: expected tensors by name, as state_dict gives them, got {kind_of(state)}"
            )
        loaded = None
        if state:
            missing = [name for name in self.REDUCED_BY if name not in state]
            if missing:
                names = list(self.REDUCED_BY)
                raise ValueError(f"state: expected the entries {names}, missing {missing}")
            sized = state[self.SIZED_BY]
            if sized.ndim != 2:
                raise ValueError(f"state: expected {self.SIZES}, got {tuple(sized.shape)}")
            self._check_sizes(sized.shape, "state")
            loaded = self._zeros((sized.shape[0], sized.shape[1]), sized.device)
            _fill_(loaded, state)
        self._state, self._is_a_copy = loaded, False

    def _minima(self) -> list[str]:
        return [name for name, how in self.REDUCED_BY.items() if how == "min"]


def _device_of(state: State) -> torch.device:
    return next(iter(state.tensors().values())).device


@torch.no_grad()
def _fill_(state: State, values: Mapping[str, Tensor]) -> None:
    for name, tensor in state.tensors().items():
        if tensor.shape != values[name].shape:
            wanted, got = tuple(tensor.shape), tuple(values[name].shape)
            raise ValueError(f"state: expected {name} of shape {wanted}, got {got}")
        tensor.copy_(values[name])


def _collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Return where a rank without data keeps its part: the current GPU under NCCL, else the CPU."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

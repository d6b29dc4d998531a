"""MonoLoss on any module, in a training loop of your own.

::

    from monoloss_plugin import MonoLoss, attach

    monoloss = attach(sae, MonoLoss(lam=3e-4), latents="encoder", reduction="mean")
    for x in batches:
        loss = (sae(x) - x).square().mean() + monoloss()

If the loop is a library's, and the module's output holds its loss, ``add`` adds the term there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import require_choice, require_text
from monoloss_plugin._places import kind_of
from monoloss_plugin.attaching import AttachedTerm, Attachment, require_embeddings
from monoloss_plugin.finetuning.recorder import LatentRecorder
from monoloss_plugin.kernels.batch import GradientAt
from monoloss_plugin.losses import LossHandle, LossTerm, Reduction
from monoloss_plugin.sae_terms import Embeddings, LamConversion, SaeTerms, require_nonnegative

__all__ = ["AttachedLoss", "Call", "attach"]

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """One call of a module: where a function finds the tensors of a step."""

    module: nn.Module
    """The module, with whatever attributes the call has set."""
    inputs: tuple[Any, ...]
    """The arguments by position."""
    options: dict[str, Any]
    """The arguments by name."""
    output: Any
    """What the module returned."""


Place: TypeAlias = str | nn.Module | Callable[[Call], Tensor]
"""Where a tensor is: a layer or its path, whose output it is; or a function of the call."""


def attach(
    module: nn.Module,
    loss: LossTerm,
    *,
    latents: Place,
    inputs: Place | None = None,
    pre_acts: Place | None = None,
    embeddings: Embeddings | None = None,
    reduction: Reduction | None = None,
    gradient_at: GradientAt = "all",
    method: str = "forward",
    add: Callable[[Any, Tensor], Any] | None = None,
    warm_up_steps: int = 0,
    start: int = 0,
) -> AttachedLoss:
    """Add a loss term to a module that you train in a loop of your own.

    A call of the module in training, with gradients, is a step. Call what you get after it: it
    returns the weighted term, to add to your loss. In evaluation it returns zero.

    Args:
        module: such as an SAE. Only this instance changes, and no state dict does.
        loss: the term, such as ``MonoLoss(lam=3e-4)``.
        latents: where the latents (..., M) are: a layer of the module or its path, whose output
            they are, or a function such as ``lambda call: call.output[1]``. See :class:`Call`.
        inputs: where the inputs (..., d_in) are that your loss reconstructs and that samples are
            compared by; by default the first argument.
        pre_acts: where the activations (..., M) before a Top-k selection are; only for the Top-k
            regularizers.
        embeddings: a function from the inputs (B, d_in) to the similarity space (B, d) of the same
            samples, or to a :class:`~monoloss_plugin.batch.Batch`. By default the inputs.
        reduction: how your loss reduces its squared error, to convert lam: see
            :data:`~monoloss_plugin.losses.Reduction`. Not needed with ``lam_units="raw"``.
        gradient_at: "active" if the latents come from a ReLU, TopK or BatchTopK: the same result,
            faster. "all" otherwise.
        method: the method to watch, if you do not call the module itself.
        add: a function of the output and the term that returns the output with the term in it.
            Then you need not call what you get. For a loop that you cannot change.
        warm_up_steps: the weight grows linearly from 0 over this many steps.
        start: the weight is 0 before this step; the warm-up counts from there.

    Returns:
        The attached loss. Call it for the term; its ``remove()`` takes the loss away.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no such layer or method, an option is unknown, a term of that name is
            attached already, the term needs ``pre_acts`` or a ``reduction``, or the module is
            compiled already; in a step, the latents are negative and the term reads 0 as "not
            active", or shapes do not match.

    Examples:
        >>> from monoloss_plugin import MonoLoss
        >>> sae = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> monoloss = attach(sae, MonoLoss(lam=0.1), latents="1", reduction="mean")
        >>> x = torch.randn(16, 4)
        >>> loss = (sae(x) - x).square().mean() + monoloss()
        >>> loss.backward()
        >>> sorted(monoloss.metrics)
        ['monoloss', 'monoscore', 'monoscore_defined']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {kind_of(module)}")
    if hasattr(module, "_orig_mod"):
        raise ValueError("module: it is compiled already; attach the loss first, then compile")
    attached = AttachedLoss(
        loss,
        warm_up_steps,
        embeddings,
        start=start,
        method=method,
        add=add,
        gradient_at=gradient_at,
    )
    attached.first_step(float("inf"))  # an error for a share of an unknown run
    if embeddings is not None:
        require_embeddings(embeddings)
    require_text(method, "method")
    if not callable(getattr(module, method, None)):
        raise ValueError(f"method: {type(module).__name__} has no method {method!r}")
    if reduction is not None:
        require_choice(reduction, "reduction", get_args(Reduction))
    elif loss.lam_units != "raw":
        raise ValueError(
            f"reduction: lam is measured against {loss.lam_units!r}; say how your loss reduces its "
            f"squared error ({', '.join(get_args(Reduction))}), or give {loss.name} "
            "lam_units='raw'"
        )
    if loss.needs_selection and pre_acts is None:
        raise ValueError(f"pre_acts: {loss.name} needs the activations before the selection")
    attached.terms = SaeTerms(LamConversion("Your loop", reduction or "sum", logger))
    places: dict[str, Any] = {"latents": latents, "inputs": inputs or _first, "pre_acts": pre_acts}
    Attachment.require_free(module, loss.name)
    attached.readers = {
        name: place if _is_function(place, name) else _LayerOutput(LatentRecorder(module, place))
        for name, place in places.items()
        if place is not None
    }
    attached.handle = _Attachment.of(module, (method,)).add(attached, attached.stop)
    return attached


def _first(call: Call) -> Any:
    """Return a call's first argument."""
    return call.inputs[0] if call.inputs else next(iter(call.options.values()))


def _is_function(place: Any, name: str) -> bool:
    """Return whether a place is a function of the call, and not a layer."""
    if isinstance(place, nn.Module) or (isinstance(place, str) and place):
        return False
    if callable(place) and not isinstance(place, type):
        return True
    raise TypeError(
        f"{name}: expected a layer, its path, or a function of the call, got {kind_of(place)}"
    )


class _LayerOutput:
    """Reads what a layer gave in a call."""

    def __init__(self, recorder: LatentRecorder) -> None:
        self.recorder = recorder

    def __call__(self, call: Call) -> Tensor:
        return self.recorder.take_any()


@dataclass
class AttachedLoss(AttachedTerm):
    """A loss on a module. Call it after the module, for the term to add to your loss."""

    method: str = "forward"
    add: Callable[[Any, Tensor], Any] | None = None
    gradient_at: GradientAt = "all"
    terms: SaeTerms = field(init=False, repr=False)
    readers: dict[str, Callable[[Call], Tensor]] = field(init=False, repr=False)
    handle: LossHandle = field(init=False, repr=False)
    _tensors: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The weighted term and its metrics of the last step, to log."""
        return self.terms.metrics

    def __call__(self) -> Tensor:
        """Return the weighted term of the module's last call; zero if that was in evaluation.

        Raises:
            RuntimeError: the module was not called since the last step.
        """
        tensors, self._tensors = self._tensors, None
        if tensors is None:
            raise RuntimeError(
                f"{self.term.name}: the module's {self.method} was not called since the last step"
            )
        if not tensors:
            return torch.zeros(())
        if not self.terms.steps and self.term.needs_nonnegative:
            require_nonnegative(tensors["latents"], self.term)
        value: Tensor = self.terms.add_up([self], **tensors, gradient_at=self.gradient_at)
        return value

    def record(self, call: Call) -> None:
        """Keep the tensors of a call until the term is asked for."""
        trains = call.module.training and torch.is_grad_enabled()
        found = {name: read(call) for name, read in self.readers.items()}
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor in the call, got {kind_of(tensor)}")
        self._tensors = found if trains else {}

    def remove(self) -> None:
        """Take the loss away."""
        self.handle.remove()

    def stop(self) -> None:
        """Take the hooks away."""
        for reader in self.readers.values():
            if isinstance(reader, _LayerOutput):
                reader.recorder.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how many steps are done, and what lam became."""
        return self.terms.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the run that saved this state."""
        self.terms.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module copies its terms. A step's tensors belong to a graph.
        return {**self.__dict__, "_tensors": None}


class _Attachment(Attachment[AttachedLoss]):
    """The terms of one module, at whichever methods they watch."""

    replaces = ()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.__dict__.get("_replaced", {}):
            raise AttributeError(name)
        return partial(self._watch, name)

    def _watch(self, method: str, inner: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Return the method's output, with the terms that it takes."""
        output = inner(*inputs, **options)
        for attached in self.terms.values():
            if attached.method == method:
                output = self._add(attached, Call(self.target, inputs, options, output))
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, attached: AttachedLoss, call: Call) -> Any:
        attached.record(call)
        if attached.add is None or not attached._tensors:
            return call.output
        return attached.add(call.output, attached())

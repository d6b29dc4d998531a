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
from inspect import signature
from typing import Any, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import require_choice, require_text
from monoloss_plugin._places import kind_of
from monoloss_plugin.attaching import AttachedTerm, Attachment, require_embeddings
from monoloss_plugin.finetuning.recorder import LatentRecorder
from monoloss_plugin.kernels.batch import GradientAt
from monoloss_plugin.losses import LossHandle, LossTerm, Reduction
from monoloss_plugin.sae_terms import Embeddings, LamConversion, SaeTerms

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

    Call what you get after a call of the module in training: it returns the weighted term, to add
    to your loss, and counts a step. After a call in evaluation it returns zero.

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
            compiled already; in a step, the latents carry no gradient, are negative although the
            term reads 0 as "not active", shapes do not match, or a layer gives several tensors.

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
    _forget_copied(module, loss.name)
    Attachment.require_free(module, loss.name)
    first = _FirstArgument(next(iter(signature(getattr(module, method)).parameters), ""))
    places = {"latents": latents, "inputs": inputs or first, "pre_acts": pre_acts}
    try:
        for name, place in places.items():
            if place is not None:
                attached.readers[name] = _reader(module, place, name)
        attached.handle = _Attachment.of(module, (method,)).add(attached, attached.stop)
    except Exception:
        attached.stop()
        raise
    return attached


def _forget_copied(module: nn.Module, name: str) -> None:
    """Take away a term that a copy of a module has from the original. Nobody holds its handle."""
    attachment = _Attachment.on(module)
    found = attachment.terms.get(name) if attachment is not None else None
    if attachment is not None and isinstance(found, AttachedLoss) and found.handle is None:
        recorders = found._recorders()
        for part in module.modules():
            for key, hook in list(part._forward_hooks.items()):
                if getattr(hook, "__self__", None) in recorders:
                    del part._forward_hooks[key]
        del attachment.terms[name]


def _reader(module: nn.Module, place: Any, name: str) -> Callable[[Call], Any]:
    """Return a function of the call that gives the tensor of a place."""
    if isinstance(place, nn.Module) or (isinstance(place, str) and place):
        return _LayerOutput(LatentRecorder(module, place), name)
    if callable(place) and not isinstance(place, type):
        return place  # type: ignore[no-any-return]
    raise TypeError(
        f"{name}: expected a layer, its path, or a function of the call, got {kind_of(place)}"
    )


class _FirstArgument:
    """Reads the first argument of a call, which may be given by its name."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def __call__(self, call: Call) -> Any:
        if call.inputs:
            return call.inputs[0]
        if self.parameter in call.options:
            return call.options[self.parameter]
        raise ValueError(
            "inputs: the call has no first argument; say where the inputs are, such as "
            "inputs=lambda call: call.options['x']"
        )


class _LayerOutput:
    """Reads what a layer gave in a call."""

    def __init__(self, recorder: LatentRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, call: Call) -> Tensor:
        runs = self.recorder.runs
        if runs > 1 or (runs and self.recorder.gave_several):
            what = f"ran {runs} times" if runs > 1 else "gave several tensors"
            raise ValueError(
                f"{self.name}: the layer {what} in one call; say which tensor you mean with a "
                "function, such as lambda call: call.output[1]"
            )
        return self.recorder.take_any()


@dataclass
class AttachedLoss(AttachedTerm):
    """A loss on a module. Call it after the module, for the term to add to your loss."""

    method: str = "forward"
    add: Callable[[Any, Tensor], Any] | None = None
    gradient_at: GradientAt = "all"
    terms: SaeTerms = field(init=False, repr=False)
    readers: dict[str, Callable[[Call], Any]] = field(default_factory=dict, repr=False)
    handle: LossHandle | None = field(default=None, repr=False)
    """None on a copy of the module."""
    _tensors: dict[str, Tensor] | None = field(default=None, repr=False)
    """Of the last call in training, until the term is asked for; empty of one in evaluation."""
    _trained: bool = False
    """There was a call in training with gradients."""

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
        if not tensors["latents"].requires_grad:
            raise ValueError(
                f"latents: they carry no gradient, so {self.term.name} can do nothing; name what "
                "the module computes them from, before any detach() or no_grad()"
            )
        value: Tensor = self.terms.add_up([self], **tensors, gradient_at=self.gradient_at)
        return value

    def require_trained(self) -> None:
        """Raise ValueError for a call that a checkpoint repeats, if the first had no gradient."""
        if not self._trained:
            raise ValueError(
                f"{self.term.name}: the module runs inside a checkpoint with use_reentrant=True, "
                "whose first pass has no gradient; use use_reentrant=False"
            )

    def record(self, call: Call) -> None:
        """Keep the tensors of a call until the term is asked for."""
        trains = call.module.training and torch.is_grad_enabled()
        self._trained |= trains
        found = {name: read(call) for name, read in self.readers.items()}
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor in the call, got {kind_of(tensor)}")
        if trains:
            self._tensors = found
        elif not self._tensors:  # a call in evaluation does not take the place of one in training
            self._tensors = {}

    def remove(self) -> None:
        """Take the loss away."""
        if self.handle is not None:
            self.handle.remove()

    def forget(self) -> None:
        """Forget what layers gave before."""
        for recorder in self._recorders():
            recorder.forget()

    def stop(self) -> None:
        """Take the hooks away."""
        for recorder in self._recorders():
            recorder.remove()

    def _recorders(self) -> list[LatentRecorder]:
        return [one.recorder for one in self.readers.values() if isinstance(one, _LayerOutput)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how many steps are done, and what lam became."""
        return self.terms.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the run that saved this state."""
        self.terms.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module copies its terms. A step's tensors belong to a graph, and the handle
        # to the original.
        return {**self.__dict__, "_tensors": None, "handle": None}


class _Attachment(Attachment[AttachedLoss]):
    """The terms of one module, at whichever methods they watch."""

    replaces = ()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.__dict__.get("_replaced", {}):
            raise AttributeError(name)
        return partial(self._watch, name)

    def _watch(self, method: str, inner: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Return the method's output, with the terms that it takes."""
        watching = [attached for attached in self.terms.values() if attached.method == method]
        for attached in watching:
            attached.forget()  # what is left of a call that failed, or that a checkpoint stopped
        output = inner(*inputs, **options)
        for attached in watching:
            output = self._add(attached, Call(self.target, inputs, options, output))
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, attached: AttachedLoss, call: Call) -> Any:
        # A checkpoint repeats its calls in the backward pass; torch.utils.checkpoint asks the same.
        repeated = torch._C._current_graph_task_id() >= 0
        if repeated:
            attached.require_trained()
            if attached.add is None:  # the term of the first pass is in the loss already
                attached.forget()
                return call.output
        attached.record(call)
        if attached.add is None or not attached._tensors:
            return call.output
        if repeated:
            attached.terms.steps -= 1  # the first pass has counted it
        return attached.add(call.output, attached())

"""How every adapter attaches loss terms to a host's object, records them and undoes it.

An adapter subclasses :class:`Attachment`. It names the host's methods that it replaces, and has a
method of the same name for each::

    class _Attachment(Attachment[AttachedTerm]):
        replaces = ("loss",)

        def loss(self, inner, x):
            value = inner(x)  # the host's own method
            for attached in self.terms.values():
                value = value + ...
            return value

    handle = _Attachment.of(host).add(AttachedTerm(MonoLoss(lam=0.1)))
    handle.remove()
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from monoloss_plugin._checks import require_at_least, require_number
from monoloss_plugin._places import kind_of
from monoloss_plugin.hosts import moved_seam
from monoloss_plugin.losses import LossHandle, LossTerm, StepTensors

if TYPE_CHECKING:
    from typing_extensions import Self

_KEY = "_monoloss_attachment"
"""The attribute of the host's object that holds its attachment."""


@dataclass
class AttachedTerm:
    """A loss term and the options it was attached with."""

    term: LossTerm
    warm_up_steps: int = 0
    embeddings: Callable[[Any], Any] | None = None
    """Maps what the host offers to the similarity space (B, d)."""
    conversion_shown: bool = False
    """The log has shown the user what lam became."""
    start: int | float = 0
    """The weight is 0 before this step (an int) or this share of the run (a float below 1)."""
    added_at: int = 0
    """How many steps were done when the term was added; the warm-up does not begin before."""

    def __post_init__(self) -> None:
        if not isinstance(self.term, LossTerm):
            raise TypeError(
                f"loss: expected a loss term such as MonoLoss(lam=0.1), got {kind_of(self.term)}"
            )
        require_at_least(0, self.warm_up_steps, "warm_up_steps")
        require_number(self.start, "start")
        if not isinstance(self.start, float):
            require_at_least(0, self.start, "start")
        elif not 0 <= self.start < 1:
            raise ValueError(
                "start: expected a step (an int), or a share of the run (a float of at least 0 and "
                f"below 1), got {self.start}"
            )

    @property
    def compared_by(self) -> str:
        """What the term compares samples by, in words."""
        if self.embeddings is None:
            return self.term.compared_by("the SAE's inputs")
        batches = getattr(self.embeddings, "__self__", None)  # of a method of FeatureBatches
        return self.term.compared_by(str(getattr(batches, "compared_by", "other embeddings")))

    @property
    def options(self) -> dict[str, Any]:
        """The term's class and options, and those it was attached with, for a host's records."""
        found = {
            "term": type(self.term).__name__,
            **asdict(self.term),
            "warm_up_steps": self.warm_up_steps,
            "start": self.start,
        }
        if self.term.needs_embeddings:
            found["compared_by"] = self.compared_by
        return found

    def first_step(self, steps: float) -> int:
        """Return how many steps are done when the term starts, in a run of this many steps.

        A share of the run is rounded to a whole step.

        Raises:
            ValueError: ``start`` is a share, and the host does not know how many steps there are.
        """
        if isinstance(self.start, int) or self.start == 0:
            return int(self.start)
        if not 0 <= steps < math.inf:  # a host that does not know may say -1
            raise ValueError(
                f"start: {self.start} is a share of the run, and this trainer does not know how "
                "many steps it will train; give a step (an int)"
            )
        return round(self.start * steps)

    def weight_at(self, step: int, steps: float = math.inf, added_at: int | None = None) -> float:
        """Return lam as it is in one step: 0 before the start, then linear over the warm-up.

        Args:
            step: how many steps are done.
            steps: how many steps there will be; infinity or -1 if the host does not know.
            added_at: how many steps were done when the term was added, if a checkpoint says it.

        Raises:
            ValueError: as :meth:`first_step`.
        """
        since = step - max(self.first_step(steps), self.added_at if added_at is None else added_at)
        if since < 0:
            return 0.0
        warm = min(1.0, since / self.warm_up_steps) if self.warm_up_steps else 1.0
        return self.term.lam * warm

    def warn_of_long_warm_up(self, steps: float, done: int = 0) -> None:
        """Warn if training ends before the term has its full weight.

        Args:
            steps: how many steps there will be; infinity or -1 if the host does not know.
            done: how many of them are done.

        Raises:
            ValueError: as :meth:`first_step`.
        """
        left = steps - max(self.first_step(steps), done)
        if steps < 0:
            return
        if self.start and left <= 0:
            said = f"start={self.start} is not before the end of the {steps} steps of training, so "
            said += "the term does nothing"
        elif self.warm_up_steps > left:
            said = f"warm_up_steps={self.warm_up_steps} is longer than the {max(0, left)} steps of "
            said += "training that are left, so the term never gets its full weight lam"
        else:
            return
        warnings.warn(f"{self.term.name}: {said}", stacklevel=4)


class StepTerm(NamedTuple):
    """A term's value in one step."""

    weighted: Tensor
    """Scalar to add to the loss; it includes the weight and the warm-up."""
    metrics: dict[str, Tensor]
    """Scalars to log: the weighted term under its name, and the term's own metrics."""

    @classmethod
    def of(cls, term: LossTerm, step: StepTensors, weight: float) -> StepTerm:
        """Compute a term. At weight 0 it is only measured, so that the step is the host's own."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            value, metrics = term.compute_loss(step)
            weighted = weight * value if weight else torch.zeros_like(value)
        logged = {term.name: weighted.detach(), **metrics}
        return cls(weighted, {name: torch.as_tensor(v) for name, v in logged.items()})


Attached = TypeVar("Attached", bound=AttachedTerm)


@dataclass(frozen=True)
class _Replaced:
    """A method of one object that ours replaces."""

    ours: Callable[..., Any]
    before: Any
    """The object's own attribute, such as a compiled method; None if it used its class's method."""


class Attachment(Generic[Attached]):
    """The terms that one object of a host carries, and the methods that ours replace on it.

    Everything goes into the object's ``__dict__``. So an ``nn.Module`` does not register it, and
    no state dict contains it. A deep copy of the object carries a copy of the attachment.
    """

    replaces: ClassVar[tuple[str, ...]]
    """Names of the host's methods. A subclass has a method ``name(inner, ...)`` for each, where
    ``inner`` is the host's own."""
    host: ClassVar[str] = ""
    """The host's key in :data:`~monoloss_plugin.hosts.HOSTS`."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.terms: dict[str, Attached] = {}
        self._replaced: dict[str, _Replaced] = {}

    @staticmethod
    def require_free(target: Any, name: str) -> None:
        """Raise ValueError if the object already carries a term of this name."""
        attachment = target.__dict__.get(_KEY)
        if attachment is not None and name in attachment.terms:
            raise ValueError(
                f"{name}: a term of this name is attached already; remove it with its handle, or "
                "give the new term another name, such as MonoLoss(..., name='monoloss_2')"
            )

    @classmethod
    def on(cls, target: Any) -> Self | None:
        """Return an object's attachment, or None if it has none."""
        attachment: Self | None = target.__dict__.get(_KEY)
        return attachment

    @classmethod
    def of(cls, target: Any, methods: tuple[str, ...] | None = None) -> Self:
        """Return an object's attachment, with our methods in place; make it if there is none.

        Args:
            target: the object.
            methods: the names of its methods; by default those that the class replaces.

        Raises:
            RuntimeError: the object has no method of a name that we replace: the host has moved it.
            ValueError: another adapter has attached to the object.
        """
        replaced = cls.replaces if methods is None else methods
        for name in replaced:
            if cls.host and not callable(getattr(target, name, None)):
                raise moved_seam(cls.host, f"{type(target).__name__}.{name}")
        attachment = cls.on(target)
        if attachment is None:
            attachment = target.__dict__[_KEY] = cls(target)
        elif not isinstance(attachment, cls):
            raise ValueError(
                f"{type(target).__name__}: another adapter has added losses to it already; add all "
                "losses in one way"
            )
        for name in replaced:
            if name not in attachment._replaced:
                ours = _method_of_attachment(name, getattr(target, name))
                attachment._replaced[name] = _Replaced(ours, target.__dict__.get(name))
                target.__dict__[name] = MethodType(ours, target)
        return attachment

    def add(self, attached: Attached, undo: Callable[[], None] = lambda: None) -> LossHandle:
        """Add a term.

        Args:
            attached: the term.
            undo: undoes whatever else the adapter did for this term.

        Returns:
            A handle that removes this term and no other.

        Raises:
            ValueError: the object already carries a term of this name.
        """
        name = attached.term.name
        self.require_free(self.target, name)

        def remove() -> None:
            if self.terms.get(name) is attached:
                del self.terms[name]
                undo()
                if not self.is_needed():
                    self._give_back()

        self.terms[name] = attached
        return LossHandle(name, remove)

    def is_needed(self) -> bool:
        """Return whether our methods must stay in place."""
        return bool(self.terms)

    def _inner(self, target: Any, name: str) -> Callable[..., Any]:
        """Return the host's method that ours replaces."""
        before = self._replaced[name].before
        return MethodType(getattr(type(target), name), target) if before is None else before

    def _give_back(self) -> None:
        """Restore the host's methods where ours are outermost.

        A method that the host compiled after we attached contains ours. It stays, and passes
        through.
        """
        for name, replaced in list(self._replaced.items()):
            if getattr(self.target.__dict__.get(name), "__func__", None) is not replaced.ours:
                continue
            del self._replaced[name]
            if replaced.before is None:
                del self.target.__dict__[name]
            else:
                self.target.__dict__[name] = replaced.before
        if not self._replaced:
            del self.target.__dict__[_KEY]


def _method_of_attachment(name: str, inner: Any) -> Callable[..., Any]:
    """Return a method for the host's object that calls the attachment's method of the same name."""

    # It finds the attachment through `self`, so the method of a deep copy calls the copy's.
    # `wraps`, since hosts look at a method's parameters; without what torch.compile adds to it.
    @wraps(getattr(inner, "__func__", inner), updated=())
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        attachment = self.__dict__[_KEY]
        return getattr(attachment, name)(attachment._inner(self, name), *arguments, **options)

    return method


def give_add_loss(host_class: Any, add_loss: Callable[..., Any]) -> None:
    """Give a host's class the method ``add_loss``, unless it has one of its own."""
    if getattr(host_class, "add_loss", add_loss) is add_loss:
        host_class.add_loss = add_loss
    else:
        logging.getLogger(add_loss.__module__).warning(
            "%s has an add_loss of its own; use add_loss(target, ...)", host_class.__name__
        )


def require_embeddings(given: Any, key: str = "") -> None:
    """Raise TypeError unless embeddings are a callable or a key.

    ``key`` is what the host calls a key, such as "a column's name"; empty if it takes none.
    """
    named = bool(key) and isinstance(given, str) and given != ""
    if not named and (isinstance(given, type) or not callable(given)):
        wanted = f"{key}, or a frozen encoder to call" if key else "a frozen encoder to call"
        got = repr(given) if isinstance(given, (str, type)) else type(given).__name__
        raise TypeError(f"embeddings: expected {wanted}, got {got}")

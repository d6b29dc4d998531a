"""How terms attach to a host's object and come off again, on a host of a few lines."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monoloss_plugin import MonoLoss
from monoloss_plugin.attaching import AttachedTerm, Attachment, give_add_loss
from monoloss_plugin.losses import LossHandle


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def loss(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x).sum() * 0 + scale

    def describe(self) -> list[str]:
        return ["host"]


class HostAttachment(Attachment[AttachedTerm]):
    """Adds each term's lam to the loss."""

    replaces = ("loss", "describe")

    def loss(self, inner: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        return inner(*arguments, **options) + sum(t.term.lam for t in self.terms.values())

    def describe(self, inner: Callable[[], list[str]]) -> list[str]:
        return [*inner(), *self.terms]


def add(host: Host, lam: float, name: str, undo: Callable[[], None] = lambda: None) -> LossHandle:
    Attachment.require_free(host, name)
    return HostAttachment.of(host).add(AttachedTerm(MonoLoss(lam=lam, name=name)), undo)


X = torch.ones(1, 2)


def test_terms_stack_and_each_handle_removes_its_own() -> None:
    host, plain, undone = Host(), Host(), []
    handles = [add(host, 2.0**n, f"t{n}", lambda n=n: undone.append(n)) for n in range(3)]
    assert host.loss(X) == 8
    assert host.describe() == ["host", "t0", "t1", "t2"]
    assert host.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in host.named_modules()] == ["", "layer"]
    handles[1].remove()
    again = add(host, 16.0, "t1")
    handles[1].remove()  # its own is gone; the new one of that name stays
    assert host.loss(X) == 22
    for handle in (handles[0], again, handles[2], handles[2]):
        handle.remove()
    assert undone == [1, 0, 2]
    assert host.__dict__.keys() == plain.__dict__.keys()


def test_a_name_is_taken_once() -> None:
    host = Host()
    add(host, 1.0, "a")
    with pytest.raises(ValueError, match="a: a term of this name is attached already"):
        add(host, 2.0, "a")
    assert host.loss(X) == 2


def test_a_method_of_the_users_own_is_called_and_given_back() -> None:
    host = Host()
    own = host.loss = lambda x: torch.tensor(5.0)
    handle = add(host, 1.0, "a")
    assert host.loss(X) == 6
    handle.remove()
    assert host.__dict__["loss"] is own


def test_hosts_still_see_a_methods_own_parameters() -> None:
    host = Host()
    before = inspect.signature(host.loss)
    add(host, 1.0, "a")
    assert inspect.signature(host.loss) == before
    assert host.loss(X, scale=3.0) == 4


def test_a_copy_has_terms_of_its_own() -> None:
    host = Host()
    handle = add(host, 1.0, "a")
    copied = copy.deepcopy(host)
    handle.remove()
    add(host, 4.0, "b")
    assert copied.describe() == ["host", "a"]
    assert copied.loss(X) == 2
    with torch.no_grad():
        assert copied.__dict__["loss"].__self__ is copied
    assert host.loss(X) == 5


@pytest.mark.parametrize("compile_first", [True, False])
def test_a_method_that_the_host_compiles_adds_terms_once_and_passes_through(compile_first) -> None:
    host = Host()

    def compile_it() -> None:
        host.loss = torch.compile(host.loss, backend="eager")

    if compile_first:
        compile_it()
    first = add(host, 1.0, "a")
    if not compile_first:
        compile_it()
    assert host.loss(X) == 2
    first.remove()
    assert host.loss(X) == 1
    assert host.describe() == ["host"]
    second = add(host, 4.0, "b")  # over the compiled method, which may hold ours already
    assert host.loss(X) == 5
    assert host.describe() == ["host", "b"]
    second.remove()
    assert host.loss(X) == 1


def test_warm_up_is_linear_and_warned_of_if_training_is_shorter() -> None:
    attached = AttachedTerm(MonoLoss(lam=0.4), warm_up_steps=4)
    assert [attached.weight_at(step) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert AttachedTerm(MonoLoss(lam=0.4)).weight_at(0) == 0.4
    with pytest.warns(UserWarning, match="warm_up_steps=4 is longer than the 3 steps"):
        attached.warn_of_long_warm_up(3)
    for steps in (4, float("inf"), -1):  # -1: the host does not know
        attached.warn_of_long_warm_up(steps)


@pytest.mark.parametrize(
    ("start", "warm_up_steps", "expected"),
    [
        (3, 0, [0, 0, 0, 1, 1, 1, 1, 1]),
        (3, 4, [0, 0, 0, 0, 0.25, 0.5, 0.75, 1]),
        (0.5, 0, [0, 0, 0, 0, 1, 1, 1, 1]),
        (0.3, 2, [0, 0, 0, 0.5, 1, 1, 1, 1]),  # 2.4 of 8 steps, rounded
        (0.0, 0, [1] * 8),
    ],
)
def test_a_term_starts_at_a_step_or_a_share_of_the_run(start, warm_up_steps, expected) -> None:
    attached = AttachedTerm(MonoLoss(lam=0.4), warm_up_steps, start=start)
    weights = [attached.weight_at(step, 8) for step in range(8)]
    assert weights == pytest.approx([0.4 * share for share in expected])


def test_what_comes_too_late_is_warned_of() -> None:
    def warn(start: float, warm_up_steps: int, done: int = 0) -> None:
        attached = AttachedTerm(MonoLoss(lam=0.4), warm_up_steps, start=start)
        attached.warn_of_long_warm_up(10, done)

    for start in (10, 11, 0.97):
        with pytest.warns(UserWarning, match=f"start={start} is not before the end of the 10 step"):
            warn(start, 0)
    for start, done in ((7, 0), (0.7, 3), (2, 7)):
        with pytest.warns(UserWarning, match="warm_up_steps=4 is longer than the 3 steps"):
            warn(start, 4, done)
    for start in (7, 0.7):
        warn(start, 3)


@pytest.mark.parametrize("steps", [float("inf"), -1])
def test_a_share_of_a_run_of_unknown_length_is_an_error(steps) -> None:
    attached = AttachedTerm(MonoLoss(lam=0.4), start=0.5)
    with pytest.raises(ValueError, match=r"start: 0.5 is a share of the run, .* give a step"):
        attached.weight_at(3, steps)
    for known in (0.0, 2):
        assert AttachedTerm(MonoLoss(lam=0.4), start=known).weight_at(3, steps) == 0.4


@pytest.mark.parametrize(
    ("start", "error"),
    [
        *((start, ValueError) for start in (1.0, 1.5, -1, -0.1, float("nan"), 2**40)),
        *((start, TypeError) for start in (True, "half", None)),
    ],
)
def test_a_wrong_start_is_named(start, error) -> None:
    with pytest.raises(error, match="start: expected "):
        AttachedTerm(MonoLoss(lam=0.4), start=start)


@pytest.mark.parametrize("wrong", [MonoLoss, 3e-4, None])
def test_terms_of_another_kind_are_named(wrong) -> None:
    with pytest.raises(TypeError, match="loss: expected a loss term such as MonoLoss"):
        AttachedTerm(wrong)
    with pytest.raises(TypeError, match="warm_up_steps: expected an integer"):
        AttachedTerm(MonoLoss(lam=1.0), 1.5)
    with pytest.raises(ValueError, match="warm_up_steps: expected at least 0, got -1"):
        AttachedTerm(MonoLoss(lam=1.0), -1)


def test_a_hosts_own_method_of_the_name_is_kept(caplog) -> None:
    class Trainer:
        pass

    class HasOwn:
        def add_loss(self) -> str:
            return "its own"

    for host in (Trainer, Trainer, HasOwn):  # a second import gives it again
        give_add_loss(host, add)
    assert Trainer.add_loss is add
    assert HasOwn().add_loss() == "its own"
    (said,) = caplog.messages
    assert said == "HasOwn has an add_loss of its own; use add_loss(target, ...)"

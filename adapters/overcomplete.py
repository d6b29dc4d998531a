"""MonoLoss and the Top-k regularizers in overcomplete's ``train_sae``, through its criterion.

::

    from monoloss_plugin.adapters.overcomplete import add_loss

    criterion = add_loss(criterion, MonoLoss(lam=3e-4))
    train_sae(sae, loader, criterion, optimizer)

Nothing in overcomplete changes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import looks_are_free
from monoloss_plugin._places import kind_of
from monoloss_plugin.attaching import AttachedTerm, require_embeddings
from monoloss_plugin.hosts import check_version, failed_import
from monoloss_plugin.kernels.batch import GradientAt
from monoloss_plugin.losses import LossTerm
from monoloss_plugin.sae_terms import Embeddings, LamConversion, SaeTerms, require_nonnegative

try:
    import overcomplete.sae  # noqa: F401  # we replace nothing in it, and need nothing of it
except ImportError as error:
    raise failed_import(error, "overcomplete") from error

__all__ = ["CriterionWithLoss", "add_loss"]

check_version("overcomplete")
logger = logging.getLogger(__name__)

Criterion = Callable[..., Tensor]
"""``criterion(x, x_hat, pre_codes, codes, dictionary)``, as ``train_sae`` takes it."""


def add_loss(
    criterion: Criterion,
    loss: LossTerm,
    *,
    warm_up_steps: int = 0,
    start: int = 0,
    embeddings: Embeddings | None = None,
) -> CriterionWithLoss:
    """Add a loss term to a criterion of overcomplete.

    The criterion works with ``train_sae``, ``train_sae_amp`` and any loop that calls criteria as
    they do. ``lam`` is measured against its squared error, which must be the mean over elements, as
    in overcomplete's own criteria. Without gradients, it returns its own loss alone.

    Args:
        criterion: a function of the inputs, the reconstruction, the codes before and after the
            selection, and the dictionary, such as ``overcomplete.sae.losses.mse_l1``. It does not
            change.
        loss: the term, such as ``MonoLoss(lam=3e-4)``. To add several, call this again.
        warm_up_steps: the weight grows linearly from 0 over this many steps.
        start: the weight is 0 before this step; the warm-up counts from there. A criterion does not
            know how long you train, so it takes no share of the run.
        embeddings: a function from the SAE's inputs (B, d), one row for each code, to the
            similarity space of the same rows, or to a :class:`~monoloss_plugin.batch.Batch`. By
            default the inputs.

    Returns:
        A criterion for ``train_sae``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a term of that name is in the criterion already, or an argument is out of range;
            in a step, the codes are negative, carry no gradient, or come from matching pursuit.

    Examples:
        >>> from monoloss_plugin import MonoLoss
        >>> def mse(x, x_hat, pre_codes, codes, dictionary):
        ...     return (x - x_hat).square().mean()
        >>> criterion = add_loss(mse, MonoLoss(lam=3e-4))
        >>> sae = overcomplete.sae.TopKSAE(8, 16, top_k=2)
        >>> x = torch.nn.functional.normalize(torch.randn(32, 8), dim=1)
        >>> pre_codes, codes, x_hat = sae(x)
        >>> loss = criterion(x, x_hat, pre_codes, codes, sae.get_dictionary())
        >>> sorted(criterion.metrics)
        ['monoloss', 'monoscore', 'monoscore_defined']
    """
    if isinstance(criterion, type) or not callable(criterion):
        raise TypeError(f"criterion: expected a function, got {kind_of(criterion)}")
    attached = AttachedTerm(loss, warm_up_steps, embeddings, start=start)
    attached.first_step(float("inf"))  # an error for a share of an unknown run
    if embeddings is not None:
        require_embeddings(embeddings)
    if not isinstance(criterion, CriterionWithLoss):
        return CriterionWithLoss(criterion, [attached])
    if loss.name in (other.term.name for other in criterion.attached):
        raise ValueError(
            f"{loss.name}: the criterion has a term of this name already; give the new term "
            "another name, such as MonoLoss(..., name='monoloss_2')"
        )
    attached.added_at = criterion.terms.steps
    more = CriterionWithLoss(criterion.criterion, [*criterion.attached, attached])
    more.load_state_dict(criterion.state_dict())
    return more


class CriterionWithLoss:
    """A criterion of overcomplete with loss terms, for one run. :func:`add_loss` makes it."""

    def __init__(self, criterion: Criterion, attached: list[AttachedTerm]) -> None:
        self.criterion = criterion
        """The criterion without the terms."""
        self.attached = attached
        self.terms = SaeTerms(LamConversion("overcomplete", "mean", logger))
        self._checked = False

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The weighted terms and their metrics of the last step, to log."""
        return self.terms.metrics

    def __call__(
        self,
        x: Tensor,
        x_hat: Tensor,
        pre_codes: Tensor,
        codes: Tensor,
        dictionary: Tensor,
        **more: Any,
    ) -> Tensor:
        """Return the criterion's loss; with gradients, the terms are in it."""
        loss = self.criterion(x, x_hat, pre_codes, codes, dictionary, **more)
        if not torch.is_grad_enabled():
            return loss
        inputs = _rows_of_codes(x)
        for attached in self.attached:
            if not self._checked:
                _require_codes(attached.term, pre_codes, codes, inputs - _rows_of_codes(x_hat))
            if attached.term.needs_nonnegative and looks_are_free(codes):
                require_nonnegative(codes, attached.term)  # in each step, and not just the first
        self._checked = True
        added: Tensor = self.terms.add_up(
            self.attached, codes, inputs, pre_acts=pre_codes, gradient_at=_gradient_at(codes)
        )
        return loss + added

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how many steps are done, and what lam became."""
        return copy.deepcopy(self.terms.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the run that saved this state."""
        self.terms.load_state_dict(state)


def _rows_of_codes(x: Tensor) -> Tensor:
    """Return inputs (B, d), one for each code, of (n, d), (n, t, d) or (n, d, w, h)."""
    if x.ndim == 4:
        x = x.permute(0, 2, 3, 1)
    return x.flatten(0, -2)


def _require_codes(term: LossTerm, pre_codes: Tensor, codes: Tensor, residual: Tensor) -> None:
    """Raise ValueError for the codes of matching pursuit, which gives a residual before them."""
    if not codes.requires_grad:
        raise ValueError(
            f"{term.name}: the codes carry no gradient, so it can do nothing; orthogonal matching "
            "pursuit (OMPSAE) solves for its codes"
        )
    same = pre_codes.shape == residual.shape and torch.allclose(pre_codes, residual, atol=1e-4)
    if pre_codes.shape != codes.shape or same:
        raise ValueError(
            f"{term.name}: this SAE gives a residual instead of codes before a selection, as "
            "matching pursuit (MpSAE) does; its codes can be negative, which no loss here is for"
        )


def _gradient_at(codes: Tensor) -> GradientAt:
    """Return "active" if zeros pass no gradient: after a ReLU, its mask, or a Top-k scatter.

    A criterion does not see the SAE. What made the codes is seen in their graph.
    """
    made = codes.grad_fn
    if made is None:
        return "all"
    parents = [of.name() for of, _ in made.next_functions if of is not None]
    masked = made.name() == "MulBackward0" and parents == ["ReluBackward0"]
    return "active" if masked or made.name() in ("ReluBackward0", "ScatterBackward0") else "all"

"""SAEs of other libraries, seen as ``evaluate`` sees an SAE.

No library is imported here: a class is told by the module that it comes from.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows
from monoloss_plugin._sae import SAE, require_sae


def as_sae(model: Any) -> SAE:
    """Return an SAE whose ``encode`` and ``decode`` take and give tensors.

    Args:
        model: an SAE of SAELens or dictionary_learning, which is returned as it is; an SAE of
            overcomplete; a coder of sparsify; or anything else with ``encode`` and ``decode``.

    Raises:
        TypeError: no ``encode`` and ``decode``.
        ValueError: a transcoder; or a BatchTopKSAE that has not trained.
    """
    require_sae(model)
    for library, view in _VIEWS.items():
        if any(of.__module__.partition(".")[0] == library for of in type(model).__mro__):
            return view(model)
    return model  # type: ignore[no-any-return]


def encoded(sae: SAE, x: Tensor) -> Tensor:
    """Return the latents (B, M) of features (B, d_in), dense or sparse COO.

    Raises:
        TypeError: ``encode`` gives anything but a tensor.
    """
    latents = sae.encode(x)
    if not isinstance(latents, Tensor):
        raise TypeError(
            f"sae.encode(features): expected latents (B, M), got a {type(latents).__name__}. "
            "Convert the SAE with a function of monoloss_plugin.convert; or give an object of your "
            "own, whose encode and decode take and return tensors"
        )
    return as_rows(latents, "sae.encode(features)", keep_sparse=True)


def sparse_latents(acts: Tensor, columns: Tensor, num_latents: int) -> Tensor:
    """Return sparse COO latents (N, M) of which these are the entries (N, k), sorted by latent.

    Entries that are zero are listed too. The result is differentiable in ``acts``.
    """
    columns, order = columns.sort(dim=1)
    rows = torch.arange(len(acts), device=acts.device).repeat_interleave(acts.shape[1])
    return torch.sparse_coo_tensor(
        torch.stack((rows, columns.flatten())),
        acts.gather(1, order).flatten(),
        (len(acts), num_latents),
        is_coalesced=True,
        check_invariants=False,
    )


class OtherSAE(nn.Module):
    """An SAE of another library, as measures see it."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(d_in=d_in)
        """What SAELens's ``cfg`` says of an SAE: the width of its features."""

    @property
    def W_dec(self) -> Tensor:  # noqa: N802  # as in SAELens
        """The decoder's directions (M, d_in)."""
        raise NotImplementedError

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return what the SAE selects its latents from (B, M), zero or positive."""
        raise NotImplementedError


class _OfOvercomplete(OtherSAE):
    """An SAE of overcomplete, in its eval mode; its own mode does not change."""

    def __init__(self, sae: Any) -> None:
        super().__init__(sae.dictionary.in_dimensions)
        # In training, encoding changes a BatchTopKSAE's threshold; leaving it has lasting effects.
        self.sae = copy.deepcopy(sae).eval() if sae.training else sae
        if getattr(sae, "running_threshold", 0) is None:
            raise ValueError(
                "sae: this BatchTopKSAE has no threshold, because it has not trained; a state dict "
                "does not keep it (set running_threshold on what you loaded)"
            )

    def encode(self, x: Tensor) -> Tensor:
        codes: Tensor = self.sae.encode(x)[1]
        return codes

    def pre_activations(self, x: Tensor) -> Tensor:
        codes: Tensor = self.sae.encoder(x)[1]
        return codes.relu()

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        dictionary: Tensor = self.sae.get_dictionary()
        return dictionary

    def decode(self, latents: Tensor) -> Tensor:
        x_hat: Tensor = self.sae.decode(latents)
        return x_hat


class _OfSparsify(OtherSAE):
    """A coder of sparsify; its latents are sparse COO, never dense."""

    def __init__(self, coder: Any) -> None:
        super().__init__(coder.d_in)
        if coder.cfg.transcode or coder.W_skip is not None:
            raise ValueError(
                "sae: this is a transcoder, whose output is not its input; score its latents with "
                "MonoScore().update(latents, embeddings)"
            )
        self.coder = coder

    def encode(self, x: Tensor) -> Tensor:
        acts, columns, _ = self.coder.encode(x.to(self.coder.dtype))
        return sparse_latents(acts, columns, self.coder.num_latents)

    def pre_activations(self, x: Tensor) -> Tensor:
        z: Tensor = self.coder.encode(x.to(self.coder.dtype)).pre_acts
        return z

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        weight: Tensor = self.coder.W_dec
        return weight

    def decode(self, latents: Tensor) -> Tensor:
        x_hat: Tensor = latents @ self.W_dec + self.coder.b_dec
        return x_hat


_VIEWS: dict[str, type[_OfOvercomplete | _OfSparsify]] = {
    "overcomplete": _OfOvercomplete,
    "sparsify": _OfSparsify,
}

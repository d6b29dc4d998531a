"""The decoder of a trained SAE, fitted again to the latents that the SAE gives.

    W_dec <- W_dec + (G + λI)⁻¹ K

G is the covariance sum of the latents, and K is the same of latents and what the SAE leaves
unexplained (:mod:`monoloss_plugin.saes.decoder`). The penalty keeps W_dec near what training found.

Latents do not change. So nothing changes that depends on latents alone: MonoScore, purity, L0. What
changes is the reconstruction, and with it R² and the directions of the latents.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows
from monoloss_plugin._places import kind_of
from monoloss_plugin._progress import progress_bar
from monoloss_plugin._sae import require_sae, selects_over_batches
from monoloss_plugin._samples import own_record
from monoloss_plugin.kernels.support import is_sparse, support_of
from monoloss_plugin.metrics import R2
from monoloss_plugin.saes.decoder import Decoder, require_ridge, ridge_decoder
from monoloss_plugin.saes.rows import BATCH, Rows
from monoloss_plugin.saes.selection import architecture_of

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

RIDGE = 0.3
"""The default penalty, in units of the mean of G's diagonal."""

WIDEST = 1 << 14
"""Wider dictionaries are fine-tuned instead. The closed form holds a matrix of 8 M² bytes, 2 GiB
for 16,384 latents, and to solve it takes M³ / 3 multiplications."""

_ARCHITECTURES = (
    "standard",
    "topk",
    "abstopk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "gated",
)
"""SAELens's architectures whose encoder can stay as it is if the decoder changes.

Matching pursuit encodes with its decoder. A temporal SAE reads context, and a transcoder's targets
are not its inputs.
"""

_HELD_OUT = 10
_EPOCHS = 5
_MINI_BATCH = 512
_STEP = 0.1
"""Adam's first step, in units of |residual| / |latents|, the size of what it is to add."""


class Refit(NamedTuple):
    """What :func:`refit_decoder` found."""

    r2_before: float
    """R² on held-out samples with the decoder from training."""
    r2_after: float
    """R² on the same samples with the refitted decoder, whether it was kept or not."""
    kept: bool
    """Whether the SAE has the refitted decoder now."""


@torch.no_grad()
def refit_decoder(
    sae: Any,
    features: Tensor | FeatureSet,
    *,
    ridge: float = RIDGE,
    held_out: Tensor | FeatureSet | None = None,
    normalize: bool | None = None,
    progress: bool = False,
) -> Refit:
    """Fit the decoder of a trained SAE again, in place, by least squares. Latents do not change.

    It minimises Σ ||x - x̂||² + λ ||W - W_dec||², with λ = ridge * mean(diag G). If the SAE scales
    its inputs itself (``normalize_activations``), both are taken on its own scale. If R² on
    held-out samples would fall, the SAE stays as it was.

    MonoScore, purity, L0 and every latent stay what they were, up to rounding. To keep them, the
    encoder takes over what it got from the decoder: ``b_enc`` follows ``b_dec`` where the SAE
    subtracts ``b_dec`` from its input, and norms of ``W_dec`` go into ``W_enc`` where the selection
    depends on them. ``cfg.rescale_acts_by_decoder_norm`` is False afterwards. Rows of ``W_dec``
    that had unit norm have other norms afterwards. If you need unit norms, call SAELens's
    ``sae.fold_W_dec_norm()``: it scales latents, and SAELens refuses it for TopK.

    ``cfg.metadata.monoloss["refit"]`` records what was done. Refit when training is over: then
    save.

    Dictionaries wider than :data:`WIDEST` are not solved in closed form. Their decoders are
    fine-tuned by Adam instead, in five passes over the features.

    Args:
        sae: a SAELens SAE, loaded or in training: standard, topk, abstopk, batchtopk,
            matryoshka_batchtopk, jumprelu or gated.
        features: training features: a feature set, or (N, d_in).
        ridge: the penalty, in units of the mean of G's diagonal; above 0.
        held_out: other samples to measure R² on. By default a random tenth of ``features``, which
            is left out of the fit. If the SAE was trained on them, that tenth flatters the decoder
            from training, and a refit that would help is refused. So pass samples that are new.
        normalize: as in :func:`~monoloss_plugin.evaluation.evaluate`.
        progress: show a progress bar (needs tqdm).

    Returns:
        R² on held-out samples before and after, and whether the refitted decoder was kept.

    Raises:
        TypeError: an SAE of another kind, features of another kind, or ``ridge`` is not a number.
        ValueError: features that the SAE cannot take, fewer than 20 of them without ``held_out``,
            or ``ridge`` is not above 0, or too small for latents that depend on each other.
        ModuleNotFoundError: ``progress`` without tqdm.

    Warns:
        UserWarning: R² would fall, so the SAE stays as it was; or the SAE is a BatchTopK SAE in
            training.
    """
    _require_free_decoder(sae)
    require_ridge(ridge)
    rows = Rows.for_sae(sae, features, normalize)
    fitted, (judge, judged) = _parts(sae, rows, held_out, normalize)
    if selects_over_batches(sae):
        _warn(
            "sae: a BatchTopK SAE in training selects over each batch. Refit what "
            "SAE.load_from_disk gives after save_inference_model: that is what others will use"
        )
    wide = sae.cfg.d_sae > WIDEST
    total = (_EPOCHS if wide else 1) * len(fitted) + 2 * len(judged)
    with progress_bar("Refitting", total, progress) as advance:
        before = _r2(sae, judge, judged, advance)
        fit = _fine_tuned if wide else _solved
        change = fit(sae, rows, fitted, ridge, advance)
        undo = _change(sae, change)
        kept = False
        try:
            after = _r2(sae, judge, judged, advance)
            kept = after >= before
        finally:
            if not kept:
                undo()
    if kept:
        done = {"ridge": ridge, "r2_before": before, "r2_after": after, "samples": len(fitted)}
        sae.cfg.metadata.monoloss = {**own_record(sae), "refit": done}
    else:
        _warn(
            f"sae: held-out R² would be {after:.4f} instead of {before:.4f}, so the decoder stays "
            "as it was. Fit it to more samples, or with a larger ridge"
        )
    return Refit(before, after, kept)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)  # shown at the call of refit_decoder, below no_grad


def _require_free_decoder(sae: Any) -> None:
    require_sae(sae)
    if architecture_of(sae) not in _ARCHITECTURES or not hasattr(sae, "W_dec"):
        raise TypeError(
            f"sae: expected a SAELens SAE of the architecture {', '.join(_ARCHITECTURES)}, got "
            f"{architecture_of(sae) or kind_of(sae)}"
        )
    if sae.hook_z_reshaping_mode:
        raise ValueError(
            "sae: expected one that takes (N, d_in); call its "
            "turn_off_forward_pass_hook_z_reshaping() first"
        )


def _parts(
    sae: Any, rows: Rows, held_out: Any, normalize: bool | None
) -> tuple[Tensor, tuple[Rows, Tensor]]:
    """Return the numbers of the rows to fit to, and the rows and numbers to judge by."""
    if held_out is not None:
        judge = Rows.for_sae(sae, held_out, normalize)
        return torch.arange(len(rows)), (judge, torch.arange(len(judge)))
    patches = getattr(rows.features, "patches", None)
    number = len(rows) if patches is None else patches.num_images
    count = number // _HELD_OUT
    if count < 2:
        of = "samples" if patches is None else "images"
        raise ValueError(
            f"features: expected at least {2 * _HELD_OUT} {of} to hold a tenth out, or held_out, "
            f"got {number}"
        )
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    fitted, judged = order[count:].sort().values, order[:count].sort().values
    if patches is not None:  # patches of one image are not held out from one another
        fitted, judged = patches.rows_of(fitted), patches.rows_of(judged)
    return fitted, (rows, judged)


def _r2(sae: Any, rows: Rows, numbers: Tensor, advance: Callable[[int], Any]) -> float:
    r2 = R2()
    for part in numbers.split(BATCH):
        x = rows.take(part)
        r2.update(x, sae.decode(sae.encode(x)))
        advance(len(x))
    return r2.compute()


def _solved(
    sae: Any, rows: Rows, numbers: Tensor, ridge: float, advance: Callable[[int], Any]
) -> Decoder:
    """Return what to add to the decoder, in closed form."""
    return ridge_decoder(_residuals(sae, rows, numbers.split(BATCH), advance), ridge=ridge)


def _fine_tuned(
    sae: Any, rows: Rows, numbers: Tensor, ridge: float, advance: Callable[[int], Any]
) -> Decoder:
    """Return what to add to the decoder, by Adam on the same objective."""
    weights, bias = (torch.zeros_like(part) for part in _decoder(sae))
    adam = torch.optim.Adam([weights, bias])
    step = 0.0
    generator = torch.Generator().manual_seed(0)
    parts = [
        part
        for _ in range(_EPOCHS)
        for part in numbers[torch.randperm(len(numbers), generator=generator)].split(_MINI_BATCH)
    ]
    for done, (latents, residual) in enumerate(_residuals(sae, rows, parts, advance)):
        a = support_of(latents)
        if not done:
            size = residual.norm() / a.values.norm().clamp(min=1e-30)
            step = _STEP * float(size) / residual.shape[1] ** 0.5
        error = residual - (a.by_sample() @ weights + bias)
        means = a.sums(a.values) / len(error)
        penalty = ridge * (a.sums(a.values.square()) / len(error) - means.square()).mean()
        weights.grad = penalty * weights - a.weighted_sums(a.values, error) / len(error)
        bias.grad = -error.mean(0)
        adam.param_groups[0]["lr"] = step * (1 - done / len(parts))
        adam.step()
    return Decoder(weights, bias)


def _residuals(
    sae: Any, rows: Rows, parts: Iterable[Tensor], advance: Callable[[int], Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield latents (B, M), and what the decoder leaves unexplained (B, d), of rows by number."""
    weights, bias = _decoder(sae)
    for part in parts:
        x = rows.take(part)
        latents = as_rows(sae.encode(x), "sae.encode(features)", keep_sparse=True).to(weights.dtype)
        active = support_of(latents).by_sample() if is_sparse(latents) else latents
        # The decoder explains inputs on the SAE's own scale.
        targets = sae.run_time_activation_norm_fn_in(x.to(weights.dtype))
        yield latents, targets - (active @ weights + bias)
        advance(len(x))


def _decoder(sae: Any) -> Decoder:
    """Return the decoder that multiplies latents, float32 or wider."""
    dtype = torch.promote_types(sae.W_dec.dtype, torch.float32)
    weights, bias = sae.W_dec.detach().to(dtype), sae.b_dec.detach().to(dtype)
    if _rescales(sae):
        weights = weights / sae.get_W_dec_norm().unsqueeze(1)
    return Decoder(weights, bias)


def _rescales(sae: Any) -> bool:
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


def _change(sae: Any, change: Decoder) -> Callable[[], None]:
    """Add to the decoder, and let the encoder make up for it. Return a function that undoes it."""
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    cfg = sae.cfg

    def undo() -> None:
        sae.cfg = cfg
        with torch.no_grad():
            for name, value in sae.named_parameters():
                value.copy_(before[name])

    # Two SAEs may share one config object. This change is about one of them.
    sae.cfg = copy.copy(cfg)
    sae.cfg.metadata = copy.deepcopy(cfg.metadata)
    if _rescales(sae):
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    sae.W_dec.copy_(sae.W_dec + change.W_dec)
    sae.b_dec.copy_(sae.b_dec + change.b_dec)
    if sae.cfg.apply_b_dec_to_input:
        moved = (sae.b_dec - before["b_dec"]).double() @ sae.W_enc.double()
        for name in ("b_enc", "b_gate"):
            if isinstance(bias := getattr(sae, name, None), nn.Parameter):
                bias.copy_(bias + moved)
        if architecture_of(sae) == "gated":
            sae.b_mag.copy_(sae.b_mag + moved * sae.r_mag.double().exp())
    return undo

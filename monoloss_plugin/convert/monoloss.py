"""Checkpoints of the MonoLoss authors' training code.

Their layout, from the paper's appendix B and the public SAE implementations that it builds on:
BatchTopK, vanilla ReLU and JumpReLU after Bussmann et al. 2024, TopK after Gao et al. 2024.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path
from monoloss_plugin.batch import Batch
from monoloss_plugin.convert.checkpoint import Weights, read_checkpoint, whole
from monoloss_plugin.convert.to_sae_lens import sae_of

try:
    from sae_lens import SAE
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

_KINDS = ("batchtopk", "topk", "jumprelu", "vanilla")
_SOURCE = "the MonoLoss authors' code"
# Counters of dead latents and the like, which the forward pass does not use.
_COUNTERS = ("num_batches_not_active", "stats_", "latents_", "activation")
_BATCH = 2048
"""Samples of a batch in the paper; BatchTopK chooses among a batch's activations."""


def from_monoloss(
    source: str | os.PathLike[str], *, features: Tensor | Iterable[Batch] | None = None
) -> SAE[Any]:
    """Convert a checkpoint of the MonoLoss authors.

    A BatchTopK checkpoint keeps the largest ``topk_k`` times B activations of each batch, and
    stores no threshold; SAELens applies one to every sample alone. It is set from features: for one
    batch of them, so that just the same activations are kept; for more, to the mean over batches.

    Args:
        source: a file with ``model_state_dict`` and ``config``.
        features: (N, d_in) such as the checkpoint was trained on, or batches of them; only for
            BatchTopK, which needs them. A tensor is taken in batches of 2,048, the paper's.

    Returns:
        An SAE with the checkpoint's latents and reconstruction.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint, one that holds more than tensors and plain values, or a
            BatchTopK one and no features.

    Source: Nasiri-Sarvi et al. 2026, appendix B.
    """
    checkpoint = read_checkpoint(as_path(source, "source"))
    if not isinstance(checkpoint, Mapping) or not {"model_state_dict", "config"} <= set(checkpoint):
        raise ValueError("source: expected a checkpoint with model_state_dict and config")
    config = checkpoint["config"]
    if not isinstance(config, Mapping):
        raise ValueError(f"source: expected a dict as config, got {type(config).__name__}")
    kind = str(config.get("model_type")).lower().replace("_", "").replace("-", "")
    kind = {"relu": "vanilla"}.get(kind.removesuffix("sae"), kind.removesuffix("sae"))
    if kind not in _KINDS:
        raise ValueError(f"source: expected a model_type of {', '.join(_KINDS)}, got {kind!r}")
    weights = Weights(checkpoint["model_state_dict"], "source", _COUNTERS)
    common: dict[str, Any] = {
        "converted_from": _SOURCE,
        "terms": _terms(config, kind),
        # Zero mean and unit deviation over a sample's dimensions, undone after decoding.
        "normalize_activations": "layer_norm" if _is_true(config.get("normalize")) else "none",
    }
    tensors = _topk(weights) if kind == "topk" else weights.take_plain()
    if kind == "jumprelu":
        tensors["threshold"] = weights.take("jumprelu.log_threshold").exp()
        # The one of the four that does not subtract the decoder's bias from its input.
        common["apply_b_dec_to_input"] = False
    weights.finish()
    _require_latents(config, tensors)
    if kind == "topk":
        k = whole(config.get("topk_k"), "topk_k", len(tensors["W_dec"]))
        return sae_of("topk", tensors, k=k, **common)
    if kind == "jumprelu":
        return sae_of("jumprelu", tensors, **common)
    plain = sae_of("standard", tensors, **common)
    if kind == "vanilla":
        return plain
    if features is None:
        raise ValueError(
            "features: a BatchTopK checkpoint stores no threshold; give features such as it was "
            "trained on, to set one from"
        )
    k = whole(config.get("topk_k"), "topk_k", len(tensors["W_dec"]))
    threshold = _threshold(plain, k, features)
    tensors["threshold"] = torch.full_like(tensors["b_enc"], threshold)
    return sae_of("jumprelu", tensors, **common)


def _topk(weights: Weights) -> dict[str, Tensor]:
    encoder = weights.take_matrix("encoder.weight")
    d_sae, d_in = encoder.shape
    decoder = encoder
    for name in ("decoder.weight", "decoder.linear.weight"):  # the second is the tied one's
        if name in weights:
            given = weights.take(name)
            decoder = given if name.endswith("linear.weight") else given.T
    if decoder.shape != encoder.shape:
        raise ValueError(
            f"source: a decoder of {tuple(decoder.T.shape)} beside an encoder of {(d_sae, d_in)}"
        )
    return {
        "W_enc": encoder.T.contiguous(),
        "W_dec": decoder.contiguous(),
        "b_enc": weights.take("latent_bias", shape=(d_sae,)),
        "b_dec": weights.take("pre_bias", shape=(d_in,)),
    }


def _require_latents(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    said, there = config.get("n_latents"), len(tensors["W_dec"])
    if said is not None and said != there:
        raise ValueError(f"source: its config says n_latents = {said}, its weights have {there}")


def _is_true(setting: Any) -> bool:
    """Read a switch, which a command line may have left as a word."""
    return setting.lower() in ("true", "yes", "1") if isinstance(setting, str) else bool(setting)


def _terms(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return MonoLoss as the adapter would have recorded it; nothing for a baseline."""
    lam = config.get("mono_coef") or 0
    try:
        lam = float(lam)
    except (TypeError, ValueError):
        lam = math.nan
    if not math.isfinite(lam):
        given = config["mono_coef"]
        raise ValueError(f"source: expected a finite number as mono_coef, got {given!r}")
    if lam <= 0:
        return {}
    # The paper weighs it against another reconstruction term for TopK.
    units = "nmse" if kind == "topk" else "mse"
    term = {"term": "MonoLoss", "name": "monoloss", "lam": lam, "lam_units": units}
    return {"monoloss": term}


@torch.no_grad()
def _threshold(sae: SAE[Any], k: int, features: Tensor | Iterable[Batch]) -> float:
    """Return what divides the activations that a batch keeps from those that it does not."""
    between = []
    for batch in _batches(features):
        if batch.shape[1] != sae.cfg.d_in:
            raise ValueError(
                f"features: expected width {sae.cfg.d_in}, the checkpoint's, got {batch.shape[1]}"
            )
        activations = sae.encode(batch).flatten()
        kept = min(k * len(batch), len(activations) - 1)
        *_, last, first_left_out = activations.topk(kept + 1).values.double().tolist()
        middle = float(torch.tensor((last + first_left_out) / 2, dtype=torch.float32))
        between.append(middle if middle < last else first_left_out)
    if not between:
        raise ValueError("features: expected at least one sample, got none")
    return sum(between) / len(between)


def _batches(features: Tensor | Iterable[Batch]) -> Iterator[Tensor]:
    batches: Iterable[Any] = features
    if isinstance(features, Tensor):
        batches = as_rows(features, "features").split(_BATCH)
    for batch in batches:
        given = getattr(batch, "features", batch)
        rows = as_rows(given, "features").float()
        if len(rows):
            yield rows

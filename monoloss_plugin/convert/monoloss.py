"""Checkpoints of the MonoLoss authors' training code.

Their layout follows the paper's appendix B and the public SAE implementations that it builds on:
Bussmann et al. 2024 for BatchTopK, vanilla ReLU and JumpReLU, Gao et al. 2024 for TopK.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows
from monoloss_plugin._places import as_path
from monoloss_plugin.batch import Batch
from monoloss_plugin.convert.building import build_sae
from monoloss_plugin.convert.checkpoint import Weights, read_checkpoint, read_count

if TYPE_CHECKING:
    from sae_lens import SAE

_KINDS = ("batchtopk", "topk", "jumprelu", "vanilla")
_COUNTERS = ("num_batches_not_active", "stats_", "latents_", "activation")
"""How names begin that the forward pass does not use, such as counters of dead latents."""
_BATCH = 2048
"""The paper's batch size. BatchTopK selects among the activations of one batch."""


def from_monoloss(
    source: str | os.PathLike[str], *, features: Tensor | Iterable[Batch] | None = None
) -> SAE[Any]:
    """Convert a checkpoint of the MonoLoss authors.

    A BatchTopK checkpoint keeps the largest ``topk_k`` times B activations of each batch, and
    stores no threshold. SAELens needs a threshold, which it applies to every sample alone. It is
    set from features: with one batch, so that exactly the same activations are kept; with several
    batches, to the mean of their thresholds.

    Args:
        source: a file with ``model_state_dict`` and ``config``.
        features: for BatchTopK, which needs them: (N, d_in) like those that the SAE was trained on,
            or batches of them. A tensor is taken in batches of 2,048, the paper's.

    Returns:
        An SAE with the checkpoint's latents and reconstruction.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a checkpoint, or holds more than tensors and plain values;
            or it is a BatchTopK checkpoint and you give no features.

    Source: Nasiri-Sarvi et al. 2026, appendix B.
    """
    checkpoint = read_checkpoint(as_path(source, "source"))
    if not isinstance(checkpoint, Mapping) or not {"model_state_dict", "config"} <= set(checkpoint):
        raise ValueError("source: expected a checkpoint with model_state_dict and config")
    config = checkpoint["config"]
    if not isinstance(config, Mapping):
        raise ValueError(f"source: expected a dict as config, got {type(config).__name__}")
    kind = str(config.get("model_type")).lower().replace("_", "").replace("-", "")
    kind = kind.removesuffix("sae")
    kind = "vanilla" if kind == "relu" else kind
    if kind not in _KINDS:
        raise ValueError(f"source: expected a model_type of {', '.join(_KINDS)}, got {kind!r}")
    weights = Weights(checkpoint["model_state_dict"], "source", ignored=_COUNTERS)
    settings: dict[str, Any] = {
        "converted_from": "the MonoLoss authors' code",
        "terms": _terms(config, kind),
        # Each sample gets zero mean and unit deviation over its dimensions; decoding undoes it.
        "normalize_activations": "layer_norm" if _is_true(config.get("normalize")) else "none",
    }
    tensors = _topk(weights) if kind == "topk" else weights.take_sae_lens()
    if kind == "jumprelu":
        tensors["threshold"] = weights.take("jumprelu.log_threshold").exp()
        # The only one of the four that does not subtract the decoder's bias from its input.
        settings["apply_b_dec_to_input"] = False
    weights.finish()
    latents, said = len(tensors["W_dec"]), config.get("n_latents")
    if said is not None and said != latents:
        raise ValueError(f"source: its config says n_latents = {said}, its weights have {latents}")
    if kind == "topk":
        settings["k"] = read_count(config.get("topk_k"), "topk_k", latents)
    if kind == "batchtopk":
        if features is None:
            raise ValueError(
                "features: a BatchTopK checkpoint stores no threshold; give features such as it "
                "was trained on, to set one from"
            )
        k = read_count(config.get("topk_k"), "topk_k", latents)
        threshold = _threshold(build_sae("standard", tensors, **settings), k, features)
        tensors["threshold"] = torch.tensor(threshold, dtype=torch.float32)
    architecture = {"batchtopk": "jumprelu", "vanilla": "standard"}.get(kind, kind)
    return build_sae(architecture, tensors, **settings)


def _topk(weights: Weights) -> dict[str, Tensor]:
    encoder = weights.take_matrix("encoder.weight")
    if "decoder.weight" in weights:
        decoder = weights.take("decoder.weight", shape=tuple(encoder.T.shape)).T
    elif "decoder.linear.weight" in weights:  # the tied decoder's, which is the encoder's too
        decoder = weights.take("decoder.linear.weight", shape=tuple(encoder.shape))
    else:
        decoder = encoder
    vectors = weights.take_vectors(decoder, b_enc="latent_bias", b_dec="pre_bias")
    return {"W_enc": encoder.T, "W_dec": decoder, **vectors}


def _is_true(setting: Any) -> bool:
    """Read a switch, which a command line may have left as a word."""
    return setting.lower() in ("true", "yes", "1") if isinstance(setting, str) else bool(setting)


def _terms(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return MonoLoss as the SAELens adapter would record it; nothing for a baseline."""
    given = config.get("mono_coef") or 0
    try:
        lam = float(given)
    except (TypeError, ValueError):
        lam = math.nan
    if not math.isfinite(lam):
        raise ValueError(f"source: expected a finite number as mono_coef, got {given!r}")
    if lam <= 0:
        return {}
    # For TopK the paper measures the weight against another reconstruction loss.
    units = "nmse" if kind == "topk" else "mse"
    return {"monoloss": {"term": "MonoLoss", "name": "monoloss", "lam": lam, "lam_units": units}}


@torch.no_grad()
def _threshold(sae: SAE[Any], k: int, features: Tensor | Iterable[Batch]) -> float:
    """Return what separates the activations that a batch keeps from the others, on average."""
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
        rows = as_rows(getattr(batch, "features", batch), "features").float()
        if len(rows):
            yield rows

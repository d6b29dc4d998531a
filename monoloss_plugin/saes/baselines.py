"""SAEs that have learnt nothing, or only what PCA, ICA or k-means learn, to compare SAEs with.

A baseline's encoder projects features minus their mean on directions that come straight from the
data. Its latents are selected like any SAE's, and its decoder is fitted by ridge regression. If a
trained SAE does not score above them, its score says nothing about its training.

The baselines are frozen and untrained controls in the sense of arXiv 2602.14111 and 2501.17727.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from monoloss_plugin._checks import require_at_least, require_choice, require_flag, require_number
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.saes.decoder import ridge_decoder
from monoloss_plugin.saes.initialise import data_directions, unit_directions
from monoloss_plugin.saes.rows import BATCH, Rows, require_samples
from monoloss_plugin.saes.selection import pre_activations, threshold_for_l0

try:
    from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error
try:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import FastICA
except ModuleNotFoundError as error:
    raise missing_extra(error, "referee") from error

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

Directions = Callable[[Rows, Tensor, int, int], Tensor]
"""A function of rows (N, d), their mean (d,), the number of directions and a seed. It returns at
most that many directions, as (n, d): the rows of the encoder."""

_ICA_SAMPLES = 1 << 14
_K_MEANS_SAMPLES = 1 << 16
_THRESHOLD_SAMPLES = 8192
_ICA_STEPS = 1000


@torch.no_grad()
def make_baseline(
    kind: str,
    features: Tensor | FeatureSet,
    *,
    num_latents: int,
    l0: float,
    selection: Literal["topk", "threshold"] = "topk",
    seed: int = 0,
    normalize: bool = True,
) -> SAE[Any]:
    """Make an SAE that is not trained by gradient descent: a control for a trained one.

    It is SAELens's own ``TopKSAE`` or ``JumpReLUSAE``: evaluate, save and publish it like any
    other. Choose the number of latents, the L0 and the training features of the SAE to compare it
    with.

    Args:
        kind: one of :data:`BASELINES`.
        features: training features: a feature set, or (N, d).
        num_latents: M. "PCA" and "ICA" have at most 2 d directions; the latents beyond stay dead.
        l0: number of active latents: k of each sample, an integer, for "topk"; the mean over
            samples for "threshold", to 1 %. With "topk", a sample with fewer positive
            pre-activations has fewer.
        selection: "topk" keeps the k largest pre-activations of each sample; "threshold" has one
            threshold for all latents, set on the features, or on 8,192 random ones of more.
        seed: of random directions, samples and starts.
        normalize: scale features to unit norm, as ``evaluate`` does for a feature set. The SAE's
            ``cfg.metadata.monoloss`` records it, so ``evaluate`` scales by itself later.

    Returns:
        The SAE, in float32 on the device of the features.

    Raises:
        TypeError: features of another kind, or a number of the wrong type.
        ValueError: an unknown kind or selection; numbers out of range; fewer samples than "data
            points" or "k-means" need; no threshold gives the L0; or NaN or infinite features.

    Warns:
        ConvergenceWarning: scikit-learn's FastICA has not converged.
    """
    require_choice(kind, "kind", tuple(BASELINES))
    require_choice(selection, "selection", ("topk", "threshold"))
    require_at_least(1, num_latents, "num_latents")
    require_at_least(0, seed, "seed")
    require_flag(normalize, "normalize")
    require_number(l0, "l0")
    if selection == "topk":
        require_at_least(1, l0, "l0")  # type: ignore[arg-type]  # it raises TypeError for a float
    if l0 > num_latents:
        raise ValueError(f"l0: expected at most num_latents, {num_latents}, got {l0}")
    rows = Rows.of(features, normalize)
    mean = rows.mean()
    directions = BASELINES[kind](rows, mean, num_latents, seed).to(mean)

    sae = _empty_sae(selection, rows.take(torch.tensor([0])), num_latents, l0)
    sae.cfg.metadata.monoloss = {
        "inputs": "unit norm" if normalize else "as they are",
        "directions": kind,
        "seed": seed,
    }
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
        parameter.zero_()
    sae.W_enc[:, : len(directions)] = directions.T
    sae.b_enc[: len(directions)] = -directions @ mean
    if selection == "threshold":
        sample = rows.sample(_THRESHOLD_SAMPLES, seed)
        found = (pre_activations(sae, x) for x in sample.split(BATCH))
        sae.threshold.fill_(threshold_for_l0((a[a > 0] for a in found), len(sample), l0))
    fitted = ridge_decoder((sae.encode(x), x) for x in rows.batches())
    sae.W_dec.copy_(fitted.W_dec)
    sae.b_dec.copy_(fitted.b_dec)
    return sae


def _empty_sae(selection: str, x: Tensor, num_latents: int, l0: float) -> Any:
    shape: dict[str, Any] = {
        "d_in": x.shape[1],
        "d_sae": num_latents,
        "apply_b_dec_to_input": False,
        "device": str(x.device),
    }
    if selection == "topk":
        return TopKSAE(TopKSAEConfig(k=int(l0), **shape))
    return JumpReLUSAE(JumpReLUSAEConfig(**shape))


def _random_directions(rows: Rows, mean: Tensor, most: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_directions(torch.randn(most, rows.width, generator=generator))


def _data_points(rows: Rows, mean: Tensor, most: int, seed: int) -> Tensor:
    return data_directions(rows, most, mean=mean, seed=seed)


def _principal_components(rows: Rows, mean: Tensor, most: int, seed: int) -> Tensor:
    return _both_signs(_components(rows, mean))[:most]


def _independent_components(rows: Rows, mean: Tensor, most: int, seed: int) -> Tensor:
    count = min(len(_components(rows, mean)), -(-most // 2))
    fitted = FastICA(count, whiten="unit-variance", random_state=seed, max_iter=_ICA_STEPS).fit(
        rows.sample(_ICA_SAMPLES, seed).cpu().numpy()
    )
    return _both_signs(torch.from_numpy(fitted.components_))[:most]


def _cluster_centres(rows: Rows, mean: Tensor, most: int, seed: int) -> Tensor:
    require_samples(rows, most)
    sample = rows.sample(max(_K_MEANS_SAMPLES, most), seed).cpu().numpy()
    fitted = MiniBatchKMeans(most, random_state=seed, n_init=1).fit(sample)
    return unit_directions(torch.from_numpy(fitted.cluster_centers_).to(mean) - mean)


BASELINES: Mapping[str, Directions] = MappingProxyType(
    {
        "random directions": _random_directions,
        "data points": _data_points,
        "PCA": _principal_components,
        "ICA": _independent_components,
        "k-means": _cluster_centres,
    }
)
"""Every kind of baseline, and how it finds its directions.

Directions have unit length, but those of ICA, whose latents have unit variance.

* "random directions": Gaussian vectors; no data at all.
* "data points": random training samples minus the mean, without replacement.
* "PCA": the principal components, each with both signs, the largest variance first.
* "ICA": scikit-learn's FastICA, each component with both signs, of 16,384 samples at most.
* "k-means": the centres of scikit-learn's MiniBatchKMeans minus the mean, of 65,536 samples at
  most.
"""


QUICK = ("random directions", "data points", "PCA")
"""The baselines that take no iterations."""


def _components(rows: Rows, mean: Tensor) -> Tensor:
    """Return the principal components (n, d) that vary, the largest variance first."""
    scatter = torch.zeros(rows.width, rows.width, dtype=torch.float64, device=mean.device)
    for x in rows.batches():
        centred = x.double() - mean
        scatter.addmm_(centred.T, centred)
    variances, vectors = torch.linalg.eigh(scatter)
    components: Tensor = vectors.T[variances > 1e-10 * variances[-1]].flip(0)
    return components


def _both_signs(components: Tensor) -> Tensor:
    """Return components (n, d) and their negatives as (2 n, d), side by side."""
    return torch.stack((components, -components), dim=1).flatten(0, 1)

"""What other libraries call an SAE, scored as it is. tests/hosts has those not installed here."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor, nn

from monoloss_plugin.comparison import compare
from monoloss_plugin.convert import from_sparsify
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.functional import monoscore
from monoloss_plugin.other_saes import as_sae


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(load_digits().data).float(), dim=1)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_a_coder_of_sparsify_is_scored_by_its_own_output(activation, digits) -> None:
    cfg = SparseCoderConfig(activation=activation, k=4, num_latents=32)
    coder = SparseCoder(64, cfg)
    with torch.no_grad():
        coder.b_dec.copy_(digits.mean(0))
        out = coder(digits)
    latents = torch.zeros(len(digits), 32).scatter(1, out.latent_indices, out.latent_acts)
    with pytest.warns(UserWarning, match="R² is"):
        found = evaluate(coder, digits)
    torch.testing.assert_close(
        found.monoscore.scores.nan_to_num().float(),
        monoscore(latents, digits),
        atol=1e-5,
        rtol=1e-5,
    )
    error = (digits - out.sae_out).square().sum(0) / digits.sub(digits.mean(0)).square().sum(0)
    assert found.r2 == pytest.approx(1 - error[error.isfinite()].mean().item(), abs=1e-4)
    assert as_sae(coder).encode(digits).layout == torch.sparse_coo


@pytest.mark.parametrize("options", [{"transcode": True}, {"skip_connection": True}])
def test_transcoders_are_refused(options, digits) -> None:
    coder = SparseCoder(64, SparseCoderConfig(k=4, num_latents=32, **options))
    with pytest.raises(ValueError, match=r"sae: this is a transcoder.*score its latents with"):
        evaluate(coder, digits)


def test_an_encode_that_gives_no_tensor_names_the_ways_out(digits) -> None:
    class Pair(nn.Module):
        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

        def decode(self, latents: Tensor) -> Tensor:
            return latents

    with pytest.raises(TypeError, match=r"expected latents \(B, M\), got a tuple. Convert the SAE"):
        evaluate(Pair(), digits)


def test_what_needs_no_other_view_is_returned_as_it_is() -> None:
    class Plain:
        def encode(self, x: Tensor) -> Tensor:
            return x

        decode = encode

    plain = Plain()
    assert as_sae(plain) is plain


def test_compare_measures_it_as_it_measures_what_it_is_converted_to(digits) -> None:
    torch.manual_seed(0)
    coders = [SparseCoder(64, SparseCoderConfig(k=k, num_latents=32)) for k in (8, 4)]
    with torch.no_grad():
        for coder in coders:
            coder.b_dec.copy_(digits.mean(0))
    features = FeatureSet.from_tensors(digits, torch.tensor(load_digits().target))
    raw, converted = (
        compare(
            {"many": of[0], "few": of[1]}, features, match="l0", groups=["budgets", "dictionary"]
        ).to_frame()
        for of in (coders, [from_sparsify(coder) for coder in coders])
    )
    assert raw.columns.tolist() == converted.columns.tolist()
    torch.testing.assert_close(
        torch.tensor(raw.values),
        torch.tensor(converted.values),
        atol=1e-4,
        rtol=1e-4,
        equal_nan=True,
    )

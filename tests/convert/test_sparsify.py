"""The real library's SAEs, saved as it saves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor, nn

from monoloss_plugin.convert import from_sparsify
from tests.convert.conftest import LATENTS, WIDTH

TERM = {"monoloss": {"term": "MonoLoss", "name": "monoloss", "lam": 3e-4, "lam_units": "mse"}}


def make_coder(**options: Any) -> SparseCoder:
    """An SAE with no tensor at its initial zeros."""
    torch.manual_seed(0)
    coder = SparseCoder(WIDTH, SparseCoderConfig(**{"num_latents": LATENTS, "k": 5, **options}))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return coder


def output_of(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = coder(x)
    latents = torch.zeros(len(x), coder.num_latents)
    return latents.scatter(1, found.latent_indices, found.latent_acts), found.sae_out


@pytest.mark.parametrize("kind", ["module", "folder"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_latents": 0, "expansion_factor": 1}, {"normalize_decoder": False}, {"k": 40}],
)
def test_latents_and_reconstruction_are_the_librarys(
    options, kind, tmp_path, digits, assert_same
) -> None:
    coder = make_coder(**options)
    before = {name: tensor.clone() for name, tensor in coder.state_dict().items()}
    coder.save_to_disk(tmp_path / "layers.0")
    sae = from_sparsify(coder if kind == "module" else str(tmp_path / "layers.0"))
    assert_same(sae, digits, *output_of(coder, digits))
    with torch.no_grad():
        sae.W_dec.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in coder.state_dict().items())
    assert sae.cfg.metadata.monoloss == {"converted_from": "sparsify", "terms": {}}


def test_a_multi_topk_sae_keeps_k_latents_in_use(digits, assert_same) -> None:
    coder = make_coder(multi_topk=True)
    encoding = coder.encode(digits)
    latents = torch.zeros(len(digits), LATENTS).scatter(1, encoding.top_indices, encoding.top_acts)
    out = coder.decode(encoding.top_acts, encoding.top_indices)
    assert_same(from_sparsify(coder), digits, latents.detach(), out.detach())


def test_bfloat16_checkpoints(tmp_path, digits) -> None:
    coder = make_coder().bfloat16()
    coder.save_to_disk(tmp_path)
    sae = from_sparsify(tmp_path)
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, coder.encoder.weight.float().T)


def test_the_metadata_says_with_which_losses_the_adapter_trained_it(tmp_path) -> None:
    make_coder().save_to_disk(tmp_path)
    (tmp_path / "monoloss_terms.json").write_text(json.dumps({"terms": TERM}))
    assert from_sparsify(tmp_path).cfg.metadata.monoloss["terms"] == TERM


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "groupmax", "k": 6}, "the activation 'groupmax'"),
        ({"transcode": True}, "transcoders that keep the k largest latents"),
        ({"skip_connection": True}, "a skip connection in a TopK SAE"),
    ],
)
def test_what_saelens_has_no_equal_of_is_named(options, said, tmp_path) -> None:
    coder = make_coder(**options)
    coder.save_to_disk(tmp_path)
    for source in (coder, tmp_path):
        with pytest.raises(ValueError, match=f"source: SAELens has no architecture with {said}"):
            from_sparsify(source)


def test_other_sources_are_named(tmp_path) -> None:
    for source in (nn.Linear(2, 2), SparseCoder, 3):
        with pytest.raises(TypeError, match="source: expected a SparseCoder of sparsify or a fol"):
            from_sparsify(source)
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        from_sparsify(tmp_path)
    make_coder().save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for text, said in (
        ("[]", "cfg.json is not a JSON object"),
        ("{", "cfg.json is not a JSON object"),
        (json.dumps({**config, "signed": True}), "no architecture with signed latents"),
        (json.dumps({**config, "k": 0}), f"expected a k of 1 to {LATENTS}, got 0"),
        (json.dumps({}), f"expected a k of 1 to {LATENTS}, got None"),
    ):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            from_sparsify(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "sae.safetensors").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"sae\.safetensors is not a safetensors file"):
        from_sparsify(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors"):
        from_sparsify(tmp_path)

"""saev and ViT-Prisma are not on PyPI: their formats as documented, their formulas by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monoloss_plugin.convert import from_prisma, from_saev
from tests.convert.conftest import LATENTS, WIDTH


def weights(*more: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"W_enc": (WIDTH, LATENTS), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    shapes |= dict.fromkeys(("b_enc", *more), (LATENTS,))
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def top_k(pre_acts: Tensor, k: int) -> Tensor:
    kept = pre_acts.relu().topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter(-1, kept.indices, kept.values)


def saev_file(path: Path, activation: object, state: dict[str, Tensor], schema: int = 5) -> Path:
    header = {"schema": schema, "cfg": {"d_model": WIDTH, "activation": activation}, "lib": "0.3"}
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    return path


@pytest.mark.parametrize("activation", ["Relu", "TopK", "BatchTopK"])
def test_saev_checkpoints_keep_latents_and_reconstruction(
    activation, tmp_path, digits, assert_same
) -> None:
    state = weights()
    pre_acts = digits @ state["W_enc"] + state["b_enc"]
    latents = {
        "Relu": pre_acts.relu(),
        "TopK": top_k(pre_acts, 5),
        "BatchTopK": torch.where(pre_acts > 0.3, pre_acts, 0),
    }[activation]
    out = latents @ state["W_dec"] + state["b_dec"]
    if activation == "BatchTopK":
        state["activation.threshold"] = torch.tensor(0.3)
    written = {"cls": activation, "params": {"top_k": 5, "aux": {"cls": "AuxK", "params": {}}}}
    sae = from_saev(saev_file(tmp_path / "sae.pt", written, state))
    assert_same(sae, digits, latents, out)


def test_the_first_schema_of_saev_was_relu(tmp_path, digits, assert_same) -> None:
    state = weights()
    with (tmp_path / "sae.pt").open("wb") as file:
        file.write(json.dumps({"d_vit": WIDTH, "exp_factor": 1, "l1_coeff": 1e-3}).encode() + b"\n")
        torch.save(state, file)
    latents = (digits @ state["W_enc"] + state["b_enc"]).relu()
    sae = from_saev(tmp_path / "sae.pt")
    assert_same(sae, digits, latents, latents @ state["W_dec"] + state["b_dec"])


def test_what_is_no_checkpoint_of_saev_is_named(tmp_path) -> None:
    torch.save(weights(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"source: plain.pt does not begin with a line of JSON"):
        from_saev(tmp_path / "plain.pt")
    later = saev_file(tmp_path / "later.pt", {"cls": "Relu", "params": {}}, weights(), schema=6)
    with pytest.raises(ValueError, match=r"checkpoints of schema 2 to 5 do"):
        from_saev(later)
    with pytest.raises(ValueError, match=r"no activation\.threshold in it; it has W_dec, W_enc"):
        from_saev(saev_file(tmp_path / "a.pt", {"cls": "BatchTopK", "params": {}}, weights()))
    with pytest.raises(ValueError, match="expected the activation Relu, TopK or BatchTopK, got 'G"):
        from_saev(saev_file(tmp_path / "b.pt", {"cls": "Gelu", "params": {}}, weights()))
    with pytest.raises(ValueError, match=r"source: c\.pt is not a checkpoint of tensors and plain"):
        from_saev(
            saev_file(tmp_path / "c.pt", {"cls": "Relu", "params": {}}, {"W_enc": print})  # type: ignore[dict-item]
        )
    with pytest.raises(FileNotFoundError):
        from_saev(tmp_path / "none.pt")


PRISMA = {
    "relu": {"architecture": "standard", "activation_fn_str": "relu"},
    "relu, layer_norm": {"architecture": "vanilla", "normalize_activations": "layer_norm"},
    "topk": {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
    },
    "gated": {"architecture": "gated", "activation_fn_str": "relu"},
}


@pytest.mark.parametrize("name", PRISMA)
@pytest.mark.parametrize("wrapped", [True, False])
def test_prisma_saes_keep_latents_and_reconstruction(
    name, wrapped, tmp_path, digits, assert_same
) -> None:
    gated = name == "gated"
    state = weights(*(("b_gate", "b_mag", "r_mag") if gated else ()))
    x, mean, spread = digits, torch.zeros(len(digits), 1), torch.ones(len(digits), 1)
    if "layer_norm" in name:
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).std(1, keepdim=True)
        x = (x - mean) / (spread + 1e-5)
    projected = (x - state["b_dec"]) @ state["W_enc"]
    if gated:
        size = (x - state["b_dec"]) @ (state["W_enc"] * state["r_mag"].exp()) + state["b_mag"]
        latents = (projected + state["b_gate"] > 0) * size.relu()
    else:
        pre_acts = projected + state["b_enc"]
        latents = top_k(pre_acts, 5) if name == "topk" else pre_acts.relu()
    out = (latents @ state["W_dec"] + state["b_dec"]) * spread + mean
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps({"d_in": WIDTH, **PRISMA[name]}))
    sae = from_prisma(tmp_path / "weights.pt")
    if "layer_norm" in name:  # the reconstruction needs the inputs' own mean and deviation
        found = sae.encode(digits)
        torch.testing.assert_close(found, latents, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sae.decode(found), out, atol=1e-5, rtol=1e-4)
    else:
        assert_same(sae, digits, latents, out)


def test_what_is_no_sae_of_prisma_is_named(tmp_path) -> None:
    torch.save(weights(), tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError):
        from_prisma(tmp_path / "weights.pt")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architecture": "standard", "activation_fn_str": "tanh-relu"}))
    with pytest.raises(ValueError, match="SAELens has no architecture like 'standard' with 'tanh"):
        from_prisma(tmp_path / "weights.pt")
    config.write_text(json.dumps({"architecture": "standard", "is_transcoder": True}))
    with pytest.raises(ValueError, match="source: a transcoder"):
        from_prisma(tmp_path / "weights.pt")
    config.write_text(json.dumps({"architecture": "standard", "activation_fn_kwargs": [5]}))
    with pytest.raises(ValueError, match=r"source: config.json is not a config of ViT-Prisma"):
        from_prisma(tmp_path / "weights.pt")
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"source: config.json is not a config of ViT-Prisma"):
        from_prisma(tmp_path / "weights.pt")

"""Every class of the real library, saved as it saves."""

from __future__ import annotations

import json

import pytest
import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

from monoloss_plugin.convert import from_dictionary_learning
from tests.convert.conftest import LATENTS, WIDTH

MAKERS = {
    "AutoEncoder": lambda: AutoEncoder(WIDTH, LATENTS),
    "AutoEncoderNew": lambda: AutoEncoderNew(WIDTH, LATENTS),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(WIDTH, LATENTS),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(WIDTH, LATENTS, k=5),
    "BatchTopKSAE": lambda: BatchTopKSAE(WIDTH, LATENTS, k=5),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(WIDTH, LATENTS, 5, [16, 32]),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(WIDTH, LATENTS),
}


def saved(folder, name):
    """A dictionary with no tensor at its initial zeros, and the folder it is saved to."""
    torch.manual_seed(0)
    dictionary = MAKERS[name]()
    for key, tensor in dictionary.state_dict().items():
        if key not in ("k", "group_sizes"):
            tensor += 0.05 * torch.randn_like(tensor)
    if hasattr(dictionary, "threshold"):
        dictionary.threshold.data.fill_(0.1).add_(0.02 * torch.rand_like(dictionary.threshold))
    folder.mkdir()
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    config = {"trainer": {"dict_class": name, "k": 5, "lm_name": "clip"}}
    (folder / "config.json").write_text(json.dumps(config))
    return dictionary, folder


@pytest.mark.parametrize("name", MAKERS)
def test_latents_and_reconstruction_are_the_librarys(name, tmp_path, digits, assert_same) -> None:
    dictionary, folder = saved(tmp_path / name, name)
    if name == "AutoEncoder":  # whose loader makes the decoder's norms 1
        dictionary = AutoEncoder.from_pretrained(folder / "ae.pt")
        assert torch.allclose(dictionary.decoder.weight.norm(dim=0), torch.ones(LATENTS))
    with torch.no_grad():
        latents = dictionary.encode(digits)
        out = dictionary.decode(latents)
    sae = from_dictionary_learning(folder)
    assert_same(sae, digits, latents, out)
    assert sae.cfg.metadata.monoloss["converted_from"] == "dictionary_learning"


def test_a_threshold_that_was_never_set_lets_every_activation_pass(
    tmp_path, digits, assert_same
) -> None:
    dictionary, folder = saved(tmp_path / "early", "BatchTopKSAE")
    dictionary.threshold.fill_(-1.0)
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    latents = dictionary.encode(digits).detach()
    sae = from_dictionary_learning(folder / "ae.pt")
    assert_same(sae, digits, latents, dictionary.decode(latents).detach())


def test_without_its_config_the_class_must_be_said(tmp_path) -> None:
    _, folder = saved(tmp_path / "topk", "AutoEncoderTopK")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="give dict_class"):
        from_dictionary_learning(folder)
    assert from_dictionary_learning(folder, dict_class="AutoEncoderTopK").cfg.k == 5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trainer": {"dict_class": "IdentityDict"}}, "got 'IdentityDict'"),
        ({"trainer": {"dict_class": "GatedAutoEncoder"}}, "no gate_bias"),
        ({"trainer": {}}, "give dict_class"),
        ({"trainer": "TopK"}, "says nothing of a trainer"),
        ([], "says nothing of a trainer"),
    ],
)
def test_a_config_that_does_not_fit_is_named(config, said, tmp_path) -> None:
    _, folder = saved(tmp_path / "topk", "AutoEncoderTopK")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        from_dictionary_learning(folder)


def test_a_whole_module_is_not_unpickled(tmp_path) -> None:
    dictionary, folder = saved(tmp_path / "topk", "AutoEncoderTopK")
    torch.save(dictionary, folder / "ae.pt")
    with pytest.raises(ValueError, match="save only its state_dict"):
        from_dictionary_learning(folder)


def test_k_may_be_a_number_or_the_configs(tmp_path) -> None:
    dictionary, folder = saved(tmp_path / "topk", "AutoEncoderTopK")
    state = {k: v for k, v in dictionary.state_dict().items() if k not in ("k", "threshold")}
    torch.save(state, folder / "ae.pt")
    assert from_dictionary_learning(folder).cfg.k == 5
    torch.save({**state, "k": 7}, folder / "ae.pt")
    assert from_dictionary_learning(folder).cfg.k == 7
    for k in (0, 99, 2.5, torch.ones(2), "four"):
        torch.save({**state, "k": k}, folder / "ae.pt")
        with pytest.raises(ValueError, match="k"):
            from_dictionary_learning(folder)


def test_weights_that_are_no_numbers_are_named(tmp_path) -> None:
    dictionary, folder = saved(tmp_path / "topk", "AutoEncoderTopK")
    state = dictionary.state_dict()
    for changed, said in (
        ({"b_dec": state["b_dec"] * torch.nan}, "b_dec: contains NaN or infinite"),
        (
            {"b_dec": state["b_dec"] * 1j},
            "expected a tensor of numbers as b_dec, got torch.complex",
        ),
        ({"encoder.bias": state["b_dec"]}, r"size mismatch for b_enc: .*\[64\]"),
    ):
        torch.save({**state, **changed}, folder / "ae.pt")
        with pytest.raises(ValueError, match=said):
            from_dictionary_learning(folder)


def test_half_precision_is_read(tmp_path, digits) -> None:
    dictionary, folder = saved(tmp_path / "topk", "AutoEncoderTopK")
    exact = from_dictionary_learning(folder).encode(digits)
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in dictionary.state_dict().items()
    }
    torch.save(state, folder / "ae.pt")
    assert (from_dictionary_learning(folder).encode(digits) - exact).abs().mean() < 1e-3

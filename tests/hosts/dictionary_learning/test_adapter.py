"""The adapter on the library's own trainers, in its own loop and in a loop by hand."""

from __future__ import annotations

import copy
import doctest
import json
import pickle
import queue
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew
from dictionary_learning.trainers import StandardTrainer, TopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReLUFunction
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.trainer import SAETrainer
from dictionary_learning.training import log_stats
from dictionary_learning.utils import load_dictionary
from torch import Tensor

from monoloss_plugin import L1L2Ratio, MonoLoss, MonoScore, OffSupportL1, functional
from monoloss_plugin.adapters import dictionary_learning as adapter
from monoloss_plugin.adapters.dictionary_learning import add_loss
from monoloss_plugin.batch import Batch
from monoloss_plugin.convert import from_dictionary_learning
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.hub.record import record_in
from tests.hosts.dictionary_learning.conftest import (
    BATCH,
    TOP_K,
    TRAINERS,
    make,
    make_config,
    make_trainer,
    stream,
    train,
)

WITHOUT_SELECTION = [name for name in TRAINERS if name not in TOP_K]
RAW = MonoLoss(lam=0.5, lam_units="raw")


def latents_by_hand(name: str, trainer: Any, x: Tensor) -> Tensor:
    """The latents of a training step, from the library's classes."""
    ae = trainer.ae
    if name == "jumprelu":
        reached = x @ ae.W_enc + ae.b_enc
        return JumpReLUFunction.apply(reached, ae.threshold, trainer.bandwidth)
    return ae.encode(x, use_threshold=False) if name in TOP_K else ae.encode(x)


def gradients(loss: Tensor, trainer: Any) -> dict[str, Tensor]:
    names, parameters = zip(*trainer.ae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.ae.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def run(trainer: Any, x: Tensor, steps: range = range(15)) -> dict[str, Tensor]:
    """A loop by hand."""
    batches = stream(x)
    for _ in range(steps.start):
        next(batches)
    for step in steps:
        trainer.update(step, next(batches))
    return weights(trainer)


def mean_score(trainer: Any, x: Tensor) -> float:
    metric = MonoScore()
    with torch.no_grad():
        metric.update(trainer.ae.encode(x), x)
    return metric.compute().mean_defined


def losses(trainer: Any, x: Tensor, step: int = 7) -> dict[str, float]:
    """What the host logs."""
    with torch.no_grad():
        return trainer.loss(x, step=step, logging=True)[3]


def applied_weight(trainer: Any, x: Tensor, step: int) -> float:
    """The weight of MonoLoss in one step."""
    logged = losses(trainer, x, step)
    return logged["monoloss"] / (1 - logged["monoscore"])


# Every trainer, trained for real


@pytest.mark.parametrize("name", TRAINERS)
def test_training_with_monoloss_raises_the_score_of_every_trainer(name, digits):
    scores = {}
    for lam in (0.0, 0.02):
        config = add_loss(make_config(name, steps=100), MonoLoss(lam=lam))
        scores[lam] = mean_score(train(config, digits), digits)
    assert scores[0.02] > scores[0.0] + 0.02


@pytest.mark.parametrize("name", TRAINERS)
def test_loss_and_gradient_are_the_host_s_plus_the_weighted_term(name, digits, way):
    x = digits[:BATCH]
    plain, attached = make_trainer(name), make_trainer(name)
    add_loss(attached, RAW)
    term = functional.monoloss(latents_by_hand(name, plain, x), x)
    expected = plain.loss(x, step=7) + 0.5 * term
    found = attached.loss(x, step=7)
    torch.testing.assert_close(found, expected)
    moved = gradients(0.5 * term, plain)
    assert max(float(gradient.abs().max()) for gradient in moved.values()) > 0
    expected = plain.loss(x, step=7) + 0.5 * functional.monoloss(latents_by_hand(name, plain, x), x)
    # JumpReLU's sparsity has gradients of 10, which float32 rounds.
    torch.testing.assert_close(
        gradients(found, attached), gradients(expected, plain), atol=1e-5, rtol=1e-4
    )


def test_jumprelu_s_latents_are_those_of_encode_and_its_threshold_gets_the_gradient_at_zero(digits):
    x = digits[:BATCH]
    trainer = make_trainer("jumprelu", sparsity_penalty=0.0)
    ae = trainer.ae
    ae.threshold.data.fill_(-0.03)[::2] = 0.03
    assert (latents_by_hand("jumprelu", trainer, x) < 0).any()
    found = gradients(trainer.loss(x, step=7), trainer)["threshold"]
    add_loss(trainer, RAW)
    logged = losses(trainer, x)
    assert 1 - logged["monoscore"] == pytest.approx(functional.monoloss(ae.encode(x), x).item())
    found = gradients(trainer.loss(x, step=7), trainer)["threshold"] - found

    latents = latents_by_hand("jumprelu", trainer, x).detach().clamp(min=0).requires_grad_()
    (wanted,) = torch.autograd.grad(0.5 * functional.monoloss(latents, x), latents)
    reached = x @ ae.W_enc + ae.b_enc
    (expected,) = torch.autograd.grad(
        JumpReLUFunction.apply(reached, ae.threshold, trainer.bandwidth),
        ae.threshold,
        wanted * (reached.detach() * (reached > ae.threshold) >= 0),
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_an_autoencoder_that_scales_its_output_gives_the_latents_of_encode(digits):
    trainer = make_trainer("april", dict_class=AutoEncoderNew)
    trainer.ae.decoder.weight.data *= torch.rand(96) * 3
    add_loss(trainer, RAW)
    expected = functional.monoloss(trainer.ae.encode(digits), digits).item()
    assert 1 - losses(trainer, digits)["monoscore"] == pytest.approx(expected)


@pytest.mark.parametrize("name", TRAINERS)
def test_weight_zero_is_bit_identical_to_the_host_s_own_training(name, digits, tmp_path):
    plain = train(make_config(name), digits, verbose=True, log_steps=6)
    config = add_loss(make_config(name), MonoLoss(lam=0.0), warm_up_steps=3, start=0.2)
    attached = train(config, digits, verbose=True, log_steps=6)
    assert_same(weights(plain), weights(attached))


@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated"])
def test_after_remove_training_is_bit_identical_and_nothing_is_left(name, digits):
    plain, cleaned = make_trainer(name), make_trainer(name)
    handle = add_loss(cleaned, MonoLoss(lam=1.0), warm_up_steps=3)
    cleaned.loss(digits[:BATCH], step=0)
    handle.remove()
    handle.remove()
    plain.loss(digits[:BATCH], step=0)
    assert set(cleaned.__dict__) == set(plain.__dict__)
    assert set(cleaned.ae.__dict__) == set(plain.ae.__dict__)
    assert type(cleaned) is type(plain)
    assert cleaned.config == plain.config
    assert_same(run(plain, digits), run(cleaned, digits))


def test_remove_during_training_stops_the_term(digits):
    trainer = make_trainer("batchtopk")
    handle = add_loss(trainer, MonoLoss(lam=0.1))
    assert "monoloss" in losses(trainer, digits)
    handle.remove()
    assert "monoloss" not in losses(trainer, digits)
    add_loss(trainer, MonoLoss(lam=0.1))
    assert "monoloss" in losses(trainer, digits)


def test_a_copy_of_the_trainer_is_independent(digits):
    trainer = make_trainer("topk")
    handle = add_loss(trainer, RAW)
    duplicate = copy.deepcopy(trainer)
    handle.remove()
    with torch.no_grad():
        duplicate.ae.encoder.weight.mul_(torch.rand(96, 1))
    assert "monoloss" not in losses(trainer, digits)
    expected = functional.monoloss(duplicate.ae.encode(digits), digits)
    assert losses(duplicate, digits)["monoloss"] == pytest.approx(0.5 * expected.item())
    assert duplicate.config["monoloss"]["terms"]["monoloss"]["lam"] == 0.5


# What lam becomes


@pytest.mark.parametrize("units", ["mse", "nmse"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_factor_is_the_ratio_of_the_host_s_reconstruction_loss_to_the_paper_s(
    name, units, digits
):
    """Of a dictionary whose decoder is zero, which has the same error at each nested width."""
    x, scale = digits[:BATCH], 7.0
    options = {"group_weights": [0.5, 0.2, 0.1]} if name == "matryoshka" else {}
    if "annealed" in name:
        options["initial_sparsity_penalty"] = 0.0
    trainer = make_trainer(name, **options)
    for parameter in (p for n, p in trainer.ae.named_parameters() if "dec" in n or n == "bias"):
        torch.nn.init.zeros_(parameter)
    if name == "matryoshka":
        trainer.ae.active_groups = 2
    add_loss(trainer, MonoLoss(lam=1.0, lam_units=units))
    logged = losses(trainer, scale * x)
    host = next((logged[key] for key in ("mse_loss", "l2_loss") if key in logged), None)
    if host is None:  # PAnnealTrainer does not log it, and has no other loss here
        host = type(trainer).loss(trainer, scale * x, 7).item()
    paper = x.square().mean() if units == "mse" else x.square().sum(1).mean()
    factor = trainer.config["monoloss"]["terms"]["monoloss"]["factor"]
    assert factor == pytest.approx(host / paper.item(), rel=1e-5)
    assert logged["monoloss"] == pytest.approx(factor * (1 - logged["monoscore"]), rel=1e-5)


def test_with_normalize_activations_the_scale_is_that_of_what_the_loss_sees(digits, caplog):
    config = add_loss(make_config("topk"), MonoLoss(lam=3e-4))
    trainer = train(config, 7 * digits, normalize_activations=True)
    record = trainer.config["monoloss"]
    assert record["input_mean_square_norm"] == pytest.approx(1.0, abs=1e-4)
    assert record["terms"]["monoloss"]["factor"] == pytest.approx(64.0, abs=1e-2)
    told = [r.getMessage() for r in caplog.records if r.name.endswith("dictionary_learning")]
    assert len(told) == 1
    assert "monoloss: lam 0.0003" in told[0]
    assert "the weight in its loss is 64" in told[0]


# Logs, configs and files


@pytest.mark.parametrize("name", TRAINERS)
def test_the_host_logs_the_term_with_its_losses(name, digits):
    x = digits[:BATCH]
    plain, trainer = make_trainer(name), make_trainer(name)
    add_loss(trainer, RAW)
    logs: list[Any] = []
    for one in (plain, trainer):
        logs.append(queue.Queue())
        log_stats([one], 7, x, False, False, log_queues=[logs[-1]])
    before, after = (log.get() for log in logs)
    assert after.keys() - before.keys() == {"monoloss", "monoscore", "monoscore_defined"}
    term = functional.monoloss(latents_by_hand(name, trainer, x), x).item()
    assert after["monoloss"] == pytest.approx(0.5 * term)
    assert after["monoscore"] == pytest.approx(1 - term)
    assert 0 < after["monoscore_defined"] <= 96
    if "loss" in before:
        assert after.pop("loss") == pytest.approx(before.pop("loss") + 0.5 * term)
    assert {key: after[key] for key in before} == before


def test_a_logged_run_is_the_run_without_logs(digits):
    found = []
    for options in ({}, {"verbose": True, "log_steps": 3}):
        config = add_loss(make_config("standard"), MonoLoss(lam=0.01), warm_up_steps=8, start=4)
        found.append(weights(train(config, digits, **options)))
    assert_same(*found)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_config_says_what_was_added_and_nothing_else_changes(name):
    plain, term = make_trainer(name), MonoLoss(lam=0.1)
    trainer = make(add_loss(make_config(name), term, warm_up_steps=5, start=0.25))
    config = trainer.config
    record = config.pop("monoloss")
    assert config == plain.config
    assert record == {
        "terms": {
            "monoloss": {
                "term": "MonoLoss",
                "lam": 0.1,
                "lam_units": "mse",
                "name": "monoloss",
                "patches": "image",
                "within_images": False,
                "warm_up_steps": 5,
                "start": 0.25,
                "compared_by": "the SAE's inputs",
            }
        }
    }
    assert type(trainer).__name__ == type(plain).__name__
    assert isinstance(trainer, type(plain))


@pytest.mark.filterwarnings("ignore:sae. R².*worse than the mean")  # after 20 steps
@pytest.mark.parametrize("name", TRAINERS)
def test_a_saved_dictionary_is_loaded_scored_converted_and_published(
    name, digits, tmp_path, assert_same
):
    config = add_loss(make_config(name), MonoLoss(lam=0.01))
    trainer = train(config, digits, save_dir=str(tmp_path), save_steps=[10])
    folder = tmp_path / "trainer_0"
    assert json.loads((folder / "config.json").read_text())["trainer"]["monoloss"]["terms"]
    dictionary, saved = load_dictionary(str(folder), "cpu")
    assert saved["trainer"]["dict_class"] == type(trainer.ae).__name__
    assert (folder / "checkpoints" / "ae_10.pt").is_file()
    with torch.no_grad():
        latents = dictionary.encode(digits)
        out = dictionary.decode(latents)
    sae = from_dictionary_learning(folder)
    assert_same(sae, digits, latents, out)
    (loss,) = record_in(sae).losses
    assert (loss["name"], loss["lam"]) == ("monoloss", 0.01)
    scores = evaluate(dictionary, digits).monoscore.scores.nan_to_num().float()
    expected = functional.monoscore(latents, digits)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_sae_for_vlm_s_spelling_of_matryoshka_is_known(digits, request, tmp_path):
    for renamed in (TRAINERS["matryoshka"]["trainer"], MatryoshkaBatchTopKSAE):
        request.addfinalizer(partial(setattr, renamed, "__name__", renamed.__name__))
        renamed.__name__ = renamed.__name__.replace("Matryoshka", "Matroyshka")
    config = add_loss(make_config("matryoshka"), OffSupportL1(lam=0.1))
    trainer = train(config, digits, save_dir=str(tmp_path))
    assert trainer.config["monoloss"]["terms"]["off_support_l1"]["factor"] == pytest.approx(1 / 3)
    path = tmp_path / "trainer_0/config.json"
    path.write_text(path.read_text().replace("MatryoshkaBatchTopKSAE", "MatroyshkaBatchTopKSAE"))
    sae = from_dictionary_learning(path.parent)
    torch.testing.assert_close(sae.encode(digits), trainer.ae.encode(digits))


def test_wandb_gets_a_config_that_it_can_take(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = add_loss(make_config("topk", steps=3), MonoLoss(lam=0.01))
    train(config, digits, use_wandb=True, log_steps=1)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"monoscore_defined" in written.read_bytes()


# Schedules


@pytest.mark.parametrize("start", [4, 0.2])
def test_the_weight_is_zero_before_the_start_and_then_grows(start, digits):
    term = MonoLoss(lam=0.5, lam_units="raw")
    trainers = [
        make(add_loss(make_config("gated"), term, start=start, warm_up_steps=4)),
        make_trainer("topk"),
    ]
    add_loss(trainers[1], term, start=start, warm_up_steps=4)
    expected = [0.0] * 5 + [0.125, 0.25, 0.375] + [0.5] * 4
    for trainer in trainers:
        found = [applied_weight(trainer, digits[:BATCH], step) for step in range(12)]
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_counts_from_where_the_term_is_added(digits):
    trainer = make_trainer("topk")
    run(trainer, digits, range(6))
    add_loss(trainer, RAW, warm_up_steps=4, start=2)
    found = [applied_weight(trainer, digits[:BATCH], step) for step in range(6, 12)]
    assert found == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5], abs=1e-6)


def test_a_term_that_gets_no_full_weight_is_warned_of(digits):
    with pytest.warns(UserWarning, match="warm_up_steps=30 is longer than the 20 steps") as told:
        add_loss(make_config("topk"), RAW, warm_up_steps=30)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="start=20 is not before the end") as told:
        add_loss(make_trainer("topk"), RAW, start=20)
    assert told[0].filename == __file__


def test_a_share_of_the_run_needs_a_trainer_that_knows_its_steps(digits):
    trainer = make_trainer("gated")
    with pytest.raises(ValueError, match=r"start: 0\.5 is a share of the run"):
        add_loss(trainer, RAW, start=0.5)
    assert "monoloss" not in trainer.config


@pytest.mark.parametrize(
    "name", ["topk", "batchtopk", "matryoshka", "jumprelu", "standard", "april", "gated"]
)
def test_a_run_goes_on_from_what_a_user_saves(name, digits):
    def fresh() -> Any:
        trainer = make_trainer(name, steps=30)
        add_loss(trainer, MonoLoss(lam=0.01), warm_up_steps=20)
        return trainer

    whole = run(fresh(), digits, range(30))
    first = fresh()
    run(first, digits, range(12))
    resumed = fresh()
    for part in ("ae", "optimizer", "scheduler"):
        getattr(resumed, part).load_state_dict(getattr(first, part).state_dict())
    if hasattr(first, "num_tokens_since_fired"):
        resumed.num_tokens_since_fired = first.num_tokens_since_fired
    torch.testing.assert_close(run(resumed, digits, range(12, 30)), whole)


# Other similarity spaces, several terms


def test_embeddings_take_the_place_of_the_inputs(digits):
    x = digits[:BATCH]
    trainer = make_trainer("topk")
    add_loss(trainer, RAW, embeddings=lambda inputs: inputs[:, :32].square())
    images = torch.arange(BATCH) // 4
    of_images = MonoLoss(lam=0.5, lam_units="raw", name="of_images")
    add_loss(trainer, of_images, embeddings=lambda inputs: Batch(inputs, images=images))
    logged = losses(trainer, x)
    latents = trainer.ae.encode(x)
    expected = 0.5 * functional.monoloss(latents, x[:, :32].square())
    assert logged["monoloss"] == pytest.approx(expected.item())
    expected = 0.5 * functional.monoloss(latents, x, groups=images)
    assert logged["of_images"] == pytest.approx(expected.item())
    terms = trainer.config["monoloss"]["terms"]
    assert terms["monoloss"]["compared_by"] == "other embeddings"


@pytest.mark.parametrize("name", TOP_K)
def test_terms_stack_and_the_regularizers_get_the_activations_before_the_selection(name, digits):
    x = digits[:BATCH]
    config = make_config(name)
    given = dict(config)
    ratio = L1L2Ratio(lam=0.3, lam_units="raw")
    stacked = add_loss(add_loss(config, RAW), OffSupportL1(lam=0.2, lam_units="raw"))
    assert config == given
    trainer = make(stacked)
    handle = add_loss(trainer, ratio)
    logged = losses(trainer, x)
    ae = trainer.ae
    encoder = (
        (ae.W_enc, ae.b_enc) if name == "matryoshka" else (ae.encoder.weight.T, ae.encoder.bias)
    )
    pre_acts = torch.relu((x - ae.b_dec) @ encoder[0] + encoder[1])
    latents = latents_by_hand(name, trainer, x)
    expected = {
        "monoloss": 0.5 * functional.monoloss(latents, x),
        "off_support_l1": 0.2 * functional.off_support_l1(pre_acts, latents != 0),
        "l1_l2_ratio": 0.3 * functional.l1_l2_ratio(pre_acts, latents != 0),
    }
    for key, value in expected.items():
        assert logged[key] == pytest.approx(value.item(), rel=1e-4), key
    total = make_trainer(name).loss(x, step=7) + sum(expected.values())
    torch.testing.assert_close(trainer.loss(x, step=7), total)
    handle.remove()
    assert set(trainer.config["monoloss"]["terms"]) == {"monoloss", "off_support_l1"}
    add_loss(trainer, L1L2Ratio(lam=0.7))
    assert trainer.config["monoloss"]["terms"]["l1_l2_ratio"]["lam"] == 0.7


def test_a_config_with_terms_can_be_pickled():
    config = pickle.loads(pickle.dumps(add_loss(make_config("topk"), MonoLoss(lam=0.1))))
    first, second = make(config), make(config)
    add_loss(first, L1L2Ratio(lam=0.1))
    assert set(first.config["monoloss"]["terms"]) == {"monoloss", "l1_l2_ratio"}
    assert set(second.config["monoloss"]["terms"]) == {"monoloss"}


def test_options_that_json_cannot_write_are_written_as_text():
    @dataclass(frozen=True)
    class Own(MonoLoss):
        dtype: torch.dtype = torch.float32

    trainer = make(add_loss(make_config("topk"), Own(lam=0.1)))
    assert trainer.config["monoloss"]["terms"]["monoloss"]["dtype"] == "torch.float32"


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(adapter).attempted > 3


def test_a_loss_without_a_gradient_is_the_host_s_alone(digits):
    plain, trainer = make_trainer("topk"), make_trainer("topk")
    add_loss(trainer, RAW)
    with torch.no_grad():
        assert torch.equal(trainer.loss(digits, step=7), plain.loss(digits, step=7))


# Mistakes


def test_a_dictionary_of_one_s_own_with_signed_latents_is_refused(digits):
    class Signed(AutoEncoder):
        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x - self.bias)

    trainer = make_trainer("standard", dict_class=Signed)
    add_loss(trainer, RAW)
    with pytest.raises(ValueError, match="monoloss: reads 0 as 'not active'"):
        trainer.loss(digits, step=0)


@pytest.mark.parametrize("name", WITHOUT_SELECTION)
def test_a_trainer_without_a_selection_refuses_the_regularizers(name):
    for target in (make_config(name), make_trainer(name)):
        with pytest.raises(ValueError, match="off_support_l1: needs a Top-k selection"):
            add_loss(target, OffSupportL1(lam=0.1))


def test_wrong_targets_and_options_are_named(digits):
    config, trainer = make_config("topk"), make_trainer("topk")
    own = type("OwnTrainer", (SAETrainer,), {})
    for target, said in (
        (torch.nn.Linear(2, 2), r"target: expected .* of dictionary_learning.*got Linear"),
        ([config], "got list"),
        (own(), "got OwnTrainer"),
        (TopKTrainer, "got the class TopKTrainer; give the config"),
        ({**config, "trainer": "TopKTrainer"}, r"target\['trainer'\]: expected a trainer's class"),
        ({**config, "trainer": torch.nn.Linear}, "got Linear"),
    ):
        with pytest.raises(TypeError, match=said):
            add_loss(target, RAW)
    used = add_loss(config, RAW)
    train_in_place = dict(used)
    del train_in_place["trainer"]  # as trainSAE does
    with pytest.raises(ValueError, match=r"the config has no 'trainer'\. trainSAE removes it"):
        add_loss(train_in_place, RAW)
    with pytest.raises(ValueError, match="monoloss: the config has a term of this name"):
        add_loss(used, RAW)
    add_loss(trainer, RAW)
    with pytest.raises(ValueError, match="monoloss: a term of this name is attached"):
        add_loss(trainer, RAW)
    with pytest.raises(TypeError, match="loss: expected a loss term"):
        add_loss(config, 0.1)
    with pytest.raises(TypeError, match="embeddings: expected a frozen encoder"):
        add_loss(config, RAW, embeddings="images")
    with pytest.raises(ValueError, match="warm_up_steps"):
        add_loss(config, RAW, warm_up_steps=-1)


def test_a_name_that_the_host_logs_is_refused(digits):
    trainer = make_trainer("topk")
    add_loss(trainer, MonoLoss(lam=0.1, name="auxk_loss"))
    with pytest.raises(ValueError, match="auxk_loss: TopKTrainer logs a loss of this name"):
        losses(trainer, digits)


def test_a_trainer_of_one_s_own_that_extends_the_library_s_is_taken(digits):
    class Louder(StandardTrainer):
        def loss(self, x: Tensor, step: int, logging: bool = False, **options: Any) -> Any:
            found = super().loss(x, step, logging, **options)
            return found if logging else 2 * found

    config = {**make_config("standard"), "trainer": Louder}
    plain, trainer = make(config), make(add_loss(config, RAW))
    term = 0.5 * functional.monoloss(plain.ae.encode(digits), digits)
    expected = plain.loss(digits, step=7) + term
    torch.testing.assert_close(trainer.loss(digits, step=7), expected)


def test_a_host_that_moved_what_we_attach_to_is_named(digits, monkeypatch):
    trainer = make_trainer("topk")
    monkeypatch.setattr(type(trainer.ae), "decode", None)
    with pytest.raises(RuntimeError, match=r"has no AutoEncoderTopK.decode.*tested with"):
        add_loss(trainer, RAW)
    monkeypatch.undo()
    monkeypatch.setattr(TopKTrainer, "loss", lambda self, x, step, logging: x.sum())
    add_loss(trainer, RAW)
    with pytest.raises(RuntimeError, match=r"no call of ae\.encode or ae\.decode in TopK"):
        trainer.loss(digits, step=0)

"""The SAELens adapter on SAELens's own trainers, runners and architectures."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, AbsTopKTrainingSAE, SAETrainer, TopKTrainingSAE, TrainingSAE
from sae_lens.config import LoggingConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors.torch import save_file
from torch import Tensor

from monoloss_plugin import L1L2Ratio, MonoLoss, MonoScore, OffSupportL1, functional
from monoloss_plugin.adapters import sae_lens as adapter
from monoloss_plugin.adapters.sae_lens import add_loss, strip_checkpoint
from monoloss_plugin.batch import Batch
from tests import oracle
from tests.adapters import attach_everywhere
from tests.adapters.conftest import (
    ARCHITECTURES,
    BATCH,
    make_sae,
    make_trainer,
    stream,
    trainer_config,
)

TOP_K = ["batchtopk", "topk", "topk sparse", "matryoshka_batchtopk"]
WITHOUT_SELECTION = [name for name in ARCHITECTURES if name not in TOP_K]


def step_input(x: Tensor, sae: TrainingSAE[Any], step: int = 0) -> TrainStepInput:
    coefficients = {
        name: getattr(config, "value", config) for name, config in sae.get_coefficients().items()
    }
    return TrainStepInput(
        sae_in=x,
        coefficients=coefficients,
        dead_neuron_mask=None,
        n_training_steps=step,
        is_logging_step=False,
    )


def gradients(loss: Tensor, sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(sae.named_parameters(), found, strict=True)
    }


def weights(sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def attached_output(sae: TrainingSAE[Any], x: Tensor, *terms: Any) -> Any:
    """What the host's forward pass returns with these terms attached."""
    for term in terms:
        add_loss(sae, term)
    return sae.training_forward_pass(step_input(x, sae))


def mean_score(sae: TrainingSAE[Any], images: Tensor) -> float:
    metric = MonoScore()
    with torch.no_grad():
        metric.update(sae.encode(images), images)
    return metric.compute().mean_defined


# Every architecture, trained for real


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_with_monoloss_raises_the_score_of_every_architecture(architecture, images):
    scores = {}
    for lam in (0.0, 0.02):
        sae = make_sae(architecture)
        trainer = make_trainer(sae, stream(images), steps=100)
        trainer.add_loss(MonoLoss(lam=lam))
        trainer.fit()
        scores[lam] = mean_score(sae, images)
    assert scores[0.02] > scores[0.0] + 0.02


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_the_host_s_plus_the_weighted_term(architecture, images, way):
    x = images[:BATCH]
    plain, attached = make_sae(architecture), make_sae(architecture)
    add_loss(attached, MonoLoss(lam=0.5, lam_units="raw"))

    expected = plain.training_forward_pass(step_input(x, plain))
    term = functional.monoloss(expected.feature_acts, x)
    output = attached.training_forward_pass(step_input(x, attached))

    torch.testing.assert_close(output.loss, expected.loss + 0.5 * term)
    torch.testing.assert_close(output.losses["monoloss"], 0.5 * term)
    torch.testing.assert_close(sum(output.losses.values()), output.loss)
    assert output.metrics["monoscore"].item() == pytest.approx(1 - term.item())
    by_host = gradients(expected.loss + 0.5 * term, plain)
    by_adapter = gradients(output.loss, attached)
    torch.testing.assert_close(by_adapter, by_host)
    moved = gradients(
        attached.training_forward_pass(step_input(x, attached)).losses["monoloss"], attached
    )
    assert moved["W_enc"].abs().max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("threshold", "bandwidth"), [(0.05, 0.01), (0.3, 0.02), (0.05, 0.3)])
def test_jumprelu_s_threshold_gets_the_gradient_of_every_entry_that_reaches_it(
    dtype, threshold, bandwidth, images, monkeypatch
):
    monkeypatch.setattr("monoloss_plugin.kernels.support.SPARSE_BELOW", 1.0)
    options = {"jumprelu_bandwidth": bandwidth, "jumprelu_init_threshold": threshold}
    sae = make_sae("jumprelu", dtype=dtype, **options)
    with torch.no_grad():
        sae.threshold *= 1 + 0.05 * torch.randn(len(sae.threshold))
        sae.W_enc *= 30  # so that pre-activations reach the threshold
    x = images[:BATCH].to(sae.dtype)
    found = {}
    for choice in ("by the adapter", "all"):
        if choice == "all":
            monkeypatch.setattr(adapter, "_gradient_at", lambda *_: "all")
        handle = add_loss(sae, MonoLoss(lam=1.0, lam_units="raw"))
        term = sae.training_forward_pass(step_input(x, sae)).losses["monoloss"]
        found[choice] = gradients(term, sae)["threshold"]
        handle.remove()
    scale = found["all"].abs().max()
    assert scale > 0
    # bfloat16 rounds each entry's gradient before the host adds them up.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(
        found["by the adapter"] / scale, found["all"] / scale, atol=tolerance, rtol=0.0
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_zero_is_bit_identical_to_the_host_s_own_training(architecture, images):
    trained = []
    for attach in (False, True):
        sae = make_sae(architecture)
        trainer = make_trainer(sae, stream(images), steps=15)
        if attach:
            trainer.add_loss(MonoLoss(lam=0.0))
        trainer.fit()
        trained.append(weights(sae))
    assert_same(*trained)


def test_after_remove_training_is_bit_identical_and_nothing_is_left(images):
    plain, cleaned = make_sae("batchtopk"), make_sae("batchtopk")
    trainer = make_trainer(cleaned, stream(images), steps=15)
    handle = trainer.add_loss(MonoLoss(lam=1.0), warm_up_steps=3)
    handle.remove()
    handle.remove()
    assert trainer.coefficient_schedulers == {}
    assert set(cleaned.__dict__) == set(plain.__dict__)
    make_trainer(plain, stream(images), steps=15).fit()
    trainer.fit()
    assert_same(weights(plain), weights(cleaned))


def test_remove_during_training_stops_the_term(images):
    sae = make_sae("topk")
    trainer = make_trainer(sae, stream(images), steps=10)
    handle = trainer.add_loss(MonoLoss(lam=0.1))
    assert "monoloss" in trainer.step(images[:BATCH]).losses
    handle.remove()
    assert "monoloss" not in trainer.step(images[:BATCH]).losses
    trainer.add_loss(MonoLoss(lam=0.1))
    assert "monoloss" in trainer.step(images[:BATCH]).losses


# The host's logs, schedules, checkpoints


def test_the_term_is_in_the_host_s_logs_progress_bar_and_schedule(images, capsys):
    sae = make_sae("batchtopk")
    trainer = make_trainer(sae, stream(images), steps=160)  # the host updates its bar every 100
    trainer.add_loss(MonoLoss(lam=3e-4), warm_up_steps=50)
    assert trainer.get_coefficients() == {"monoloss": 0.0}
    seen = []
    for _ in range(60):
        output = trainer.step(images[:BATCH])
        seen.append(output.metrics["monoloss_weight"])
    log = trainer.build_train_step_log_dict(output, n_training_samples=1)
    assert log["details/monoloss_coefficient"] == 3e-4
    assert log["losses/monoloss"] > 0
    assert 0 < log["metrics/monoscore"] < 1
    assert 0 < log["metrics/monoscore_defined"] <= sae.cfg.d_sae
    applied = 3e-4 * 64  # unit inputs, d_in = 64
    assert seen[0] == 0.0
    assert seen[25] == pytest.approx(applied / 2, rel=1e-5)
    assert seen[50] == pytest.approx(applied, rel=1e-5)

    trainer.fit()
    assert "monoloss: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "normalize"),
    [*((name, "none") for name in ARCHITECTURES), ("batchtopk", "expected_average_only_in")],
)
def test_a_resumed_run_takes_the_path_of_an_uninterrupted_one(
    architecture, normalize, images, tmp_path
):
    images = images * 3

    def fresh(batches):
        sae = make_sae(architecture, normalize_activations=normalize)
        trainer = make_trainer(sae, batches, steps=40)
        trainer.add_loss(MonoLoss(lam=0.01), warm_up_steps=30)
        return sae, trainer

    # The first batch of each half has another scale than the set: measured twice, lam would differ.
    parts = list(images.split(BATCH)) * 3
    parts[0], parts[20] = parts[0] * 2, parts[20] * 0.5
    if normalize != "none":  # the scaler's estimate takes batches of its own
        parts = parts[:4] + parts

    sae, trainer = fresh(iter(parts))
    trainer.fit()

    _, first = fresh(iter(parts))
    first.cfg.total_training_samples = 20 * BATCH
    remaining = list(parts)[20 + (4 if normalize != "none" else 0) :]
    if normalize != "none":
        first.activation_scaler.estimate_scaling_factor(64, first.data_provider, 4)
    for _ in range(20):
        first.step(next(first.data_provider))
        first.n_training_steps += 1
    first.save_checkpoint("half", base_path=tmp_path)

    resumed_sae, resumed = fresh(iter(remaining))
    resumed.load_trainer_state(tmp_path / "half")
    resumed_sae.load_weights_from_checkpoint(tmp_path / "half")
    assert resumed.get_coefficients()["monoloss"] == pytest.approx(0.01 * 20 / 30)
    resumed.fit()
    assert_same(weights(sae), weights(resumed_sae))


@pytest.mark.parametrize("start", [8, 0.4])
def test_before_its_start_a_term_costs_nothing_and_changes_nothing(start, images, monkeypatch):
    calls = []
    compute = MonoLoss.compute_loss
    monkeypatch.setattr(MonoLoss, "compute_loss", lambda *a: calls.append(1) or compute(*a))
    runs = []
    for attach in (False, True):
        sae, batches = make_sae("batchtopk"), stream(images)
        trainer = make_trainer(sae, batches, steps=20)
        if attach:
            trainer.add_loss(MonoLoss(lam=0.01), warm_up_steps=4, start=start)
        path, coefficients, logged = [], [], []
        for _ in range(20):
            coefficients.append(trainer.get_coefficients().get("monoloss"))
            output = trainer.step(next(batches))
            logged.append(trainer.build_train_step_log_dict(output, 1))
            trainer.n_training_steps += 1
            path.append(weights(sae))
        runs.append(path)
    expected = [0.0] * 9 + [0.0025, 0.005, 0.0075] + [0.01] * 8
    assert coefficients == pytest.approx(expected)
    # The host logs the schedule after the step, so it shows the next step's.
    shown = [entry["details/monoloss_coefficient"] for entry in logged]
    assert shown == pytest.approx([*expected[1:], 0.01])
    assert [entry["losses/monoloss"] > 0 for entry in logged] == [e > 0 for e in expected]
    assert len(calls) == 11
    for plain, late in zip(*(run[:9] for run in runs), strict=True):
        assert_same(plain, late)
    assert not torch.equal(runs[0][9]["W_enc"], runs[1][9]["W_enc"])
    assert sae.cfg.metadata.monoloss["terms"]["monoloss"]["start"] == start


def test_weights_load_from_a_folder_without_a_config_as_without_a_term(tmp_path):
    saved = make_sae("jumprelu")
    save_file(weights(saved), tmp_path / SAE_WEIGHTS_FILENAME)
    sae = make_sae("jumprelu")
    with torch.no_grad():
        sae.W_enc.zero_()
    add_loss(sae, MonoLoss(lam=0.0))
    sae.load_weights_from_checkpoint(tmp_path)
    assert_same(weights(sae), weights(saved))
    assert sae.cfg.metadata.monoloss is None


def test_the_plugin_for_sae_lens_s_own_tests_attaches_once_to_every_sae_it_can():
    class Inner(TopKTrainingSAE):
        pass

    class Outer(Inner):
        pass

    counts = attach_everywhere.Counter()
    for sae_class in (Inner, Outer):
        attach_everywhere.attach_after_init(sae_class, "MonoLoss", counts)
    sae = Outer(make_sae("topk").cfg)
    assert sae.get_coefficients()["monoloss"].value == 0.0
    assert counts == {"attached to topk": 1}

    class Refused(AbsTopKTrainingSAE):
        pass

    attach_everywhere.attach_after_init(Refused, "MonoLoss", counts)
    Refused(make_sae("abstopk").cfg)
    assert counts == {"attached to topk": 1, "refused by abstopk": 1}


def test_a_late_term_resumes_from_the_host_s_own_checkpoints(images, tmp_path):
    def fresh(batches, **options):
        sae = make_sae("batchtopk")
        trainer = make_trainer(sae, batches, steps=20, **options)
        trainer.add_loss(MonoLoss(lam=0.01), warm_up_steps=5, start=0.4)
        return sae, trainer

    parts = list(images.split(BATCH)[:-1]) * 2
    sae, trainer = fresh(iter(parts), n_checkpoints=3, checkpoint_path=str(tmp_path))
    trainer.fit()
    for done in (6, 11, 16):  # before the start, in the warm-up, after it
        checkpoint = tmp_path / str(done * BATCH)
        resumed_sae, resumed = fresh(iter(parts[done:]))
        resumed.load_trainer_state(checkpoint)
        resumed_sae.load_weights_from_checkpoint(checkpoint)
        assert resumed.get_coefficients()["monoloss"] == 0.01 * max(0, min(1, (done - 8) / 5))
        resumed.fit()
        assert_same(weights(sae), weights(resumed_sae))


def test_a_start_counts_the_run_s_steps_and_a_warm_up_the_term_s(images, tmp_path):
    def next_coefficients(trainer, count):
        seen = []
        for _ in range(count):
            seen.append(trainer.get_coefficients()["monoloss"])
            trainer.step(images[:BATCH])
            trainer.n_training_steps += 1
        return seen

    plain = make_trainer(make_sae("topk"), stream(images), steps=12)
    for _ in range(4):
        plain.step(images[:BATCH])
        plain.n_training_steps += 1
    plain.save_checkpoint("plain", base_path=tmp_path)

    resumed = make_trainer(make_sae("topk"), stream(images), steps=12)
    resumed.add_loss(MonoLoss(lam=1.0), start=0.5)
    resumed.add_loss(MonoLoss(lam=1.0, name="earlier"), start=4)
    resumed.load_trainer_state(tmp_path / "plain")
    assert resumed.get_coefficients()["earlier"] == 1.0
    assert next_coefficients(resumed, 4) == [0.0, 0.0, 1.0, 1.0]

    plain.add_loss(MonoLoss(lam=1.0), start=2, warm_up_steps=4)  # the start is over
    assert next_coefficients(plain, 3) == [0.0, 0.25, 0.5]
    plain.save_checkpoint("late", base_path=tmp_path)
    again = make_trainer(make_sae("topk"), stream(images), steps=12)
    again.add_loss(MonoLoss(lam=1.0), start=2, warm_up_steps=4)
    again.load_trainer_state(tmp_path / "late")
    assert next_coefficients(again, 3) == [0.75, 1.0, 1.0]


def test_a_trainer_that_knows_no_start_is_an_error(images):
    sae = make_sae("topk")
    with pytest.raises(ValueError, match=r"start: .* add the loss to the SAETrainer"):
        add_loss(sae, MonoLoss(lam=0.1), start=5)
    assert sae.get_coefficients() == {}
    make_trainer(sae, stream(images)).add_loss(MonoLoss(lam=0.1), start=5)
    other = make_trainer(sae, stream(images))
    with pytest.raises(ValueError, match="add the loss to the trainer instead"):
        other.step(images[:BATCH])


def test_a_checkpoint_resumed_without_the_term_fails_until_it_is_stripped(images, tmp_path):
    sae = make_sae("topk")
    trainer = make_trainer(sae, stream(images))
    trainer.add_loss(MonoLoss(lam=0.1))
    trainer.step(images[:BATCH])
    trainer.save_checkpoint("one", base_path=tmp_path)

    plain = make_trainer(make_sae("topk"), stream(images))
    with pytest.raises(KeyError, match="monoloss"):
        plain.load_trainer_state(tmp_path / "one")
    assert strip_checkpoint(tmp_path / "one") == ["monoloss"]
    assert strip_checkpoint(tmp_path / "one") == []
    plain.load_trainer_state(tmp_path / "one")
    assert plain.n_training_samples == BATCH


def test_a_plain_checkpoint_resumes_with_the_term(images, tmp_path):
    trainer = make_trainer(make_sae("topk"), stream(images))
    trainer.step(images[:BATCH])
    trainer.save_checkpoint("one", base_path=tmp_path)
    resumed = make_trainer(make_sae("topk"), stream(images))
    resumed.add_loss(MonoLoss(lam=0.1), warm_up_steps=10)
    resumed.load_trainer_state(tmp_path / "one")
    assert resumed.step(images[:BATCH]).metrics["monoloss_weight"] == 0.0


def test_the_saved_sae_loads_without_us_and_says_how_it_was_trained(images, tmp_path):
    sae = make_sae("batchtopk")
    trainer = make_trainer(sae, stream(images), steps=30)
    trainer.add_loss(MonoLoss(lam=3e-4))
    trainer.fit()
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "jumprelu"
    record = loaded.cfg.metadata.monoloss
    assert record["input_mean_square_norm"] == pytest.approx(1.0, rel=1e-5)
    assert record["terms"]["monoloss"]["lam"] == 3e-4
    assert record["terms"]["monoloss"]["factor"] == pytest.approx(64, rel=1e-5)
    assert sorted(sae.state_dict()) == sorted(make_sae("batchtopk").state_dict())


def test_saes_that_share_a_config_do_not_share_the_record(images):
    first = make_sae("topk")
    second = type(first)(first.cfg)
    trainer = make_trainer(first, stream(images))
    trainer.add_loss(MonoLoss(lam=3e-4))
    trainer.step(images[:BATCH])
    assert first.cfg.metadata.monoloss is not None
    assert second.cfg.metadata.monoloss is None


# What lam means here


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize(
    ("lam_units", "per_square_norm"), [("mse", 64.0), ("nmse", 1.0), ("raw", None)]
)
def test_lam_is_converted_by_width_and_measured_input_scale(
    scale, lam_units, per_square_norm, images, caplog
):
    sae = make_sae("batchtopk")
    trainer = make_trainer(sae, stream(images * scale))
    trainer.add_loss(MonoLoss(lam=3e-4, lam_units=lam_units))
    with caplog.at_level(logging.INFO, logger="monoloss_plugin"):
        outputs = [trainer.step(images[:BATCH] * scale) for _ in range(3)]
    factor = 1.0 if per_square_norm is None else per_square_norm * scale**2
    for output in outputs:
        assert output.metrics["monoloss_weight"] == pytest.approx(3e-4 * factor, rel=1e-5)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    # A host shows warnings by default, and a weight that stays as it is needs none.
    assert (caplog.records[0].levelno >= logging.WARNING) == (abs(factor - 1) > 1e-3)
    assert "lam 0.0003" in said[0]
    assert f"{3e-4 * factor:g}" in said[0]


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if "matryoshka" not in a])
def test_lam_is_converted_by_what_the_host_s_own_loss_is_of_the_paper_s(architecture, images):
    x, scale = 7 * images[:BATCH], 7
    output = attached_output(make_sae(architecture), x, MonoLoss(lam=3e-4))
    paper = ((output.sae_out - x) / scale).square().mean()
    factor = output.metrics["monoloss_weight"] / 3e-4
    assert factor == pytest.approx((output.losses["mse_loss"] / paper).item(), rel=1e-4)


def test_lam_follows_the_host_s_own_input_scaling(images):
    sae = make_sae("batchtopk", normalize_activations="expected_average_only_in")
    trainer = make_trainer(sae, stream(images * 7), steps=1)
    trainer.add_loss(MonoLoss(lam=3e-4))
    weights_seen = []
    inner = trainer.step
    trainer.step = lambda batch: weights_seen.append(inner(batch)) or weights_seen[-1]
    trainer.fit()
    # The host scales unit-direction inputs to a mean norm of sqrt(d_in): X = d_in.
    assert weights_seen[0].metrics["monoloss_weight"] == pytest.approx(3e-4 * 64 * 64, rel=1e-4)


def test_a_new_run_of_the_same_sae_measures_its_own_inputs(images):
    sae = make_sae("topk")
    add_loss(sae, MonoLoss(lam=3e-4))
    make_trainer(sae, stream(images), steps=3).fit()
    trainer = make_trainer(sae, stream(images * 10), steps=3)
    output = trainer.step(images[:BATCH] * 10)
    assert output.metrics["monoloss_weight"] == pytest.approx(3e-4 * 64 * 100, rel=1e-5)


def test_proportional_terms_and_nested_widths_have_their_own_factor(images):
    x = images[:BATCH] * 10
    topk, nested = make_sae("topk"), make_sae("matryoshka_batchtopk")
    terms = (OffSupportL1(lam=1.0), L1L2Ratio(lam=1.0))
    metrics = attached_output(topk, x, *terms).metrics
    assert metrics["off_support_l1_weight"] == pytest.approx(10, rel=1e-5)
    assert metrics["l1_l2_ratio_weight"] == pytest.approx(100, rel=1e-5)
    metrics = attached_output(nested, x, *terms).metrics
    assert metrics["l1_l2_ratio_weight"] == pytest.approx(200, rel=1e-5)  # two widths


def test_the_trade_off_does_not_depend_on_the_scale_of_the_inputs(images):
    """Scaled inputs and encoder thresholds give the same ratio of term to reconstruction loss."""
    ratios = []
    for scale in (1.0, 20.0):
        sae = make_sae("topk")  # scale-equivariant: its biases start at zero
        losses = attached_output(sae, images[:BATCH] * scale, MonoLoss(lam=3e-4)).losses
        ratios.append((losses["monoloss"] / losses["mse_loss"]).item())
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-4)


# The Top-k regularizers


def pre_activations(sae: TrainingSAE[Any], x: Tensor) -> Tensor:
    """z by the formula: encoder, then the decoder norms that Top-k SAEs select by."""
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    return z * sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else z


@pytest.mark.parametrize("architecture", TOP_K)
def test_regularizers_see_the_architecture_s_pre_activations_and_selection(architecture, images):
    x = images[:24]
    sae = make_sae(architecture)
    with torch.no_grad():  # biases, so that every part of the formula counts
        sae.b_enc.normal_(std=0.05)
        sae.b_dec.normal_(std=0.05)
    z = pre_activations(sae, x).detach().relu()
    k = 6
    selected = torch.zeros_like(z, dtype=torch.bool)
    if "batchtopk" in architecture:
        selected.view(-1)[z.flatten().topk(k * len(x)).indices] = True
    else:
        selected.scatter_(1, z.topk(k).indices, True)
    selected &= z > 0

    terms = (
        OffSupportL1(lam=1.0, lam_units="raw"),
        L1L2Ratio(lam=1.0, lam_units="raw", units="all"),
    )
    losses = attached_output(sae, x, *terms).losses
    l1 = oracle.off_support_l1_by_loops(z, selected, every_unit=False)
    ratio = oracle.l1_l2_ratio_by_loops(z, selected, every_unit=True)
    assert losses["off_support_l1"].item() == pytest.approx(l1, rel=1e-4)
    assert losses["l1_l2_ratio"].item() == pytest.approx(ratio, rel=1e-4)
    assert gradients(losses["off_support_l1"], sae)["W_enc"].abs().max() > 0


def test_regularizers_do_what_they_are_for(images):
    """Training with each lowers what it penalises."""
    for term, better in ((OffSupportL1(lam=0.3), 0.5), (L1L2Ratio(lam=0.3), 0.8)):
        values = {}
        for lam in (0.0, term.lam):
            sae = make_sae("topk")
            trainer = make_trainer(sae, stream(images), steps=100)
            trainer.add_loss(type(term)(lam=lam))
            trainer.fit()
            z = pre_activations(sae, images).detach()
            values[lam] = type(term)(lam=1.0)(z, sae.encode(images) > 0).item()
        assert values[term.lam] < better * values[0.0]


@pytest.mark.parametrize("architecture", WITHOUT_SELECTION)
def test_regularizers_are_refused_without_a_selection(architecture):
    sae = make_sae(architecture)
    with pytest.raises(ValueError, match=rf"needs a Top-k selection.*'{architecture}' has none"):
        add_loss(sae, OffSupportL1(lam=0.1))
    assert "_monoloss_attachment" not in sae.__dict__


def test_signed_activations_are_refused_where_zero_means_inactive(images):
    sae = make_sae("abstopk", k=6)
    with pytest.raises(ValueError, match="'abstopk' activations are signed"):
        add_loss(sae, MonoLoss(lam=0.1))
    with pytest.raises(ValueError, match="use rectify=False"):
        add_loss(sae, OffSupportL1(lam=0.1))
    signed = OffSupportL1(lam=1.0, rectify=False, lam_units="raw")
    output = attached_output(sae, images[:24], signed)
    expected = oracle.off_support_l1_by_loops(
        output.hidden_pre.detach(), output.feature_acts.detach() != 0, every_unit=False
    )
    assert output.losses["off_support_l1"].item() == pytest.approx(expected, rel=1e-4)


# Similarity spaces


def test_whitened_inputs_are_compared_unwhitened(images):
    sae = make_sae("batchtopk", normalize_activations="covariance_whitening")
    trainer = make_trainer(sae, stream(images + 0.5), steps=2)
    trainer.add_loss(MonoLoss(lam=0.01))
    trainer.activation_scaler.estimate_whitening(64, stream(images + 0.5), 20)
    raw = images[:BATCH] + 0.5
    output = trainer.step(raw)
    acts = output.feature_acts.detach()
    mean_raw = 1 - functional.monoloss(acts, raw).item()
    mean_whitened = 1 - functional.monoloss(acts, output.sae_in).item()
    assert output.metrics["monoscore"].item() == pytest.approx(mean_raw, abs=1e-3)
    assert abs(mean_raw - mean_whitened) > 0.3  # the trap: this is what it must not be


def test_whitening_is_refused_where_nothing_can_undo_it(images):
    sae = make_sae("batchtopk", normalize_activations="covariance_whitening")
    with pytest.raises(ValueError, match="whitened inputs, whose similarities mean nothing"):
        add_loss(sae, MonoLoss(lam=0.01))
    add_loss(sae, MonoLoss(lam=0.01), embeddings=lambda x: x[:, :3])
    assert "monoloss" in sae.training_forward_pass(step_input(images[:8], sae)).losses


def test_another_similarity_space_can_be_given(images, digit_labels):
    labels = digit_labels[:BATCH]
    sae = make_sae("topk")
    add_loss(sae, MonoLoss(lam=1.0, lam_units="raw"))
    add_loss(
        sae,
        MonoLoss(lam=1.0, lam_units="raw", name="by_label"),
        embeddings=lambda x: torch.nn.functional.one_hot(labels).float(),
    )
    output = sae.training_forward_pass(step_input(images[:BATCH], sae))
    one_hot = torch.nn.functional.one_hot(labels).float()
    expected = functional.monoloss(output.feature_acts, one_hot)
    torch.testing.assert_close(output.losses["by_label"], expected)
    assert output.metrics["by_label_monoscore"].item() == pytest.approx(1 - expected.item())


@pytest.mark.parametrize("patches", ["image", "own", "active"])
@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "standard"])
def test_patches_of_one_image_are_not_compared(images, patches, architecture):
    sae, of = make_sae(architecture), torch.arange(BATCH) // 3
    pooled = images[of]

    def samples_of(features):
        torch.testing.assert_close(features, images[:BATCH])
        return Batch(features, embeddings=pooled, images=of)

    term = MonoLoss(lam=0.5, lam_units="raw", patches=patches)
    add_loss(sae, term, embeddings=samples_of)
    output = sae.training_forward_pass(step_input(images[:BATCH], sae))
    compared = pooled if patches == "image" else images[:BATCH]
    latents = output.feature_acts
    latents = latents.to_dense() if latents.is_sparse else latents
    torch.testing.assert_close(output.losses["monoloss"], term(latents, compared, images=of))
    if patches != "active":
        expected = functional.monoscore_pairwise(latents.detach(), compared, groups=of)
        mean = expected.sum() / output.metrics["monoscore_defined"]
        assert output.metrics["monoscore"].item() == pytest.approx(mean.item(), abs=1e-5)
    (gradient,) = torch.autograd.grad(output.losses["monoloss"], sae.W_enc)
    assert gradient.isfinite().all()
    assert gradient.any()
    said = {
        "image": "other embeddings",
        "own": "each patch's own features",
        "active": "the mean features of an image's active patches",
    }[patches]
    recorded = sae.cfg.metadata.monoloss["terms"]["monoloss"]
    assert (recorded["compared_by"], recorded["patches"]) == (said, patches)


# Shapes, precision, compilation, copies


def test_three_dimensional_activations_count_every_position(images):
    sae = make_sae("topk")
    add_loss(sae, MonoLoss(lam=0.1))
    add_loss(sae, OffSupportL1(lam=0.1))
    flat = sae.training_forward_pass(step_input(images[:120], sae))
    folded = sae.training_forward_pass(step_input(images[:120].reshape(12, 10, 64), sae))
    for name in ("monoloss", "off_support_l1"):
        torch.testing.assert_close(folded.losses[name], flat.losses[name])


def test_autocast_training_keeps_the_term_in_float32(images):
    sae = make_sae("batchtopk")
    trainer = make_trainer(sae, stream(images), autocast=True)
    trainer.add_loss(MonoLoss(lam=0.01))
    output = trainer.step(images[:BATCH])
    assert output.losses["monoloss"].dtype == torch.float32
    exact = functional.monoloss(output.feature_acts.detach().float(), images[:BATCH])
    applied = output.metrics["monoloss_weight"]
    assert output.losses["monoloss"].item() == pytest.approx(applied * exact.item(), rel=1e-5)


@pytest.mark.parametrize("order", ["attach first", "compile first"])
def test_a_compiled_sae_trains_as_an_eager_one(order, images):
    def compile_as_the_runner_does(sae):
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)

    trained = []
    for compiled in (False, True):
        sae = make_sae("topk")
        if compiled and order == "compile first":
            compile_as_the_runner_does(sae)
        trainer = make_trainer(sae, stream(images), steps=5)
        handle = trainer.add_loss(MonoLoss(lam=0.01), warm_up_steps=3)
        if compiled and order == "attach first":
            compile_as_the_runner_does(sae)
        trainer.fit()
        trained.append(weights(sae))
        handle.remove()
        output = sae.training_forward_pass(step_input(images[:BATCH], sae))
        assert "monoloss" not in output.losses
    for name in trained[0]:
        torch.testing.assert_close(trained[1][name], trained[0][name], atol=1e-5, rtol=1e-4)


def test_a_copy_of_the_sae_is_independent(images):
    sae = make_sae("topk")
    handle = add_loss(sae, MonoLoss(lam=0.1))
    duplicate = copy.deepcopy(sae)
    handle.remove()
    with torch.no_grad():
        duplicate.W_enc.mul_(2.0)
    x = images[:BATCH]
    assert "monoloss" not in sae.training_forward_pass(step_input(x, sae)).losses
    output = duplicate.training_forward_pass(step_input(x, duplicate))
    expected = functional.monoloss(duplicate.encode(x), x)
    assert output.losses["monoloss"].item() == pytest.approx(0.1 * 64 * expected.item(), rel=1e-5)


def test_several_terms_stack(images):
    sae = make_sae("batchtopk")
    trainer = make_trainer(sae, stream(images))
    for term in (MonoLoss(lam=3e-4), OffSupportL1(lam=0.01), L1L2Ratio(lam=0.02)):
        trainer.add_loss(term)
    output = trainer.step(images[:BATCH])
    assert {"monoloss", "off_support_l1", "l1_l2_ratio"} <= set(output.losses)
    assert output.loss.item() == pytest.approx(sum(v.item() for v in output.losses.values()))
    assert trainer.get_coefficients() == {
        "monoloss": 3e-4,
        "off_support_l1": 0.01,
        "l1_l2_ratio": 0.02,
    }


# Mistakes


def test_names_of_the_host_are_refused(images):
    with pytest.raises(ValueError, match="l1: SAELens has a coefficient of this name"):
        add_loss(make_sae("standard"), MonoLoss(lam=0.1, name="l1"))
    sae = make_sae("topk")
    add_loss(sae, MonoLoss(lam=0.1, name="mse_loss"))
    with pytest.raises(ValueError, match="mse_loss: SAELens has a loss of this name"):
        sae.training_forward_pass(step_input(images[:8], sae))


def test_wrong_targets_losses_and_options_are_named(images):
    trainer = make_trainer(make_sae("topk"), stream(images))
    with pytest.raises(TypeError, match=r"target: expected a SAELens SAETrainer.*got Linear"):
        add_loss(torch.nn.Linear(2, 2), MonoLoss(lam=0.1))
    with pytest.raises(ValueError, match="saes: only for a target with several SAEs"):
        trainer.add_loss(MonoLoss(lam=0.1), saes=["a"])
    with pytest.raises(TypeError, match="saes: expected a list of names, got 'a'"):
        trainer.add_loss(MonoLoss(lam=0.1), saes="a")


def test_a_term_that_can_do_nothing_is_warned_of(images):
    trainer = make_trainer(make_sae("topk"), stream(images), steps=3)
    with pytest.warns(UserWarning, match="a: warm_up_steps=4 is longer than the 3 steps"):
        trainer.add_loss(MonoLoss(lam=0.1, name="a"), warm_up_steps=4)
    trainer.add_loss(MonoLoss(lam=0.1, name="b"), warm_up_steps=3)
    with pytest.warns(UserWarning, match="d: start=3 is not before the end of the 3 steps"):
        trainer.add_loss(MonoLoss(lam=0.1, name="d"), start=3)
    trainer.fit()
    with pytest.warns(UserWarning, match="c: training has ended .384 of 384 samples"):
        trainer.add_loss(MonoLoss(lam=0.1, name="c"))


def test_at_weight_zero_the_term_is_computed_only_where_the_host_logs(images, monkeypatch):
    calls = []
    compute = MonoLoss.compute_loss
    monkeypatch.setattr(MonoLoss, "compute_loss", lambda *a: calls.append(1) or compute(*a))
    sae = make_sae("topk")
    add_loss(sae, MonoLoss(lam=0.0))
    quiet = step_input(images[:BATCH], sae)
    output = sae.training_forward_pass(quiet)
    assert not calls
    assert output.losses["monoloss"].item() == 0
    assert output.metrics == {"monoloss_weight": 0.0}
    logging_step = replace(quiet, is_logging_step=True)
    assert 0 < sae.training_forward_pass(logging_step).metrics["monoscore"] < 1
    of_older_hosts = copy.copy(quiet)
    del of_older_hosts.is_logging_step
    assert "monoscore" in sae.training_forward_pass(of_older_hosts).metrics
    assert len(calls) == 2


def test_a_warm_up_without_a_schedule_is_an_error(images):
    sae = make_sae("topk")
    trainer = make_trainer(sae, stream(images))
    add_loss(sae, MonoLoss(lam=0.1), warm_up_steps=10)
    with pytest.raises(ValueError, match="add the loss to the trainer instead"):
        trainer.step(images[:BATCH])


# Trainers of several SAEs, and runners


@pytest.mark.parametrize("chosen", [None, ["b"]])
def test_multi_sae_trainer_takes_all_or_some(chosen, images, tmp_path: Path, caplog):
    def fresh():
        saes = {"a": make_sae("topk"), "b": make_sae("jumprelu")}
        batches = ({"hook": x} for x in stream(images))
        hooks = {"a": "hook", "b": "hook"}
        return MultiSAETrainer(trainer_config(20), saes, hooks, batches)

    trainer = fresh()
    handle = trainer.add_loss(MonoLoss(lam=0.01), warm_up_steps=5, start=0.5, saes=chosen)
    coefficient = {}
    step = trainer.trainers["b"].step

    def watched(batch):
        steps = trainer.n_training_steps
        coefficient[steps] = trainer.trainers["b"].get_coefficients()["monoloss"]
        return step(batch)

    trainer.trainers["b"].step = watched
    saes = trainer.fit()
    assert coefficient == {n: 0.01 * max(0, min(1, (n - 10) / 5)) for n in range(20)}
    assert [record.getMessage()[:20] for record in caplog.records] == ["monoloss: lam 0.01 i"]
    with pytest.warns(UserWarning, match="late: training has ended"):
        trainer.add_loss(MonoLoss(lam=0.1, name="late")).remove()
    on = chosen or ["a", "b"]
    for name in saes:
        output = trainer.trainers[name].step(images[:BATCH])
        assert ("monoloss" in output.losses) == (name in on)
        assert ("monoloss" in trainer.trainers[name].coefficient_schedulers) == (name in on)
    trainer.cfg.checkpoint_path = str(tmp_path)
    trainer.save_checkpoint("end")
    again = fresh()
    again.add_loss(MonoLoss(lam=0.01), warm_up_steps=5, start=0.5, saes=chosen)
    again.load_checkpoint(tmp_path / "end")
    assert again.trainers["b"].get_coefficients()["monoloss"] == 0.01
    handle.remove()
    assert not any("_monoloss_attachment" in sae.__dict__ for sae in saes.values())
    with pytest.raises(ValueError, match=r"saes: expected some of \['a', 'b'\]"):
        trainer.add_loss(MonoLoss(lam=0.01), saes=["c"])


def test_synthetic_runner_trains_with_the_term(tmp_path):
    from sae_lens import BatchTopKTrainingSAEConfig
    from sae_lens.synthetic import (
        SyntheticModelConfig,
        SyntheticSAERunner,
        SyntheticSAERunnerConfig,
    )

    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=32, hidden_dim=16),
            sae=BatchTopKTrainingSAEConfig(d_in=16, d_sae=32, k=2),
            training_samples=20 * 64,
            batch_size=64,
            eval_samples=64,
            checkpoint_path=None,
            output_path=str(tmp_path),
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    with pytest.raises(ValueError, match=r"start: .* add the loss to the SAETrainer"):
        add_loss(runner, MonoLoss(lam=0.01), start=0.5)
    runner.add_loss(MonoLoss(lam=0.01), warm_up_steps=5)
    runner.run()
    record = SAE.load_from_disk(tmp_path).cfg.metadata.monoloss
    assert record["terms"]["monoloss"]["lam"] == 0.01


RUNNER: dict[str, Any] = {
    "context_size": 16,
    "train_batch_size_tokens": 64,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 4,
    "logger": LoggingConfig(log_to_wandb=False),
}


@pytest.fixture
def language_model():
    """A tiny transformer and a tokenized dataset for it."""
    from datasets import Dataset
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=16, n_ctx=16, d_head=8, d_vocab=40, act_fn="relu", device="cpu"
        )
    )
    tokens = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(1))
    return model, Dataset.from_dict({"tokens": tokens.tolist()})


def test_multi_sae_runner_trains_the_chosen_saes(language_model, tmp_path):
    from sae_lens import JumpReLUTrainingSAEConfig, TopKTrainingSAEConfig
    from sae_lens.multi_sae_training_runner import (
        MultiSAETrainingRunner,
        MultiSAETrainingRunnerConfig,
    )

    model, dataset = language_model
    runner = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={
                "a": TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4),
                "b": JumpReLUTrainingSAEConfig(d_in=16, d_sae=32),
            },
            hook_names="blocks.0.hook_resid_post",
            training_tokens=6 * 64,
            checkpoint_path=None,
            output_path=str(tmp_path),
            **RUNNER,
        ),
        override_model=model,
        override_dataset=dataset,
    )
    with pytest.raises(ValueError, match=r"start: .* add the loss to the .*MultiSAETrainer"):
        add_loss(runner, MonoLoss(lam=0.01), start=2)
    runner.add_loss(MonoLoss(lam=0.01), warm_up_steps=3, saes=["b"])
    runner.run()
    assert SAE.load_from_disk(tmp_path / "a").cfg.metadata.monoloss is None
    record = SAE.load_from_disk(tmp_path / "b").cfg.metadata.monoloss
    assert record["terms"]["monoloss"]["warm_up_steps"] == 3


@pytest.mark.parametrize("normalize", ["none", "covariance_whitening"])
def test_language_model_runner_trains_resumes_and_whitens(
    normalize, language_model, tmp_path, monkeypatch
):
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        TopKTrainingSAEConfig,
    )

    model, dataset = language_model

    def runner(**options):
        return LanguageModelSAETrainingRunner(
            LanguageModelSAERunnerConfig(
                sae=TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, normalize_activations=normalize),
                hook_name="blocks.0.hook_resid_post",
                dataset_path="unused",
                is_dataset_tokenized=True,
                training_tokens=12 * 64,
                n_batches_for_norm_estimate=8,
                device="cpu",
                checkpoint_path=str(tmp_path / "checkpoints"),
                output_path=str(tmp_path / "out"),
                **RUNNER,
                **options,
            ),
            override_model=model,
            override_dataset=dataset,
        )

    first = runner(save_final_checkpoint=True)
    with pytest.warns(UserWarning, match="longer than the 12 steps"):
        add_loss(first, MonoLoss(lam=0.01), warm_up_steps=20)
    seen = []
    monkeypatch.setattr(
        SAETrainer,
        "_update_pbar",
        lambda self, output, pbar, update_interval=100: seen.append((self, output)),
    )
    first.run()
    assert len(seen) == 12
    trainer, output = seen[-1]
    assert trainer.coefficient_schedulers["monoloss"].current_step == 12
    assert output.metrics["monoscore_defined"] > 0
    saved = SAE.load_from_disk(tmp_path / "out").cfg.metadata.monoloss
    assert saved["terms"]["monoloss"]["warm_up_steps"] == 20

    (checkpoint,) = Path(first.cfg.checkpoint_path).glob("final_*")
    second = runner(resume_from_checkpoint=str(checkpoint))
    second.cfg.training_tokens = 20 * 64
    add_loss(second, MonoLoss(lam=0.01), warm_up_steps=20)
    seen.clear()
    second.run()
    trainer, output = seen[-1]
    assert trainer.coefficient_schedulers["monoloss"].current_step == 20
    again = second.sae.cfg.metadata.monoloss
    assert again["input_mean_square_norm"] == saved["input_mean_square_norm"]


def test_language_model_runner_starts_a_term_late(language_model, tmp_path, monkeypatch):
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        TopKTrainingSAEConfig,
    )

    model, dataset = language_model
    seen = []
    monkeypatch.setattr(
        SAETrainer,
        "_update_pbar",
        lambda self, output, pbar, update_interval=100: seen.append(
            (output.metrics["monoloss_weight"], self.coefficient_schedulers["monoloss"].value)
        ),
    )

    def run(**options):
        runner = LanguageModelSAETrainingRunner(
            LanguageModelSAERunnerConfig(
                sae=TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4),
                hook_name="blocks.0.hook_resid_post",
                dataset_path="unused",
                is_dataset_tokenized=True,
                training_tokens=12 * 64,
                device="cpu",
                checkpoint_path=str(tmp_path),
                output_path=None,
                **RUNNER,
                **options,
            ),
            override_model=model,
            override_dataset=dataset,
        )
        add_loss(runner, MonoLoss(lam=1.0, lam_units="raw"), warm_up_steps=4, start=0.5)
        seen.clear()
        runner.run()
        return runner, list(seen)

    first, whole = run(n_checkpoints=2)
    expected = [0.0] * 7 + [0.25, 0.5, 0.75, 1.0, 1.0]
    assert whole == list(zip(expected, [*expected[1:], 1.0], strict=True))
    for done in (5, 9):  # before the start and in the warm-up
        checkpoint = Path(first.cfg.checkpoint_path) / str(done * 64)
        assert run(resume_from_checkpoint=str(checkpoint))[1] == whole[done:]

"""SAELens's runner on a small transformer that has read a text, trained to the end and scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETrainer,
    SAETrainingRunner,
    TrainingSAE,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import SyntheticSAERunner
from torch import Tensor

from benchmarks.language_models import (
    BEGIN,
    HOOK,
    MEASURES,
    HeldOut,
    make_model,
    measure,
    measure_model,
    next_tokens,
    read_rows,
)
from monoloss_plugin import MonoLoss, MonoScore, functional
from monoloss_plugin.adapters.sae_lens import add_loss
from monoloss_plugin.evaluation import evaluate
from tests.adapters.conftest import ARCHITECTURES

CONTEXT, PROMPTS, WIDTH, D_SAE = 16, 16, 32, 96
TOKENS = CONTEXT * PROMPTS
"""Tokens of a step: those of the prompts of one forward pass of the model."""
ON_TOKENS: dict[str, dict[str, Any]] = {
    **{name: options for name, options in ARCHITECTURES.items() if name != "topk sparse"},
    # The inputs' norm is that of scaled activations, about 6 here; that of the digits is 1.
    "jumprelu": {"l0_coefficient": 0.3, "jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.3},
    "standard": {"l1_coefficient": 0.5},
    "gated": {"l1_coefficient": 0.5},
}


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return read_rows(vocabulary=200, context=CONTEXT)[:2000]


@pytest.fixture(scope="module")
def train(rows) -> Tensor:
    return rows[:1800]


@pytest.fixture(scope="module")
def model(train) -> HookedSAETransformer:
    return make_model(train, vocabulary=200, width=WIDTH, steps=60)


@pytest.fixture(scope="module")
def held_out(model, rows) -> HeldOut:
    return HeldOut.of(model, rows[1800:])


@pytest.fixture
def make_runner(model, train, tmp_path) -> Callable[..., LanguageModelSAETrainingRunner]:
    """Make a runner that writes its SAE to ``tmp_path / "sae"``."""

    def make(architecture: str = "topk", steps: int = 12, **options: Any) -> Any:
        torch.manual_seed(0)
        _, config_class = get_sae_training_class(architecture)
        sae_options = {**ON_TOKENS[architecture], **options.pop("sae", {})}
        config = LanguageModelSAERunnerConfig(
            sae=config_class(d_in=WIDTH, d_sae=D_SAE, **sae_options),
            hook_name=HOOK,
            context_size=CONTEXT,
            training_tokens=steps * TOKENS,
            train_batch_size_tokens=TOKENS,
            store_batch_size_prompts=PROMPTS,
            n_batches_in_buffer=PROMPTS,
            n_batches_for_norm_estimate=4,
            lr=3e-3,
            lr_end=3e-3,
            output_path=str(tmp_path / "sae"),
            logger=LoggingConfig(log_to_wandb=False),
            **{"checkpoint_path": None, **options},
        )
        dataset = Dataset.from_dict({"tokens": train.tolist()})
        return LanguageModelSAETrainingRunner(config, dataset, model)

    return make


@pytest.fixture
def outputs(monkeypatch) -> list[Any]:
    """What each step of any trainer gives, in order."""
    found: list[Any] = []
    step = SAETrainer.step
    monkeypatch.setattr(
        SAETrainer, "step", lambda self, x: found.append(step(self, x)) or found[-1]
    )
    return found


def weights(sae: TrainingSAE[Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def score(sae: SAE[Any], held_out: HeldOut) -> float:
    metric = MonoScore()
    with torch.no_grad():
        metric.update(sae.encode(held_out.x), held_out.x)
    return metric.compute().mean_adjusted


@pytest.mark.parametrize("architecture", ON_TOKENS)
def test_monoloss_raises_the_score_of_held_out_tokens(
    architecture, make_runner, held_out, tmp_path
) -> None:
    scores = {}
    for lam in (0.0, 1.0):
        runner = make_runner(
            architecture,
            steps=40,
            exclude_special_tokens=[BEGIN],
            sae={"normalize_activations": "expected_average_only_in"},
        )
        runner.add_loss(MonoLoss(lam, lam_units="nmse"))
        runner.run()
        scores[lam] = score(SAE.load_from_disk(tmp_path / "sae"), held_out)
    assert scores[1.0] > scores[0.0] + 0.04


def test_every_runner_has_the_method() -> None:
    runners = (
        LanguageModelSAETrainingRunner,
        SAETrainingRunner,
        MultiSAETrainingRunner,
        SyntheticSAERunner,
    )
    assert {runner.add_loss for runner in runners} == {add_loss}


def test_weight_zero_and_a_removed_term_leave_the_run_bit_identical(make_runner) -> None:
    trained = []
    for attach in ("nothing", "weight zero", "removed"):
        runner = make_runner("batchtopk")
        if attach != "nothing":
            handle = runner.add_loss(MonoLoss(lam=0.0 if attach == "weight zero" else 1.0))
        if attach == "removed":
            handle.remove()
        trained.append(weights(runner.run()))
    assert_same(trained[0], trained[1])
    assert_same(trained[0], trained[2])


@pytest.mark.parametrize(("units", "per_norm"), [("mse", WIDTH), ("nmse", 1)])
def test_lam_is_converted_with_the_norm_after_the_host_s_scaler(
    units, per_norm, make_runner, held_out, outputs
) -> None:
    runner = make_runner(steps=2, sae={"normalize_activations": "expected_average_only_in"})
    runner.add_loss(MonoLoss(0.1, lam_units=units))
    runner.run()
    scaled = outputs[0].sae_in.square().sum(1).mean().item()
    assert scaled == pytest.approx(WIDTH, rel=0.2)  # what the scaler is for
    assert abs(held_out.x.square().sum(1).mean().item() / scaled - 1) > 0.5  # the trap
    for output in outputs:
        assert output.metrics["monoloss_weight"] == pytest.approx(0.1 * scaled * per_norm)
    record = runner.sae.cfg.metadata.monoloss
    assert record["input_mean_square_norm"] == pytest.approx(scaled)


@pytest.mark.parametrize("attach", [False, True])
def test_a_resumed_run_is_equal_where_the_host_s_own_is(attach, make_runner, tmp_path) -> None:
    """Without mixing, the host trains the rows in their order; with it, it shuffles anew."""

    def run(**options: Any) -> Any:
        runner = make_runner(
            steps=16,
            checkpoint_path=str(tmp_path / "checkpoints"),
            activations_mixing_fraction=0.0,
            **options,
        )
        if attach:
            runner.add_loss(MonoLoss(1.0), warm_up_steps=8, start=0.25)
        return runner, weights(runner.run())

    first, uninterrupted = run(n_checkpoints=3)
    for done in (5, 9):  # in the warm-up, and after it
        checkpoint = Path(first.cfg.checkpoint_path) / str(done * TOKENS)
        assert_same(uninterrupted, run(resume_from_checkpoint=str(checkpoint))[1])


def test_a_run_from_a_pretrained_sae_measures_and_records_anew(
    make_runner, outputs, tmp_path
) -> None:
    options = {"checkpoint_path": str(tmp_path / "runs"), "save_final_checkpoint": True}
    first = make_runner(steps=4, **options)
    first.add_loss(MonoLoss(1.0, lam_units="nmse"))
    first.run()
    (trained,) = Path(first.cfg.checkpoint_path).glob("final_*")
    outputs.clear()

    second = make_runner(steps=4, from_pretrained_path=str(trained), exclude_special_tokens=[BEGIN])
    second.add_loss(MonoLoss(0.5, lam_units="nmse"), start=2)
    assert second.sae.cfg.metadata.monoloss["terms"]["monoloss"]["lam"] == 1.0
    second.run()
    norm = outputs[0].sae_in.square().sum(1).mean().item()
    assert norm != pytest.approx(
        first.sae.cfg.metadata.monoloss["input_mean_square_norm"], rel=1e-3
    )
    seen = [output.metrics["monoloss_weight"] for output in outputs]
    assert seen == pytest.approx([0.0, 0.0, 0.5 * norm, 0.5 * norm])
    assert second.sae.cfg.metadata.monoloss["terms"]["monoloss"]["lam"] == 0.5


def test_excluded_special_tokens_are_in_no_comparison(model, make_runner, outputs) -> None:
    _, cache = model.run_with_cache(torch.tensor([[BEGIN]]), names_filter=HOOK)
    (of_begin,) = cache[HOOK][0]
    found = {}
    for exclude in (False, [BEGIN]):
        outputs.clear()
        runner = make_runner(steps=3, exclude_special_tokens=exclude)
        runner.add_loss(MonoLoss(1.0))
        runner.run()
        rows = torch.cat([output.sae_in for output in outputs])
        is_begin = (rows - of_begin).abs().amax(1) < 1e-4
        found[bool(exclude)] = int(is_begin.sum())
    assert found[False] > len(rows) / CONTEXT / 2
    assert found[True] == 0


def test_tokens_compared_by_their_next_token(model, make_runner, outputs) -> None:
    runner = make_runner(steps=3, sae={"normalize_activations": "expected_average_only_in"})
    runner.add_loss(MonoLoss(1.0, lam_units="raw"), embeddings=next_tokens(model))
    runner.run()
    output = outputs[-1]
    logits = model.unembed(model.ln_final(output.sae_in.unsqueeze(0)))[0]
    p = logits.softmax(-1)
    root = p.sqrt()
    # The final layer norm undoes the host's scaling, and the cosine of roots is the coefficient.
    torch.testing.assert_close(root @ root.T, (p[:, None] * p[None]).sqrt().sum(-1))
    expected = functional.monoloss(output.feature_acts, root)
    torch.testing.assert_close(output.losses["monoloss"], expected)
    assert runner.sae.cfg.metadata.monoloss["terms"]["monoloss"]["compared_by"] == (
        "other embeddings"
    )


def stream_scores(model: Any, sae: SAE[Any], rows: Tensor, acts: str, inputs: str) -> MonoScore:
    """What the guide does: batch by batch, through the model with the SAE in place."""
    metric = MonoScore()
    for batch in rows.split(30):
        _, cache = model.run_with_cache_with_saes(batch, saes=[sae])
        kept = batch != BEGIN
        metric.update(cache[acts][kept], cache[inputs][kept])
    return metric


@pytest.fixture
def trained(make_runner, tmp_path) -> SAE[Any]:
    runner = make_runner("batchtopk", steps=20, exclude_special_tokens=[BEGIN])
    runner.run()
    return SAE.load_from_disk(tmp_path / "sae")


def assert_scores_are(metric: MonoScore, sae: SAE[Any], x: Tensor) -> None:
    found, expected = metric.compute(), evaluate(sae, x).monoscore
    assert found.num_samples == expected.num_samples == len(x)
    assert 0 < found.num_defined == expected.num_defined
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(found.adjusted, expected.adjusted, atol=1e-5, rtol=0.0)
    assert torch.equal(found.support, expected.support)


def test_scores_through_hooked_sae_transformer_are_evaluate_s(model, trained, held_out) -> None:
    acts, inputs = f"{HOOK}.hook_sae_acts_post", f"{HOOK}.hook_sae_input"
    with torch.no_grad():
        metric = stream_scores(model, trained, held_out.rows, acts, inputs)
    assert_scores_are(metric, trained, held_out.x)
    assert not model.acts_to_saes


def test_scores_through_sae_transformer_bridge_are_evaluate_s(trained, held_out) -> None:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(WordLevel({"<begin>": BEGIN, "<rare>": 1}, unk_token="<rare>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<begin>")
    config = GPT2Config(
        vocab_size=200,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        architectures=["GPT2LMHeadModel"],
    )
    bridge = SAETransformerBridge.boot_transformers(
        "gpt2", hf_model=GPT2LMHeadModel(config).eval(), tokenizer=tokenizer, device="cpu"
    )
    trained.threshold.data.zero_()  # the activations of random weights are small
    trained.cfg.metadata.hook_name = "blocks.0.hook_out"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(held_out.rows)
        x = cache["blocks.0.hook_out"][held_out.rows != BEGIN]
        acts = bridge.get_sae_hook_name(trained)
        inputs = bridge.get_sae_hook_name(trained, "hook_sae_input")
        metric = stream_scores(bridge, trained, held_out.rows, acts, inputs)
    assert_scores_are(metric, trained, x)


def test_pairs_of_one_token_can_be_left_out(model, held_out) -> None:
    """A latent of one token scores 1 on embeddings, and has no pair if these are left out."""
    embedded = HeldOut.of(model, held_out.rows, "hook_embed")
    frequent = int(embedded.tokens.bincount().argmax())
    latents = torch.rand(len(embedded.x), 2)
    latents[:, 0] *= embedded.tokens == frequent
    every = functional.monoscore(latents, embedded.x)
    assert every[0].item() == pytest.approx(1.0)
    different = functional.monoscore(latents, embedded.x, groups=embedded.tokens, undefined=-9)
    assert different[0] == -9
    assert different[1] < every[1]
    expected = functional.monoscore_pairwise(
        latents[:400], embedded.x[:400], groups=embedded.tokens[:400]
    )
    found = functional.monoscore(latents[:400], embedded.x[:400], groups=embedded.tokens[:400])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0.0)


def test_what_the_guide_measures(model, trained, held_out) -> None:
    found = measure(model, trained, held_out)
    assert found.keys() == MEASURES.keys()
    assert torch.tensor(list(found.values())).isfinite().all()
    assert 0 < found["one_token"] < 1
    found = measure_model(model, held_out.rows)
    embedded = found["hooks"]["hook_embed"]
    for measured in ("same_token", "tokens_as_latents", "special_cosine"):
        assert embedded[measured] == pytest.approx(1.0)
    unit = torch.nn.functional.normalize(held_out.x, dim=1)
    cosines, same = unit @ unit.T, held_out.tokens[:, None] == held_out.tokens
    after = found["hooks"][HOOK]
    assert after["different_tokens"] == pytest.approx(cosines[~same].mean().item(), abs=1e-5)
    pairs = same.fill_diagonal_(False)
    assert after["same_token"] == pytest.approx(cosines[pairs].mean().item(), abs=1e-5)

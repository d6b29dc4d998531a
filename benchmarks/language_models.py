"""SAEs on tokens of a small language model: with MonoLoss, without it, and with its control.

python -m benchmarks.language_models --results benchmarks/results/language-models.json

The text is Python's own language reference (``pydoc_data.topics``), which comes with Python. Words
and signs are tokens. A transformer of two layers learns it, and SAELens's runner trains BatchTopK
SAEs on its activations. All is measured on the last sixth of the text, which neither has seen.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from torch import Tensor
from transformer_lens import HookedTransformerConfig

from benchmarks.over_seeds import spread
from monoloss_plugin import MonoLoss, MonoScore
from monoloss_plugin.adapters.sae_lens import add_loss
from monoloss_plugin.batch import Batch
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.reproduce.machine import machine
from monoloss_plugin.reproduce.saes import ShuffledMonoLoss

BEGIN, UNKNOWN = 0, 1
"""The special tokens: what begins every row, and what stands for a rare word."""
HOOK = "blocks.0.hook_resid_post"
MEASURES = {
    "r2": "R²",
    "loss": "loss with the SAE in place",
    "all": "score, all pairs",
    "different": "score, different tokens",
    "next": "by next token, all pairs",
    "next_different": "by next token, different tokens",
    "one_token": "activation on one token",
    "latents": "latents with a score",
}
_DIGITS = {"latents": 0}


def read_rows(vocabulary: int = 2000, context: int = 64) -> Tensor:
    """Return rows of tokens (N, context); each starts with :data:`BEGIN`."""
    from pydoc_data.topics import topics

    words = re.findall(r"\w+|\S", " ".join(topics.values()).lower())
    frequent = Counter(words).most_common(vocabulary - 2)
    number = {word: n for n, (word, _) in enumerate(frequent, 2)}
    tokens = torch.tensor([number.get(word, UNKNOWN) for word in words])
    length = context - 1
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return F.pad(rows, (1, 0), value=BEGIN)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows to train on, and the last sixth of the text."""
    cut = len(rows) * 5 // 6
    return rows[:cut], rows[cut:]


def make_model(
    rows: Tensor, *, vocabulary: int = 2000, width: int = 64, steps: int = 400
) -> HookedSAETransformer:
    """Return a transformer of two layers that has learnt to predict the next token of rows."""
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=width,
        n_ctx=rows.shape[1],
        d_head=16,
        d_vocab=vocabulary,
        act_fn="gelu",
        normalization_type="LN",
        device="cpu",
        seed=0,
    )
    model = HookedSAETransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (32,), generator=generator)]
        optimizer.zero_grad()
        model(batch, return_type="loss").backward()
        optimizer.step()
    return model.requires_grad_(False)


def next_tokens(model: HookedSAETransformer) -> Callable[[Tensor], Tensor]:
    """Return the logit lens: a function from activations to the root of each next token's share.

    The cosine of two roots is the Bhattacharyya coefficient of the two distributions.
    """
    return lambda x: (model.ln_final(x) @ model.W_U + model.b_U).softmax(-1).sqrt()


def train_sae(
    model: HookedSAETransformer,
    rows: Tensor,
    folder: Path,
    *,
    loss: MonoLoss | None,
    embeddings: Callable[[Tensor], Tensor] | None,
    steps: int,
    seed: int,
) -> SAE[Any]:
    """Train a BatchTopK SAE with SAELens's runner, and return it as everybody loads it."""
    torch.manual_seed(seed)
    config = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=model.cfg.d_model,
            d_sae=512,
            k=8,
            normalize_activations="expected_average_only_in",
        ),
        hook_name=HOOK,
        context_size=rows.shape[1],
        training_tokens=1024 * steps,
        train_batch_size_tokens=1024,
        n_batches_in_buffer=256,  # contexts, so that rows are well shuffled
        exclude_special_tokens=[BEGIN],
        lr=3e-3,
        n_batches_for_norm_estimate=10,
        dead_feature_window=200,  # in so short a run
        output_path=str(folder),
        logger=LoggingConfig(log_to_wandb=False),
    )
    dataset = Dataset.from_dict({"tokens": rows.tolist()})
    runner = LanguageModelSAETrainingRunner(config, dataset, model)
    if loss is not None:
        add_loss(runner, loss, warm_up_steps=steps // 10, embeddings=embeddings)
    runner.run()
    return SAE.load_from_disk(folder)


class HeldOut(NamedTuple):
    """Held-out rows, and the activations of their tokens without the special one."""

    rows: Tensor
    """(N, context)"""
    tokens: Tensor
    """(T,)"""
    x: Tensor
    """(T, d)"""

    @classmethod
    def of(cls, model: HookedSAETransformer, rows: Tensor, hook: str = HOOK) -> HeldOut:
        """Run the model over rows."""
        with torch.no_grad():
            _, cache = model.run_with_cache(rows, names_filter=hook)
        kept = rows != BEGIN
        return cls(rows, rows[kept], cache[hook][kept])


def measure(model: HookedSAETransformer, sae: SAE[Any], held: HeldOut) -> dict[str, float]:
    """Return every one of :data:`MEASURES`; scores are above chance, over latents with a score."""
    x, tokens = held.x, held.tokens
    with torch.no_grad():
        latents, by_next = sae.encode(x), next_tokens(model)(x)
        loss = model.run_with_saes(held.rows, saes=[sae], return_type="loss")

    def score(embeddings: Tensor, groups: Tensor | None = None) -> float:
        metric = MonoScore()
        metric.update(latents, embeddings, groups)
        return metric.compute().mean_adjusted

    of_tokens = torch.zeros(int(tokens.max()) + 1, latents.shape[1]).index_add_(0, tokens, latents)
    shares = of_tokens.amax(0) / of_tokens.sum(0)
    found = evaluate(sae, [Batch(x)])
    return {
        "r2": found.r2,
        "loss": float(loss),
        "all": found.monoscore.mean_adjusted,
        "different": score(x, tokens),
        "next": score(by_next),
        "next_different": score(by_next, tokens),
        "one_token": float(shares[found.monoscore.defined].mean()),
        "latents": found.monoscore.num_defined,
    }


def measure_model(model: HookedSAETransformer, rows: Tensor) -> dict[str, Any]:
    """Return what the guide says of the model itself, on held-out rows."""
    with torch.no_grad():
        _, cache = model.run_with_cache(rows)
        lens = (model.ln_final(cache[HOOK]) @ model.W_U + model.b_U).log_softmax(-1)
    loss_of_lens = F.nll_loss(lens[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    hooks = ("hook_embed", "blocks.0.hook_resid_pre", HOOK, "blocks.1.hook_resid_post")
    return {
        "rows": list(rows.shape),
        "loss": float(model(rows, return_type="loss")),
        "loss_of_logit_lens": float(loss_of_lens),
        "hooks": {hook: _similarities(cache[hook], rows) for hook in hooks},
    }


def _similarities(x: Tensor, rows: Tensor) -> dict[str, float]:
    """Return norms and mean cosines of pairs, of special tokens and of the others.

    ``tokens_as_latents`` is the score above chance of latents that are one token each.
    """
    special, others = x[rows == BEGIN], x[rows != BEGIN]
    tokens = rows[rows != BEGIN]
    every = MonoScore()
    every.update(torch.rand(len(others), 1), others)
    different, of_tokens = MonoScore(), MonoScore()
    different.update(torch.rand(len(others), 1), others, tokens)
    of_tokens.update(F.one_hot(tokens).float().to_sparse(), others)
    unit = F.normalize(others.double(), dim=1)
    sums = unit.new_zeros(int(tokens.max()) + 1, unit.shape[1]).index_add_(0, tokens, unit)
    counts = tokens.bincount().double()
    begin = F.normalize(special, dim=1)
    return {
        "special_norm": float(special.norm(dim=1).mean()),
        "other_norm": float(others.norm(dim=1).mean()),
        "special_cosine": float((begin @ begin.T).mean()),
        "all_pairs": every.compute().chance,
        "same_token": float(
            (sums.square().sum() - len(others)) / (counts.square().sum() - len(others))
        ),
        "different_tokens": different.compute().chance,
        "tokens_as_latents": of_tokens.compute().mean_adjusted,
    }


def runs(model: HookedSAETransformer) -> dict[str, tuple[MonoLoss | None, Any]]:
    """Return the losses to compare by name, each with its embeddings."""
    return {
        "without MonoLoss": (None, None),
        "activation, lam 0.2": (MonoLoss(0.2, lam_units="nmse"), None),
        "activation, lam 0.8": (MonoLoss(0.8, lam_units="nmse"), None),
        "next token, lam 0.8": (MonoLoss(0.8, lam_units="nmse"), next_tokens(model)),
        "shuffled activation, lam 0.8": (ShuffledMonoLoss(0.8, lam_units="nmse"), None),
    }


def table(results: dict[str, list[dict[str, float]]]) -> Iterable[str]:
    """Yield the lines of the table: a row for each loss, mean ± deviation over seeds."""
    yield "| MonoLoss compares by | " + " | ".join(MEASURES.values()) + " |"
    yield "|---" * (1 + len(MEASURES)) + "|"
    for name, of_seeds in results.items():
        cells = [spread([one[key] for one in of_seeds], _DIGITS.get(key, 3)) for key in MEASURES]
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_models")
    parser.add_argument("--steps", type=int, default=1000, help="of each SAE")
    parser.add_argument("--model-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="file for every number, as JSON")
    given = parser.parse_args()

    train, test = split(read_rows())
    model = make_model(train, steps=given.model_steps)
    report: dict[str, Any] = {"machine": machine("cpu"), "model": measure_model(model, test)}
    print(json.dumps(report["model"], indent=1))
    held = HeldOut.of(model, test)
    results: dict[str, list[dict[str, float]]] = {}
    for name, (loss, embeddings) in runs(model).items():
        results[name] = []
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                sae = train_sae(
                    model,
                    train,
                    Path(folder),
                    loss=loss,
                    embeddings=embeddings,
                    steps=given.steps,
                    seed=seed,
                )
            results[name].append(measure(model, sae, held))
    print("\n".join(table(results)))
    if given.results:
        given.results.write_text(json.dumps({**report, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

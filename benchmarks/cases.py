"""The cases: each runs its ways in turn and returns what it saw, with the target it is held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    SAETrainer,
)
from torch import Tensor

from benchmarks import baselines
from benchmarks.data import Shape, activations, features
from benchmarks.setting import Found, Setting
from benchmarks.trainer import batchtopk_trainer
from monoloss_plugin import MonoLoss, MonoScore, functional
from monoloss_plugin.adapters.sae_lens import add_loss
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.kernels import support
from monoloss_plugin.kernels.batch import batch_scores
from monoloss_plugin.reproduce.algorithms import two_pass_monoscore
from monoloss_plugin.reproduce.timing import alternate, peak_memory, ratio, summarise


def loss(setting: Setting) -> Found:
    """MonoLoss forward and backward against the paper's way."""
    x = features(setting.shape.batch, setting.shape, setting.device)
    a = activations(x, setting.shape).requires_grad_()
    coo = a.detach().to_sparse().requires_grad_()

    def both_passes(of: Callable[[], Tensor], latents: Tensor) -> Callable[[], None]:
        def run() -> None:
            latents.grad = None
            of().backward()

        return run

    ways = {
        "paper's way": both_passes(lambda: baselines.batch_loss(a, x), a),
        "active entries": both_passes(lambda: functional.monoloss(a, x, gradient_at="active"), a),
        "every entry": both_passes(lambda: functional.monoloss(a, x), a),
        "sparse COO": both_passes(lambda: functional.monoloss(coo, x), coo),
    }
    seconds = alternate(ways, setting.rounds(7, 25), setting.device)
    return _report(seconds, baseline="paper's way", target="12 times faster (18 is the aim)")


def patches(setting: Setting) -> Found:
    """MonoLoss and MonoScore without the pairs within an image, against those with all pairs."""
    shape = setting.shape
    x = features(shape.batch, shape, setting.device)
    a = activations(x, shape)
    of_many = torch.randint(10_000, (shape.batch,), generator=torch.Generator().manual_seed(0))
    groups = {
        "all pairs": None,
        "patches of 10,000 images": of_many,
        "of whole images": torch.arange(shape.batch) // 196,
    }

    def train(images: Tensor | None) -> None:
        latents = a.detach().requires_grad_()
        functional.monoloss(latents, x, gradient_at="active", groups=images).backward()

    def measure(images: Tensor | None) -> None:
        MonoScore().update(a, x, images)

    found: Found = {"says": ""}
    for what, way in (("MonoLoss", train), ("MonoScore", measure)):
        ways = {name: partial(way, images) for name, images in groups.items()}
        seconds = alternate(ways, setting.rounds(7, 25), setting.device)
        slower = {name: ratio(runs, seconds["all pairs"]) for name, runs in seconds.items()}
        found[what] = {name: {**summarise(seconds[name]), **slower[name]} for name in groups}
        said = (f"{name} {of['median']:.2f} times as long" for name, of in slower.items())
        found["says"] += f"{what}: {'; '.join(said)}. "
    return found


def step(setting: Setting) -> Found:
    """A SAELens BatchTopK training step with MonoLoss against one without."""
    x = features(setting.shape.batch, setting.shape, setting.device)
    trainers = {
        name: batchtopk_trainer(setting, repeat(x)) for name in ("without", "with MonoLoss")
    }
    add_loss(trainers["with MonoLoss"], MonoLoss(lam=3e-4))
    if setting.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    ways = {name: _stepper(trainer, x) for name, trainer in trainers.items()}
    seconds = alternate(ways, setting.rounds(12, 60), setting.device)
    more = ratio(seconds["with MonoLoss"], seconds["without"])
    medians = {name: summarise(runs)["median"] for name, runs in seconds.items()}
    low, high = more["quartiles"]
    return {
        "seconds": {name: summarise(runs) for name, runs in seconds.items()},
        "with over without": more,
        "target": f"at most {2 if setting.device.type == 'cuda' else 6} % more",
        "says": f"{medians['without']:.3f} s without, {medians['with MonoLoss']:.3f} s with: "
        f"{_percent(more['median'])} round by round ({_percent(low)} to {_percent(high)})",
    }


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _stepper(trainer: SAETrainer[Any, Any], x: Tensor) -> Callable[[], Any]:
    return lambda: trainer.step(x)


def score(setting: Setting) -> Found:
    """MonoScore of sparse activations in memory against the two-pass linear way."""
    shape = setting.shape
    rows = setting.rounds(8, 32) * shape.batch
    x = features(rows, shape, setting.device)
    a = activations(x, shape)
    batches = list(zip(a.split(shape.batch), x.split(shape.batch), strict=True))
    coo = [(latents.to_sparse(), embeddings) for latents, embeddings in batches]

    def streamed(over: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            metric = MonoScore()
            for latents, embeddings in over:
                metric.update(latents, embeddings)
            return metric.compute().scores

        return run

    ways = {
        "two passes": lambda: two_pass_monoscore(batches),
        "held sparse": streamed(coo),
        "held dense": streamed(batches),
    }
    seconds = alternate(ways, setting.rounds(3, 7), setting.device)
    return {
        **_report(seconds, baseline="two passes", target="8 times faster"),
        "samples": rows,
    }


def evaluation(setting: Setting) -> Found:
    """``evaluate``, the SAE's encode and decode included, against the SAE alone and two passes."""
    shape, classes = setting.shape, 1000
    rows = setting.rounds(4, 24) * shape.batch
    x = features(rows, shape, setting.device)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    labels = labels.to(setting.device)
    torch.manual_seed(0)
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=shape.width, d_sae=shape.latents, device=str(setting.device))
    )
    with torch.no_grad():
        pre = x[: shape.batch] @ sae.W_enc
        sae.threshold.fill_(float(pre.flatten().topk(shape.k * shape.batch).values[-1]))
    batches = list(zip(x.split(shape.batch), labels.split(shape.batch), strict=True))

    def two_passes() -> Any:
        with torch.no_grad():
            return baselines.two_pass_evaluation(sae.encode, sae.decode, batches, classes)

    def bare() -> None:
        with torch.no_grad():
            for rows, _ in batches:
                sae.decode(sae.encode(rows))

    ways = {
        "two passes": two_passes,
        "encode and decode": bare,
        "evaluate": lambda: evaluate(sae, x, labels, num_classes=classes),
    }
    seconds = alternate(ways, setting.rounds(3, 7), setting.device)
    report = _report(seconds, baseline="two passes", target="2 times faster")
    share = ratio(seconds["evaluate"], seconds["encode and decode"])
    return {
        **report,
        "evaluate over encode and decode": share,
        "target": f"{report['target']}; at most as long as the SAE's own encode and decode",
        "says": f"{report['says']}; evaluate takes {share['median']:.2f} of encode and decode",
        "samples": rows,
    }


def memory(setting: Setting) -> Found:
    """What MonoLoss holds in a training step, in gradients of the activations' size."""
    shape = setting.shape
    gradient = 4 * shape.batch * shape.latents
    x = features(shape.batch, shape, setting.device)
    a = activations(x, shape).requires_grad_()
    found: dict[str, float] = {}
    choices: dict[str, Literal["active", "all"]] = {
        "active entries": "active",
        "every entry": "all",
    }
    for name, gradient_at in choices.items():

        def run(where: Literal["active", "all"] = gradient_at) -> None:
            a.grad = None
            functional.monoloss(a, x, gradient_at=where).backward()
            a.grad = None

        run()
        found[name] = peak_memory(run, setting.device) / gradient
    peaks = []
    for terms in ([], [MonoLoss(lam=3e-4)]):
        trainer = batchtopk_trainer(setting, repeat(x))
        for term in terms:
            add_loss(trainer, term)
        trainer.step(x)
        peaks.append(peak_memory(_stepper(trainer, x), setting.device) / gradient)
    found["SAELens step without"], found["with MonoLoss"] = peaks
    return {
        "gradients": found,
        "gradient bytes": gradient,
        "target": "at most one gradient",
        "says": "; ".join(f"{name}: {value:.2f} gradients" for name, value in found.items()),
    }


def agreement(setting: Setting) -> Found:
    """Every path against the pairwise definition in float64."""
    shape = Shape(batch=512, width=64, latents=1024, k=24)
    x = features(shape.batch, shape, setting.device)
    a = activations(x, shape)
    exact = a.double().requires_grad_()
    expected = functional.monoscore_pairwise(exact, x, undefined=math.nan)
    defined = ~expected.isnan()
    (by_autograd,) = torch.autograd.grad(expected.nan_to_num().sum(), exact)
    scale = by_autograd.abs().amax(0).clamp(min=1e-30)
    on = a != 0

    found = {}
    threshold = support.SPARSE_BELOW
    for name, below, latents in (
        ("dense", -1.0, a),
        ("sparse", 1.0, a),
        ("sparse COO", 1.0, a.to_sparse()),
    ):
        support.SPARSE_BELOW = below
        given = latents.detach().clone().requires_grad_()
        batch = batch_scores(given, x, "active")
        (gradient,) = torch.autograd.grad(batch.scores.sum(), given)
        gradient = gradient if gradient.layout == torch.strided else gradient.to_dense()
        both = defined & batch.defined
        streamed = MonoScore()
        for rows in range(0, shape.batch, 128):
            part = a[rows : rows + 128]
            streamed.update(
                part.to_sparse() if name == "sparse COO" else part, x[rows : rows + 128]
            )
        found[name] = {
            "loss's score": _largest((batch.scores.detach() - expected.detach())[both]),
            "loss's gradient": _largest(((gradient - by_autograd) / scale)[on & both]),
            "MonoScore": _largest((streamed.compute().scores - expected.detach())[defined]),
        }
    support.SPARSE_BELOW = threshold
    worst = max(error for way in found.values() for error in way.values())
    return {"errors": found, "target": "1e-5", "says": f"largest error {worst:.1e}"}


def waiting(setting: Setting) -> Found:
    """On a GPU: a training step of the loss must not make the host wait."""
    if setting.device.type != "cuda":
        return {"says": "needs a GPU"}
    x = features(setting.shape.batch, setting.shape, setting.device)
    a = activations(x, setting.shape).requires_grad_()
    functional.monoloss(a, x, gradient_at="active").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.monoloss(a, x, gradient_at="active").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"says": "no step waits"}


CASES: dict[str, Callable[[Setting], Found]] = {
    case.__name__: case
    for case in (agreement, loss, patches, step, memory, score, evaluation, waiting)
}


def _report(seconds: dict[str, list[float]], *, baseline: str, target: str) -> Found:
    faster = {
        name: ratio(seconds[baseline], runs) for name, runs in seconds.items() if name != baseline
    }
    said = (
        f"{name}: {summarise(seconds[name])['median']:.3f} s, {value['median']:.2f} times faster "
        f"({value['quartiles'][0]:.2f} to {value['quartiles'][1]:.2f})"
        for name, value in faster.items()
    )
    first = f"{baseline}: {summarise(seconds[baseline])['median']:.3f} s"
    return {
        "seconds": {name: summarise(runs) for name, runs in seconds.items()},
        "times faster": faster,
        "target": target,
        "says": "; ".join((first, *said)),
    }


def _largest(error: Tensor) -> float:
    return float(error.abs().max())

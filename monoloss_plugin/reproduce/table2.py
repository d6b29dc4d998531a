"""Fine-tuning with MonoLoss: section 4.2 and tables 2 and 3 of the MonoLoss paper.

A pretrained vision model is fine-tuned on photographs with MonoLoss of several weights, and without
it. The paper reports accuracy and time. What MonoLoss is for is measured here too: how alike the
images are that a latent responds to, on images that training has not seen, and by an encoder that
training has not seen. The control is MonoLoss that compares each image by the embedding of another.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from monoloss_plugin.reproduce.experiment import (
    Experiment,
    Features,
    Found,
    Setting,
    Table,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DATASETS = {1000: "ImageNet-1K", 10: "CIFAR-10", 100: "CIFAR-100"}
"""The paper's datasets by their numbers of classes."""
_ACCURACY = {  # table 2: in percent, on the three datasets
    "ResNet-50": {
        0.0: (80.34, 98.26, 88.05),
        0.03: (80.29, 98.37, 88.18),
        0.05: (80.25, 98.40, 88.20),
        0.07: (80.31, 98.38, 88.29),
        0.1: (80.93, 98.43, 88.12),
    },
    "CLIP-ViT-B/32": {
        0.0: (78.45, 98.09, 88.04),
        0.03: (78.50, 98.08, 88.32),
        0.05: (78.34, 98.07, 88.47),
        0.07: (78.50, 98.00, 88.32),
        0.1: (78.52, 98.20, 88.37),
    },
}
_MINUTES = {  # table 3: of an epoch without MonoLoss, and with it
    "ResNet-50": {"ImageNet-1K": (44.95, 45.14), "CIFAR-10": (0.07, 0.08)},
    "CLIP-ViT-B/32": {"ImageNet-1K": (42.53, 42.86), "CIFAR-10": (1.69, 1.70)},
}


@dataclass(frozen=True)
class Scale:
    """What is fine-tuned, on how much, and how."""

    encoder: str
    """A model of timm, by a name that ``load_encoder`` takes."""
    image_size: int | None
    """Side of the square that images are resized to; by default the model's own."""
    train_images: int | None
    """How many images to train on; None for all of them."""
    held_out_images: int | None
    """How many images to measure on; None for all of them."""
    epochs: int
    batch_size: int
    lr: float
    """Of SGD with momentum 0.9, at the beginning; it falls to 0 along a cosine."""
    lams: tuple[float, ...]
    """Weights of MonoLoss. The control has the largest."""
    weight_decay: float = 2e-5
    warm_up_epochs: int = 0


SMALL = Scale(
    encoder="efficientnet-lite0",
    image_size=48,
    train_images=4000,
    held_out_images=2000,
    epochs=5,
    batch_size=128,
    lr=0.03,
    lams=(0.0, 0.1, 1.0),
)
"""For a few cores of a CPU."""


def paper_scale(num_classes: int) -> Scale:
    """Return the paper's ResNet-50 with the settings of appendix E, table 4."""
    imagenet = num_classes == 1000
    return Scale(
        encoder="timm:resnet50",
        image_size=None,
        train_images=None,
        held_out_images=None,
        epochs=90,
        batch_size=1024,
        lr=1e-3 if imagenet else 0.1,
        lams=(0.0, 0.03, 0.05, 0.07, 0.1),
        warm_up_epochs=5 if imagenet else 0,
    )


def measure(setting: Setting, scale: Scale | None = None) -> Found:
    """Fine-tune with each weight and each seed, and measure.

    The embeddings for MonoLoss are those of the last encoder of ``setting.features``; the first
    only measures.

    Args:
        setting: with the features of two encoders, and the images that they are of.
        scale: by default the paper's where ``setting.full``, and :data:`SMALL` else.

    Raises:
        ValueError: there are fewer than two encoders, images have no labels, or there are no
            features of an image.
    """
    # timm takes seconds to import, and tables need none of it.
    from monoloss_plugin.losses import MonoLoss
    from monoloss_plugin.reproduce import fine_tune

    if len(setting.features) < 2:
        raise ValueError(
            "features: expected those of two encoders, one for MonoLoss and another to measure by, "
            f"got {len(setting.features)}"
        )
    own, other = list(setting.features)[-1], next(iter(setting.features))
    spaces: dict[str, Features] = {name: setting.features[name] for name in (own, other)}
    num_classes = fine_tune.number_of_classes(setting.images["train"])
    if scale is None:
        scale = paper_scale(num_classes) if setting.full else SMALL
    train = fine_tune.choose_photographs(
        setting.images["train"], {own: spaces[own].train}, scale.train_images
    )
    held_out = fine_tune.choose_photographs(
        setting.images["held_out"],
        {name: one.held_out for name, one in spaces.items()},
        scale.held_out_images,
    )

    def measured_before() -> dict[str, Any]:
        encoder = fine_tune.load_model(scale, num_classes, seed=0)
        found = fine_tune.measure_model(encoder, held_out, scale, setting.device)
        return {**found, "accuracy": None}  # of a head that nothing has trained

    def run(lam: float, shuffled: bool, seed: int) -> dict[str, Any]:
        h = train.embeddings[own]
        if shuffled:
            h = fine_tune.embeddings_of_others(h, seed)
        loss = MonoLoss(lam=lam, lam_units="raw") if lam else None
        encoder = fine_tune.load_model(scale, num_classes, seed)
        seconds = fine_tune.fine_tune(encoder, train, h, loss, scale, setting.device)
        found = fine_tune.measure_model(encoder, held_out, scale, setting.device)
        return {**found, "seconds": statistics.median(seconds)}

    # A run at another scale must not be taken for one at this scale.
    size = "" if scale.image_size is None else f" {scale.image_size} px"
    what = f"{scale.encoder}{size} {len(train.rows)} images {scale.epochs} epochs lr {scale.lr:g}"
    what += f" by {own} and {other}"
    runs = []
    settings = [*((lam, False) for lam in scale.lams), (max(scale.lams), True)]
    for seed in setting.seeds:
        for lam, shuffled in settings:
            name = f"lam {lam:g} shuffled" if shuffled else f"lam {lam:g}"
            found = setting.run(
                *("table2", what, name, f"seed {seed}"),
                compute=partial(run, lam, shuffled, seed),
            )
            runs.append({"lam": lam, "shuffled": shuffled, "seed": seed, **found})
    return {
        "model": scale.encoder,
        "images": setting.images["train"].record.get("name"),
        "num_train": len(train.rows),
        "num_held_out": len(held_out.rows),
        "num_classes": num_classes,
        "scale": asdict(scale),
        "trained_on": own,
        "other": other,
        "before": setting.run("table2", what, "before", compute=measured_before),
        "runs": runs,
    }


def tables(found: Found) -> list[Table]:
    """Return the paper's tables beside ours, and what the paper does not measure."""
    return [_accuracy_table(found), _latents_table(found), _time_table(found)]


def draw(found: Found) -> Axes:
    """Draw the MonoScore curves in the space of the encoder that training has not seen."""
    import torch

    from monoloss_plugin.figures import plot_curves

    space = found["other"]
    groups = {"before fine-tuning": [found["before"]]}
    groups |= {_name(*key): runs for key, runs in _by_setting(found).items()}
    curves = {
        name: [torch.tensor(run["spaces"][space]["curve"]) for run in runs]
        for name, runs in groups.items()
    }
    ax = plot_curves(curves, chance=found["before"]["spaces"][space]["chance"])
    ax.set_ylabel(f"MonoScore, by {space}")
    return ax


def _name(lam: float, shuffled: bool) -> str:
    return f"lam {lam:g}, shuffled embeddings" if shuffled else f"lam {lam:g}"


def _by_setting(found: Found) -> dict[tuple[float, bool], list[dict[str, Any]]]:
    """Return the runs of each weight, and of the control."""
    runs: dict[tuple[float, bool], list[dict[str, Any]]] = {}
    for run in found["runs"]:
        runs.setdefault((run["lam"], run["shuffled"]), []).append(run)
    return runs


def _dataset(found: Found) -> str:
    """Return the dataset of the paper that is most like ours."""
    return _DATASETS.get(found["num_classes"], "CIFAR-10")


def _accuracy_table(found: Found) -> Table:
    dataset, scale = _dataset(found), found["scale"]
    column = list(_DATASETS.values()).index(dataset)
    groups = _by_setting(found)
    plain = {run["seed"]: run["accuracy"] for run in groups[0.0, False]}
    papers = {(lam, False) for lam in _ACCURACY["ResNet-50"]}
    rows = []
    for lam, shuffled in sorted({*papers, *groups}, key=lambda key: (key[1], key[0])):
        of_paper = [
            f"{table[lam][column]:.2f}" if (lam, shuffled) in papers else ""
            for table in _ACCURACY.values()
        ]
        runs = groups.get((lam, shuffled), [])
        ours = spread((100 * run["accuracy"] for run in runs), 2)
        gain = spread((100 * (run["accuracy"] - plain[run["seed"]]) for run in runs), 2)
        rows.append([_name(lam, shuffled), *of_paper, ours, gain if lam else ""])
    of = f" of {found['images']}" if found["images"] else ""
    return Table(
        "Table 2: accuracy in percent on held-out images",
        [
            "MonoLoss",
            *(f"paper: {model}, {dataset}" for model in _ACCURACY),
            f"ours: {found['model']}",
            "ours, minus lam 0 of the same seed",
        ],
        rows,
        f"Ours: {found['num_train']:,} images{of} to train on, {found['num_held_out']:,} held out, "
        f"{scale['epochs']} epochs in batches of {scale['batch_size']}, embeddings by "
        f"{found['trained_on']}, mean ± standard deviation over seeds. The paper: every image, 90 "
        "epochs in batches of 1,024, embeddings by CLIP ViT-B/32; it gives no deviation. It adds "
        "a linear layer before the head; ours has a ReLU too.",
    )


def _latents_table(found: Found) -> Table:
    own, other, images = found["trained_on"], found["other"], found["num_held_out"]
    before = found["before"]
    groups = {"before fine-tuning": [before]}
    groups |= {_name(*key): runs for key, runs in _by_setting(found).items()}
    rows = [
        [
            name,
            spread(run["spaces"][own]["adjusted"] for run in runs),
            spread(run["spaces"][other]["adjusted"] for run in runs),
            spread(run["spaces"][own]["monoscore"] for run in runs),
            spread((run["images"] for run in runs), 0),
            spread((100 * run["images"] / images for run in runs), 1),
            spread((run["dead"] for run in runs), 0),
        ]
        for name, runs in groups.items()
    ]
    chance = " and ".join(
        f"{before['spaces'][space]['chance']:.3f} by {space}" for space in (own, other)
    )
    return Table(
        "Latents on held-out images",
        [
            "MonoLoss",
            f"MonoScore above chance, by {own} (trained on)",
            f"MonoScore above chance, by {other} (not trained on)",
            f"MonoScore, by {own}",
            "images of the median latent",
            "in % of all images",
            "dead latents",
        ],
        rows,
        f"{before['num_latents']:,} latents, mean ± standard deviation over seeds. Above chance, 0 "
        "is what shuffled activations get and 1 is perfect; it leaves dead latents out, and "
        f"MonoScore counts them as 0. Chance is a MonoScore of {chance}. With shuffled embeddings, "
        "MonoLoss compares each image by the embedding of another.",
    )


def _time_table(found: Found) -> Table:
    dataset, groups = _dataset(found), _by_setting(found)
    largest = max(lam for lam, _ in groups)
    plain = [run["seconds"] for run in groups[0.0, False]]
    with_loss = [run["seconds"] for run in groups[largest, False]]
    papers = [of.get(dataset) for of in _MINUTES.values()]
    return Table(
        "Table 3: time of an epoch",
        [
            "",
            *(f"paper: {model}, {dataset}, minutes" for model in _MINUTES),
            f"ours: {found['model']}, seconds",
        ],
        [
            ["lam 0", *(f"{of[0]:.2f}" if of else "" for of in papers), spread(plain, 2)],
            [
                f"lam {largest:g} (paper: MonoLoss)",
                *(f"{of[1]:.2f}" if of else "" for of in papers),
                spread(with_loss, 2),
            ],
            [
                "ratio",
                *(f"{of[1] / of[0]:.2f}" if of else "" for of in papers),
                spread((b / a for a, b in zip(plain, with_loss, strict=True)), 2),
            ],
        ],
        "Ours: the median epoch of each run, mean ± standard deviation over seeds; the ratio is "
        "between runs of one seed. It is rough where other programs share the machine.",
    )


TABLE2 = Experiment(
    about="Fine-tune a vision model with MonoLoss: accuracy, latents and time",
    needs=frozenset({"features", "images", "second encoder"}),
    measure=measure,
    tables=tables,
    draw=draw,
)

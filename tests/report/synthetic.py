"""A page of random latents and images, with texts that a page could mistake for its own code."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from monoloss_plugin.report.page import LatentTable, Page

NASTY = (
    "<b>bold</b>",
    "</script><script>boom()</script>",
    "a \"quote\" & 'more'",
    "<!-- note",
    "bell\x07",
)
"""Texts that must appear as they are; but the last, whose control character is escaped."""


def make_page(
    widths: tuple[int, ...] = (60, 40),
    images: int = 120,
    classes: int = 6,
    shown: int = 8,
    detail: int = 4,
    distinct: int = 200,
) -> Page:
    """Return a page of SAEs of the given widths, with images of ``detail`` colours a side."""
    rng = torch.Generator().manual_seed(0)
    names = [*NASTY, *(f"kind {i}" for i in range(len(NASTY), classes))]
    labels = torch.randint(-1, classes, (images,), generator=rng)
    ids = [f"photos/{i:05d}.png" for i in range(images)]
    ids[: len(NASTY)] = NASTY
    saes = [make_latents(i, widths, images, classes, shown, rng) for i in range(len(widths))]
    made = [_thumbnail(i, detail) for i in range(min(images, distinct))]
    thumbnails = [made[i % len(made)] for i in range(images)]
    thumbnails[7] = b""
    return Page(
        title="Latents of <two> SAEs & their images",
        about=[
            ("SAEs", ", ".join(sae.name for sae in saes)),
            ("Features", "CLIP ViT-B/32, 512 wide, unit length"),
            ("Images", f"{images} of ImageNet's validation set </script>"),
            ("Left out", "images that no latent shows"),
        ],
        header=["", *(sae.name for sae in saes), "random"],
        rows=[
            ["R²", *("0.74" for _ in saes), "0.12"],
            ["MonoScore", *("0.61" for _ in saes), "0.50"],
            ["dead <b>latents</b>", *("3" for _ in saes), "0"],
        ],
        baselines=["random"],
        notes=["Scores are of held-out images.", "<i>Near misses</i> do not activate the latent."],
        runs=[
            *(
                {
                    "name": s.name,
                    "baseline": False,
                    "r2": 0.7 + 0.05 * i,
                    "monoscore_adjusted": 0.2 + 0.1 * i,
                }
                for i, s in enumerate(saes)
            ),
            {"name": "random", "baseline": True, "r2": 0.12, "monoscore_adjusted": 0.0},
            {"name": "broken", "baseline": True, "r2": float("nan"), "monoscore_adjusted": 0.0},
        ],
        classes=names,
        num_rows=10 * images,
        saes=saes,
        image_ids=ids,
        image_labels=labels,
        thumbnails=thumbnails,
        pixelated=False,
    )


def make_latents(
    i: int, widths: tuple[int, ...], images: int, classes: int, shown: int, rng: torch.Generator
) -> LatentTable:
    width = widths[i]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    def choose(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=rng)

    score = 0.4 + 0.6 * uniform(width)
    score[3] = torch.nan
    support = (10 ** (4 * uniform(width))).long()
    values = uniform(width, 4 * shown).sort(dim=1, descending=True).values
    bands = {
        name: (choose(images, width, shown).int(), values[:, k * shown : (k + 1) * shown])
        for k, name in enumerate(("top", "middle", "bottom", "near misses"))
    }
    bands["middle"][0][5, 2:] = -1
    top = choose(classes, width, 1)
    counts = torch.cat([support[:, None] // (2 + k) for k in range(5)], dim=1)
    return LatentTable(
        name=f"SAE {'with' if i else 'without'} MonoLoss <{i}>",
        chance=0.5,
        columns={
            "score": score,
            "adjusted": (score - 0.5) / 0.5,
            "p": uniform(width) ** 8,
            "significant": score > 0.55,
            "support": support,
            "frequency": support / 10_000,
            "largest": values[:, 0],
            "purity": uniform(width),
            "purity_adjusted": uniform(width) * 1.1 - 0.1,
            "class": top[:, 0],
        },
        names=[[f"thing {j % 17}", NASTY[j % len(NASTY)]] for j in range(width)],
        bands=bands,
        histogram=(
            torch.exp(-(((torch.arange(40) - 22 - 6 * uniform(width, 1)) / 5) ** 2)) * 900
        ).long(),
        first_bin=-24,
        breakdown=((top + torch.arange(5)) % classes, counts),
        nearest=(choose(width, width, 5), uniform(width, 5).sort(dim=1, descending=True).values),
        together=(choose(width, width, 5), uniform(width, 5).sort(dim=1, descending=True).values),
        matches=[
            None if k == i else (choose(other, width), uniform(width))
            for k, other in enumerate(widths)
        ],
        of_images=(choose(width, images, 12), uniform(images, 12) - 0.3),
    )


def _thumbnail(i: int, detail: int) -> bytes:
    rng = np.random.default_rng(i)
    colours = rng.integers(0, 256, (detail, detail, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((64, 64), Image.Resampling.BICUBIC).save(
        file, "WEBP", quality=45
    )
    return file.getvalue()

"""What the page shows of each latent of an SAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monoloss_plugin.dictionary import nearest_latents
from monoloss_plugin.gallery.contributions import RowLatents
from monoloss_plugin.gallery.names import LatentNames, names_from_means
from monoloss_plugin.gallery.samples import ActivatingSamples
from monoloss_plugin.report.choice import Shown
from monoloss_plugin.report.maps import LatentMaps
from monoloss_plugin.report.page import LatentTable
from monoloss_plugin.results import Evaluation

_NEAREST = 5
_CLASSES = 5


def latent_table(
    name: str,
    found: ActivatingSamples,
    named: tuple[list[str], Tensor] | None,
    shown: Shown,
    others: Sequence[ActivatingSamples],
    maps: LatentMaps | None = None,
) -> LatentTable:
    """Return the latents of an SAE as the page shows them.

    Args:
        name: of the SAE.
        found: its samples.
        named: texts to name the latents by, and their embeddings.
        shown: the images of the page.
        others: what was found of every SAE of the page, this one too.
        maps: its heat maps; None if the samples are no patches.
    """
    evaluation = found.evaluation
    return LatentTable(
        name=name,
        chance=evaluation.monoscore.chance,
        columns=_columns(evaluation),
        names=None
        if named is None
        else _named(names_from_means(found.mean_embeddings, found.mean_embedding, *named)),
        bands={of: (shown.places(band.rows), band.values) for of, band in found.bands.items()},
        histogram=found.histogram,
        first_bin=found.first_bin,
        breakdown=_breakdown(found.class_counts),
        nearest=_nearest(found, found.directions),
        together=_nearest(found, found.signatures),
        matches=[None if one is found else _match(found, one) for one in others],
        of_images=_of_images(found.of_rows, shown.rows),
        maps=maps,
    )


def _columns(evaluation: Evaluation) -> dict[str, Tensor]:
    """Return what is known of every latent, (M,) by name; NaN where it is undefined."""
    of, purity, images = evaluation.monoscore, evaluation.purity, evaluation.images
    tested, support, frequency = evaluation.tested, of.support, evaluation.frequency
    if images is not None:
        support = images.largest.support
        frequency = support.double() / images.num_images
    columns = {
        "score": of.scores.masked_fill(~of.defined, torch.nan),
        "adjusted": of.adjusted.masked_fill(~of.defined, torch.nan),
        "p": tested.p_values,
        "significant": tested.significant(),
        "support": support,
        "frequency": frequency,
        "largest": of.largest,
    }
    if images is not None:
        columns |= images.columns()
    if purity is not None:
        columns |= {
            "purity": purity.binary,
            "purity_adjusted": purity.adjusted,
            "class": purity.dominant,
        }
    return columns


def _breakdown(class_counts: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return the most frequent classes of each latent (M, 5), and their counts."""
    if class_counts is None:
        return None
    counts, classes = class_counts.T.topk(min(_CLASSES, len(class_counts)), 1)
    return classes.masked_fill(counts == 0, -1), counts


def _named(names: LatentNames) -> list[list[str]]:
    """Return the names of each latent, each with how far it stands out from the other texts."""
    return [
        [text if z != z else f"{text} (z {z:.1f})" for text, z in zip(texts, scores, strict=False)]
        for texts, scores in zip(names.texts, names.z_scores.tolist(), strict=True)
    ]


def _nearest(found: ActivatingSamples, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the five latents with the most similar vectors; none if these are not known."""
    if vectors is None:
        nothing = torch.full((found.evaluation.num_latents, _NEAREST), -1)
        return nothing, nothing.float()
    alive = found.evaluation.monoscore.support > 0
    nearest = nearest_latents(vectors, count=_NEAREST, alive=alive)
    return nearest.latents, nearest.cosines


def _match(found: ActivatingSamples, other: ActivatingSamples) -> tuple[Tensor, Tensor]:
    """Return the latent of another SAE that is active on the same samples, for each latent."""
    alive = found.evaluation.monoscore.support > 0
    nearest = nearest_latents(found.signatures, other.signatures, count=1, alive=alive)
    return nearest.latents[:, 0], nearest.cosines[:, 0]


def _of_images(of_rows: RowLatents, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents of the images that are shown, the largest share first; and the shares."""
    place = torch.searchsorted(of_rows.rows, rows)
    latents, shares = of_rows.latents[place], of_rows.shares[place]
    order = shares.masked_fill(latents < 0, -torch.inf).argsort(stable=True, dim=1, descending=True)
    return latents.gather(1, order), shares.gather(1, order)

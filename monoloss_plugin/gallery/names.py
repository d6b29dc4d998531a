"""Names for latents: the texts that are most similar to what activates each latent."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_rows,
    as_tensor,
    as_texts,
    device_or_gpu,
    require_at_least,
    require_finite,
    require_flag,
)
from monoloss_plugin._chunks import row_chunks
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of
from monoloss_plugin._sae import SAE, require_sae
from monoloss_plugin.batch import Batch
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.gallery.samples import ActivatingSamples
from monoloss_plugin.scoring import Scoring

if TYPE_CHECKING:
    import pandas as pd

    from monoloss_plugin.features import FeatureSet, TextEncoder

_COSINES = 1 << 24
"""Cosines per chunk, about: 64 MiB in float32."""
_FEWEST = 3
"""With fewer texts than this there is no z-score."""


@dataclass(frozen=True)
class LatentNames:
    """The texts that are most similar to what activates each of M latents, the best first.

    A name is the best of the texts that were given, not a proof of what the latent stands for. Read
    it beside the latent's images, and beside its MonoScore: a latent of mixed images has a name
    too. See :attr:`z_scores` for how far a name stands out.
    """

    texts: list[list[str]]
    """(M, count): the names of each latent; empty for a latent that has none."""
    similarities: Tensor
    """(M, count) float32: the cosine of text and latent, each less the mean of its kind; NaN where
    there is no name.

    It tells which text fits better. It does not tell how well a text fits: it depends on the
    encoder, and on which other texts were given.
    """
    z_scores: Tensor
    """(M, count) float32: how many standard deviations the similarity is above its mean over all
    texts; NaN where there is no name, or fewer than three texts.

    The best of many texts is above the mean by chance. If the similarities of T texts were normal,
    the best would have about sqrt(2 ln T): 3.0 for 100 texts, and 3.7 for 1,000.
    """

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row for each latent, for pandas.

        Columns: name, similarity and z of the best text, and others, which are the next best texts.
        A latent without a name has an empty one.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise missing_extra(error, "referee") from error
        columns = {
            "name": [texts[0] if texts else "" for texts in self.texts],
            "similarity": self.similarities[:, 0].numpy(),
            "z": self.z_scores[:, 0].numpy(),
            "others": [", ".join(texts[1:]) for texts in self.texts],
        }
        return pandas.DataFrame(columns).rename_axis("latent")


def name_latents(
    sae: SAE | ActivatingSamples,
    features: Tensor | FeatureSet | Iterable[Batch],
    texts: Sequence[str],
    encoder: str | TextEncoder | Callable[[list[str]], Any] | None = None,
    *,
    count: int = 3,
    normalize: bool | None = None,
    batch_size: int = 2048,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> LatentNames:
    """Name each latent by the texts that are most similar to the samples that activate it.

    The embeddings of the samples are averaged, weighted by the latent's activations, in one pass
    through the SAE. :func:`names_from_means` compares the means with the texts. So images and texts
    must have embeddings in one space, such as those of CLIP: the features must be the encoder's
    pooled ones.

    Args:
        sae: anything with ``encode`` and ``decode``, such as a SAELens SAE; or what
            :func:`~monoloss_plugin.gallery.activating_samples` found of it, which saves the pass.
        features: as :func:`~monoloss_plugin.evaluation.evaluate` takes them. If batches bring
            embeddings, these are compared with the texts. If samples are patches, their images are:
            by pooled features of the text's encoder, as in ``FeatureBatches(patches,
            embeddings=pooled)``.
        texts: what the names are chosen from. A text that is given twice counts once. CLIP likes
            whole phrases such as "a photo of a dog".
        encoder: what encodes the texts: a name that
            :func:`~monoloss_plugin.features.load_text_encoder` takes; what it gave; or a function
            that takes a list of T texts and returns embeddings (T, d). By default the encoder that
            the features were made with, as their record says.
        count: how many names to give each latent.
        normalize: as for ``evaluate``.
        batch_size: samples per step.
        device: where the SAE computes; by default the device of its parameters, or of the features.
            An encoder that is given by name computes there too; by default on a GPU if there is
            one.
        progress: show a progress bar (needs tqdm).

    Returns:
        Names on the CPU. If there are fewer texts than ``count``, each latent gets them all.

    Raises:
        TypeError: not an SAE, an encoder or a list of strings.
        ValueError: no texts, no samples; an encoder without a text side, or one that cannot be told
            from the features; or embeddings of another width than the texts have.
        ModuleNotFoundError: a library that is needed is not installed.

    Warns:
        UserWarning: the features say that another encoder made them; or as ``evaluate``.
    """
    if not isinstance(sae, ActivatingSamples):
        require_sae(sae)
    require_at_least(1, count, "count")
    require_flag(progress, "progress")
    named = encode_texts(texts, encoder, features, device)
    if isinstance(sae, ActivatingSamples):
        return names_from_means(sae.mean_embeddings, sae.mean_embedding, *named, count)
    scoring = Scoring(sae, features, normalize=normalize, batch_size=batch_size, device=device)
    for _ in scoring.batches("Naming", progress):
        pass
    scoring.evaluation()  # to warn if the features are on another scale than the SAE takes
    means, mean = scoring.of_images.mean_embeddings(), scoring.of_images.mean_embedding()
    return names_from_means(means, mean, *named, count)


def encode_texts(
    texts: Sequence[str],
    encoder: str | TextEncoder | Callable[[list[str]], Any] | None,
    features: Any,
    device: torch.device | str | None = None,
) -> tuple[list[str], Tensor]:
    """Return texts, each once, and their embeddings (T, d), as :func:`name_latents` encodes them.

    Raises:
        TypeError, ValueError, ModuleNotFoundError: as :func:`name_latents`.
    """
    unique = list(dict.fromkeys(as_texts(texts, "texts")))
    encode = _text_encoder(encoder, features, device)
    with torch.no_grad():
        return unique, as_rows(encode(unique), "encoder(texts)")


@torch.no_grad()
def names_from_means(
    mean_embeddings: Tensor,
    mean_embedding: Tensor,
    texts: Sequence[str],
    text_embeddings: Tensor,
    count: int = 3,
) -> LatentNames:
    """Name each latent by the texts that are most similar to its mean embedding.

    In models such as CLIP, all images share a large part of their embeddings, and all texts share
    another. The cosine of a mean and a text is then mostly that of these two parts, and the same
    few texts come first for every latent. So the mean of all samples is subtracted from the
    latents' means, and the mean of all texts (as unit vectors) from the texts, if there are two or
    more. What is left of a latent is the direction in which embeddings move where it is active.

    Args:
        mean_embeddings: (M, d), of each latent, as
            :meth:`MonoScore.mean_embeddings() <monoloss_plugin.MonoScore.mean_embeddings>` gives
            them. A latent whose row is zero has no name.
        mean_embedding: (d,), of all samples, as ``MonoScore.mean_embedding()`` gives it.
        texts: T texts.
        text_embeddings: (T, d), of any lengths.
        count: how many names to give each latent.

    Returns:
        Names on the CPU. If there are fewer texts than ``count``, each latent gets them all.

    Raises:
        TypeError: not floating-point tensors, or not a list of strings.
        ValueError: no texts, shapes that do not match, or NaN or infinite values.

    Examples:
        >>> means = torch.tensor([[0.9, 0.1, 0.3], [0.9, 0.3, 0.1], [0.0, 0.0, 0.0]])
        >>> dog, cat = [-0.8, 0.1, 0.3], [-0.8, 0.3, 0.1]
        >>> mean = torch.tensor([0.9, 0.2, 0.2])
        >>> names_from_means(means, mean, ["dog", "cat"], torch.tensor([dog, cat]), 1).texts
        [['dog'], ['cat'], []]
    """
    given = as_texts(texts, "texts")
    require_at_least(1, count, "count")
    means = as_rows(mean_embeddings, "mean_embeddings").float()
    mean = as_tensor(mean_embedding, "mean_embedding").to(means)
    if mean.shape != means.shape[1:]:
        raise ValueError(
            f"mean_embedding: expected ({means.shape[1]},) to match mean_embeddings, got "
            f"{tuple(mean.shape)}"
        )
    of_texts = as_rows(text_embeddings, "text_embeddings").to(means)
    if of_texts.shape != (len(given), means.shape[1]):
        raise ValueError(
            f"text_embeddings: expected ({len(given)}, {means.shape[1]}), one for each text and as "
            f"wide as the samples' embeddings, got {tuple(of_texts.shape)}; are both of the same "
            "encoder?"
        )
    for name, tensor in (
        ("mean_embeddings", means),
        ("mean_embedding", mean),
        ("text_embeddings", of_texts),
    ):
        require_finite(tensor, name)

    units, _ = unit_rows(of_texts, torch.float32)
    if len(given) > 1:
        units, _ = unit_rows(units - units.mean(0), torch.float32)
    directions, squares = unit_rows(means - mean, torch.float32)
    named = ((squares > 0) & (means != 0).any(1)).nonzero().squeeze(1)
    kept = min(count, len(given))
    similarities, z_scores = (torch.full((len(means), kept), torch.nan) for _ in range(2))
    chosen: list[list[str]] = [[] for _ in range(len(means))]
    for rows in row_chunks(len(named), len(given), _COSINES):
        latents = named[rows]
        cosines = directions[latents] @ units.T
        best = cosines.topk(kept, dim=1)
        similarities[latents.cpu()] = best.values.cpu()
        if len(given) >= _FEWEST:
            spread, middle = torch.std_mean(cosines, dim=1, correction=0, keepdim=True)
            z_scores[latents.cpu()] = ((best.values - middle) / spread).cpu()
        for latent, numbers in zip(latents.tolist(), best.indices.tolist(), strict=True):
            chosen[latent] = [given[number] for number in numbers]
    return LatentNames(chosen, similarities, z_scores)


def _text_encoder(encoder: Any, features: Any, device: Any) -> Callable[[list[str]], Any]:
    """Return the function that encodes texts; see :func:`name_latents`."""
    by_name = encoder is None or isinstance(encoder, str)
    if not by_name and (isinstance(encoder, type) or not callable(encoder)):
        raise TypeError(
            "encoder: expected a name, a TextEncoder or a function of a list of texts, got "
            f"{kind_of(encoder)}"
        )
    made_by = getattr(getattr(features, "record", None), "encoder", None) or {}
    found: Any = encoder
    if by_name:
        from monoloss_plugin.features.encoders.text import load_text_encoder, text_encoder_of

        found = text_encoder_of(made_by) if encoder is None else load_text_encoder(encoder)
        found.model.to(device_or_gpu(device))
    read_by = getattr(found, "record", None)
    if made_by and read_by:  # a function without a record is the caller's own affair
        _require_same_encoder(made_by, read_by)
    encode: Callable[[list[str]], Any] = found
    return encode


def _require_same_encoder(images: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
    """Raise an error, or warn, if records say that images and texts are in different spaces."""
    from monoloss_plugin.features.encoders.text import require_text_space

    require_text_space(images)
    first, second = (f"{record.get('library')}:{record.get('name')}" for record in (images, texts))
    if first != second:
        warnings.warn(
            f"encoder: the features say that {first} made them, and {second} encodes the texts. "
            "The names mean something only if both are the same model",
            stacklevel=5,  # shown at the call of name_latents
        )

"""One pass over an SAE's features that keeps, of each latent, the samples to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from monoloss_plugin._checks import require_at_least, require_flag
from monoloss_plugin._chunks import row_chunks
from monoloss_plugin._sae import SAE
from monoloss_plugin.batch import Batch
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.gallery.contributions import Contributions, RowLatents, joined
from monoloss_plugin.gallery.near_misses import Candidates, pack_active
from monoloss_plugin.gallery.reservoir import Band, Entries, Reservoir, strongest_first
from monoloss_plugin.gallery.signatures import Signatures
from monoloss_plugin.kernels.support import Support
from monoloss_plugin.results import Evaluation
from monoloss_plugin.scoring import Encoded, Scoring

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

MIDDLE_FROM = 64
"""The middle samples are those of a random sample of so many activations of the latent.

It is all of them if there are no more, and the middle is then exact. Otherwise the rank of its
median among all activations has a standard deviation of 6 percentage points.
"""
BINS_PER_OCTAVE = 4
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -24, 24
"""Activations outside 2^-24 to 2^24 count in the first and the last bin."""
_NUM_BINS = BINS_PER_OCTAVE * (_HIGHEST_OCTAVE - _LOWEST_OCTAVE)
_ELEMENTS = 1 << 21
"""Dense activations per chunk, about."""


@dataclass(frozen=True, repr=False)
class ActivatingSamples:
    """What :func:`activating_samples` found, on the CPU.

    If samples are patches, it is of images: an image's activation is the largest of its patches.
    """

    evaluation: Evaluation
    """Every measure, from the same pass."""
    top: Band
    """The samples that activate a latent most, strongest first. Exact."""
    middle: Band
    """Samples around the median of its activations, strongest first: see :data:`MIDDLE_FROM`. None
    of them is in the top or the bottom."""
    bottom: Band
    """The samples that activate it least of those that activate it, strongest first. Exact; none of
    them is in the top."""
    near_misses: Band
    """Samples that do not activate it, but whose embeddings are most similar to the mean of those
    that do, most similar first: see :class:`~monoloss_plugin.gallery.near_misses.Candidates`."""
    histogram: Tensor
    """(M, bins) int64: how many activations lie in [2^((first_bin + b) / 4), 2^((first_bin + b + 1)
    / 4)), for each bin b."""
    first_bin: int
    """See :attr:`histogram`."""
    class_counts: Tensor | None
    """(C, M) int64: how many samples of each class activate a latent; None without labels."""
    mean_embeddings: Tensor
    """(M, d) float32: the activation-weighted mean of the samples' unit embeddings."""
    mean_embedding: Tensor
    """(d,) float32: the mean of all unit embeddings."""
    directions: Tensor | None
    """(M, d_in) float32: what a unit of each latent adds to the reconstruction; None if the SAE
    cannot tell. An SAE that scales every sample has them on the scale of the first."""
    signatures: Tensor
    """(M, 512) float32: the cosine of two of them is about the correlation of the two latents'
    activations; also of latents of two SAEs, on the same samples. See
    :mod:`monoloss_plugin.gallery.signatures`."""
    of_rows: RowLatents
    """The view from a sample."""
    unit_norm: bool
    """Whether the features were scaled to unit norm."""
    sae: SAE | None = None
    """The SAE, which heat maps need; None unless samples are patches."""

    def __repr__(self) -> str:
        return f"ActivatingSamples({self.evaluation!r})"

    @property
    def bands(self) -> dict[str, Band]:
        """Every band by its name."""
        return {
            "top": self.top,
            "middle": self.middle,
            "bottom": self.bottom,
            "near misses": self.near_misses,
        }


@torch.no_grad()
def activating_samples(
    sae: SAE,
    features: Tensor | FeatureSet | Iterable[Batch],
    *,
    count: int = 8,
    normalize: bool | None = None,
    batch_size: int = 2048,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> ActivatingSamples:
    """Score an SAE as ``evaluate`` does, and keep the samples to look at, in the same pass.

    Memory grows with the number of latents, and by 100 bytes for each sample; never with both.

    Args:
        sae: as ``evaluate`` takes it.
        features: as ``evaluate`` takes them. Row numbers are those of a feature set, or of the
            batches; or they count the samples as they come. Of a patch set, or of batches of
            patches, they are numbers of images, the rows of ``features.images``.
        count: samples of each latent in each band, if there are so many.
        normalize: as in ``evaluate``.
        batch_size: as in ``evaluate``.
        device: as in ``evaluate``.
        progress: show a progress bar (needs tqdm).

    Raises:
        TypeError, ValueError, ModuleNotFoundError: as ``evaluate``; or ``count`` is below 1.

    Source: the bands of Nasiri-Sarvi et al. 2026, section 4.1, figures 3 and 5.
    """
    require_at_least(1, count, "count")
    require_flag(progress, "progress")
    scoring = Scoring(sae, features, normalize=normalize, batch_size=batch_size, device=device)
    if scoring.samples.total is not None:
        count = max(1, min(count, scoring.samples.total))  # memory grows with it
    kept: _Kept | None = None
    for encoded in scoring.batches("Encoding", progress):
        kept = kept or _Kept(sae, encoded, count)
        kept.add(encoded)
    evaluation = scoring.evaluation()
    assert kept is not None  # evaluation() needs a sample
    means = scoring.of_images.mean_embeddings()
    top, bottom = kept.exact_bands()
    histogram, first_bin = kept.histogram()
    return ActivatingSamples(
        evaluation,
        top=top,
        middle=kept.middle(top, bottom),
        bottom=bottom,
        near_misses=kept.candidates.near_misses(means, count),
        histogram=histogram,
        first_bin=first_bin,
        class_counts=None if scoring.purity is None else scoring.purity.class_counts().cpu(),
        mean_embeddings=means.cpu(),
        mean_embedding=scoring.of_images.mean_embedding().cpu(),
        directions=kept.directions(),
        signatures=kept.signatures.compute(),
        of_rows=joined(kept.rows),
        unit_norm=scoring.scaled,
        sae=None if scoring.images is None else sae,
    )


@dataclass(frozen=True)
class KeepingScore:
    """Scores SAEs as ``evaluate`` does, and keeps the samples of some: ``compare(..., score=)``."""

    saes: Sequence[SAE]
    """The SAEs whose samples are kept."""
    count: int = 8
    """Samples of each latent in each band."""
    progress: bool = False
    """Whether to show a progress bar for each of them."""
    _found: dict[int, ActivatingSamples] = field(default_factory=dict)

    def __call__(self, sae: SAE, features: FeatureSet) -> Evaluation:
        """Return the evaluation of an SAE."""
        if not any(sae is one for one in self.saes):
            return evaluate(sae, features)
        found = activating_samples(sae, features, count=self.count, progress=self.progress)
        self._found[id(sae)] = found
        return found.evaluation

    def samples_of(self, sae: SAE) -> ActivatingSamples:
        """Return what was kept of an SAE that has been scored."""
        return self._found[id(sae)]


class _Kept:
    """What is kept of the batches that were seen."""

    def __init__(self, sae: SAE, first: Encoded, count: int) -> None:
        num_latents, device = first.latents.shape[1], first.latents.device
        self.device, self.count = device, count
        self.top, self.bottom = (Reservoir(num_latents, count, device) for _ in range(2))
        self.sample = Reservoir(num_latents, max(MIDDLE_FROM, count), device)
        self.bins = torch.zeros(num_latents * _NUM_BINS, dtype=torch.int32, device=device)
        self.candidates = Candidates(num_latents, device)
        self.signatures = Signatures(num_latents, device)
        self.contributions = Contributions(sae, num_latents, first.features[:1])
        self.rows: list[RowLatents] = []

    def add(self, encoded: Encoded) -> None:
        """Add a batch: of patches, its images."""
        of = encoded if encoded.images is None else encoded.images
        rows = (encoded.rows if encoded.images is None else encoded.images.numbers).to(self.device)
        packed = []
        for part, within, activations in _positive(of.latents):
            entries = within._replace(rows=rows[part][within.rows])
            self.top.add(entries, entries.values)
            self.bottom.add(entries, -entries.values)
            self.sample.add(entries, entries.hashes())
            packed.append(pack_active(_is_active(activations)))
            places = entries.latents * _NUM_BINS + _bins_of(entries.values)
            self.bins.index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
            self.signatures.add(rows[part], activations)
            if encoded.images is None:
                self.rows.append(self.contributions.of(within, rows[part], activations))
        if encoded.images is not None:
            for part, within, activations in _positive(encoded.images.mean):
                self.rows.append(self.contributions.of(within, rows[part], activations))
        self.candidates.add(rows, of.embeddings, torch.cat(packed))

    def exact_bands(self) -> tuple[Band, Band]:
        """Return the top and the bottom band, each with the strongest first."""
        top, bottom = (strongest_first(of.rows, of.values) for of in (self.top, self.bottom))
        return top, bottom.without(top)

    def middle(self, top: Band, bottom: Band) -> Band:
        """Return the samples around the median of each latent's sample."""
        held = strongest_first(self.sample.rows, self.sample.values)
        num_held = (held.rows >= 0).sum(1, keepdim=True)
        place = (num_held - self.count).clamp(min=0) // 2 + torch.arange(self.count)
        there, place = place < num_held, place.clamp(max=held.rows.shape[1] - 1)
        found = Band(
            held.rows.gather(1, place).where(there, torch.tensor(-1)),
            held.values.gather(1, place).where(there, torch.tensor(0.0)),
        )
        return found.without(top).without(bottom)

    def directions(self) -> Tensor | None:
        """Return the decoder directions (M, d_in)."""
        found = self.contributions.directions
        return None if found is None else found.cpu()

    def histogram(self) -> tuple[Tensor, int]:
        """Return the bins (M, b) from the first to the last that is not empty; and the first."""
        counts = self.bins.view(-1, _NUM_BINS).cpu().long()
        filled = counts.sum(0).nonzero().squeeze(1)
        if not len(filled):
            return counts[:, :0], 0
        first, last = int(filled[0]), int(filled[-1])
        return counts[:, first : last + 1], first + BINS_PER_OCTAVE * _LOWEST_OCTAVE


def _positive(
    latents: Tensor | Support,
) -> Iterator[tuple[slice, Entries, Tensor | Support]]:
    """Yield some rows at a time, their positive activations by number within them, and all."""
    if isinstance(latents, Support):
        entries = Entries(latents.columns, latents.rows, latents.values.float())
        yield slice(0, latents.num_rows), entries.where(entries.values > 0), latents
        return
    for part in row_chunks(len(latents), latents.shape[1], _ELEMENTS):
        rows, columns = (latents[part] > 0).nonzero().unbind(1)
        yield part, Entries(columns, rows, latents[part][rows, columns].float()), latents[part]


def _is_active(latents: Tensor | Support) -> Tensor:
    """Return a mask (B, M)."""
    if isinstance(latents, Tensor):
        return latents > 0
    active = torch.zeros(latents.shape, dtype=torch.bool, device=latents.device)
    active[latents.rows, latents.columns] = latents.values > 0
    return active


def _bins_of(activations: Tensor) -> Tensor:
    bins = (activations.double().log2() * BINS_PER_OCTAVE).floor().long()
    return (bins - BINS_PER_OCTAVE * _LOWEST_OCTAVE).clamp(0, _NUM_BINS - 1)

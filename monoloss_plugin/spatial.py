"""From the latents of patches to those of their images: pooling, Moran's I, and extent.

An image's map of a latent holds the latent's activation at each place of the image's grid. Only
positive activations count: others are 0 in the map. Let a_i be the map's values at the P places,
and c_i = a_i - mean a. Moran's I says whether neighbours on the grid are alike:

    I = (P / W) Σ_ij w_ij c_i c_j / Σ_i c_i²

where w_ij is 1 if the places i and j share an edge, else 0, and W = Σ_ij w_ij. I is near 1 if
active patches lie together, -1 / (P - 1) on average if the same values are shuffled over the grid,
and below that if neighbours differ. A constant map has no I.

Nearly all values of a map are 0. With S1 = Σ a_i, S2 = Σ a_i², m = S1 / P, and n_i the number of
neighbours of a place,

    Σ_ij w_ij c_i c_j = Σ_ij w_ij a_i a_j - 2 m Σ_i n_i a_i + m² W,    Σ_i c_i² = S2 - S1² / P,

so that sums over the entries that are not 0 are enough.

Source: Moran 1950, "Notes on continuous stochastic phenomena", with rook contiguity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_rows, as_tensor, require_finite
from monoloss_plugin.batch import Batch
from monoloss_plugin.groups import Segments
from monoloss_plugin.kernels.support import Support, support_of
from monoloss_plugin.streaming import StreamingMetric


@dataclass(frozen=True)
class ImagesOfBatch:
    """The I images whose B samples are in a batch."""

    numbers: Tensor
    """(I,) int64, ascending, on the CPU: the images' numbers."""
    of_sample: Tensor
    """(B,) int64: which of them each sample is of."""
    sizes: Tensor
    """(I,) int64: the number of each image's samples."""

    @classmethod
    def of(cls, images: Tensor, device: torch.device) -> ImagesOfBatch:
        """Return the images of samples (B,), for computations on a device.

        Raises:
            TypeError: not integers.
            ValueError: not of one dimension.
        """
        given = as_labels(images, "images")
        if given.ndim != 1:
            raise ValueError(f"images: expected (B,), got {tuple(given.shape)}")
        numbers, of_sample, sizes = given.cpu().unique(return_inverse=True, return_counts=True)
        return cls(numbers.long(), of_sample.to(device), sizes.to(device))

    def __len__(self) -> int:
        return len(self.numbers)

    def values_of(self, of_samples: Tensor, name: str) -> Tensor:
        """Return what all samples of an image have in common: (B, ...) as (I, ...).

        Raises:
            ValueError: two samples of an image differ, or there are not B.
        """
        given = self._checked(of_samples, name)
        first = self.of_sample.new_full((len(self),), len(given)).scatter_reduce_(
            0, self.of_sample, torch.arange(len(given), device=given.device), "amin"
        )
        values = given[first]
        if not torch.equal(values[self.of_sample], given):
            raise ValueError(f"{name}: expected the same for all samples of an image")
        return values

    def means(self, of_samples: Tensor, name: str) -> Tensor:
        """Return the mean of each image's rows: (B, d) as (I, d), in the dtype that came.

        Raises:
            ValueError: there are not B rows.
        """
        of_samples = self._checked(of_samples, name)
        sums = of_samples.new_zeros((len(self), of_samples.shape[1]), dtype=torch.float64)
        sums.index_add_(0, self.of_sample, of_samples.double())
        return (sums / self.sizes.unsqueeze(1)).to(of_samples.dtype)

    def _checked(self, of_samples: Tensor, name: str) -> Tensor:
        if len(of_samples) != len(self.of_sample):
            raise ValueError(
                f"{name}: expected {len(self.of_sample)} to match images, got {len(of_samples)}"
            )
        return of_samples.to(self.of_sample.device)


def image_means(batch: Batch, of_samples: Tensor) -> Tensor:
    """Return the mean of each image's rows of (B, d), in ascending order of images.

    If samples are no patches, it is ``of_samples`` itself.
    """
    if batch.images is None:
        return of_samples
    return ImagesOfBatch.of(batch.images, of_samples.device).means(of_samples, "features")


class Pooled(NamedTuple):
    """Activations of I images, from those of their samples."""

    largest: Support
    """(I, M): the largest activation of the image's samples."""
    mean: Support
    """(I, M): the mean of the activations of the image's samples."""


@torch.no_grad()
def pool(latents: Tensor | Support, images: ImagesOfBatch) -> Pooled:
    """Return the activations of images. Only positive activations of samples count.

    Args:
        latents: (B, M), dense, sparse COO, or their support. Memory grows with the number of
            entries that are not 0.
        images: of the B samples.
    """
    a = _positive(latents)
    segments = Segments.of(a, images.of_sample)
    values = a.values.index_select(0, segments.order)
    largest = values.new_zeros(len(segments.counts))
    largest.scatter_reduce_(0, segments.of_entries, values, "amax")
    sums = _sums(values, segments.of_entries, len(segments.counts))
    mean = (sums / images.sizes[segments.groups]).to(torch.promote_types(a.dtype, torch.float32))
    shape = len(images), a.num_latents
    pooled = Support.of(segments.groups, segments.columns, largest, shape)
    return Pooled(pooled, replace(pooled, values=mean))


class Maps(NamedTuple):
    """The n maps, each of one latent over one image, that have an active patch."""

    latents: Tensor
    """(n,) int64: the latent."""
    images: Tensor
    """(n,) int64: which of the batch's images."""
    extent: Tensor
    """(n,) float64, in (0, 1]: the share of the image's patches that are active."""
    moran: Tensor
    """(n,) float64: Moran's I; NaN for a constant map, or if patches of the grid are missing."""


@torch.no_grad()
def maps_of(
    latents: Tensor | Support,
    images: ImagesOfBatch,
    places: Tensor | None = None,
    grids: Tensor | None = None,
) -> Maps:
    """Return extent and Moran's I of every map that has an active patch.

    Args:
        latents: as :func:`pool` takes them.
        images: of the B samples.
        places: (B,) integer: each patch's place in its image's grid, row after row; -1 for a class
            token, which is left out. Without places, every sample is a patch.
        grids: (B, 2) integer: the height and width of the grid of each sample's image, in patches.
            Without grids or places, there is no Moran's I.

    Raises:
        TypeError: places or grids are not integers.
        ValueError: shapes that do not match, a place outside the grid, or an image with two grids.
    """
    a, of_sample = _positive(latents), images.of_sample
    if places is None:
        grids, place = None, torch.zeros_like(of_sample)
    else:
        place = as_labels(places, "places").to(of_sample.device).long()
        if place.shape != of_sample.shape:
            raise ValueError(
                f"places: expected shape {tuple(of_sample.shape)} as images, got "
                f"{tuple(place.shape)}"
            )
    grid = _Grids.of(images, place, grids)
    listed = place[a.rows] >= 0
    rows, columns, values = a.rows[listed], a.columns[listed], a.values[listed].double()
    image, place = of_sample[rows], place[rows]
    stride = int(place.max()) + 1 if len(place) else 1
    keys, order = ((columns * len(images) + image) * stride + place).sort()
    pairs, of_entry, counts = keys.div(stride, rounding_mode="floor").unique_consecutive(
        return_inverse=True, return_counts=True
    )
    latent_of_pair = pairs.div(max(1, len(images)), rounding_mode="floor")
    image_of_pair = pairs - latent_of_pair * len(images)
    extent = counts / grid.patches[image_of_pair].double()
    moran = _moran(values[order], keys, place[order], of_entry, counts, grid.at(image_of_pair))
    return Maps(latent_of_pair, image_of_pair, extent, moran)


class _Grids(NamedTuple):
    """The grids of I images, or of the images of n maps."""

    height: Tensor
    width: Tensor
    patches: Tensor
    """How many patches there are: samples with a place of 0 or above."""
    whole: Tensor
    """Whether there is one patch for each place of the grid."""

    @classmethod
    def of(cls, images: ImagesOfBatch, place: Tensor, grids: Tensor | None) -> _Grids:
        known = place >= 0
        patches = images.of_sample[known].bincount(minlength=len(images))
        if grids is None:
            none = torch.zeros_like(patches)
            return cls(none, none, patches, none.bool())
        given = as_labels(grids, "grids").to(place.device).long()
        if given.shape != (len(place), 2):
            raise ValueError(f"grids: expected ({len(place)}, 2), got {tuple(given.shape)}")
        if bool((given < 1).any()):
            raise ValueError("grids: expected a height and a width of at least 1")
        height, width = images.values_of(given, "grids").unbind(1)
        area = height * width
        if bool((place >= area[images.of_sample]).any()):
            raise ValueError("places: expected places below height x width of the image's grid")
        first = area.cumsum(0) - area
        filled = torch.zeros(int(area.sum()), dtype=torch.bool, device=place.device)
        filled[(first[images.of_sample] + place)[known]] = True
        of_place = torch.arange(len(images), device=place.device).repeat_interleave(area)
        distinct = of_place[filled].bincount(minlength=len(images))
        return cls(height, width, patches, (patches == area) & (distinct == area))

    def at(self, images: Tensor) -> _Grids:
        return _Grids(*(of_image[images] for of_image in self))


def _moran(
    values: Tensor, keys: Tensor, place: Tensor, of_map: Tensor, counts: Tensor, grid: _Grids
) -> Tensor:
    """Return Moran's I of n maps (n,), from their E entries, sorted by map and place.

    Args:
        values: (E,) float64.
        keys: (E,) ascending: the place, plus a number that is the same for all places of a map.
        place: (E,).
        of_map: (E,): each entry's map.
        counts: (n,): the number of entries of each map.
        grid: of the n maps.
    """
    num_maps, area = len(counts), grid.height * grid.width
    # I stays the same if all values are shifted. A map without zeros gets one, so that the sums
    # below do not cancel.
    lowest = torch.full_like(counts, torch.inf, dtype=torch.float64)
    lowest.scatter_reduce_(0, of_map, values, "amin")
    a = values - lowest.masked_fill(counts < area, 0.0)[of_map]
    height, width = grid.height[of_map], grid.width[of_map].clamp(min=1)
    row = place.div(width, rounding_mode="floor")
    column = place - row * width
    has_right, has_below = column < width - 1, row < height - 1
    beside = torch.zeros_like(a)
    for step, exists in ((torch.ones_like(width), has_right), (width, has_below)):
        at = torch.searchsorted(keys, keys + step).clamp(max=max(0, len(keys) - 1))
        beside += torch.where(exists & (keys[at] == keys + step), a[at], 0.0)
    neighbours = has_right.double() + has_below.double() + (row > 0) + (column > 0)
    s1, s2, of_neighbours, products = (
        _sums(of, of_map, num_maps) for of in (a, a.square(), neighbours * a, a * beside)
    )
    mean = s1 / area
    weight = 2 * (grid.height * (grid.width - 1) + grid.width * (grid.height - 1)).double()
    covariance = 2 * products - 2 * mean * of_neighbours + mean.square() * weight
    variance = s2 - s1 * mean
    found = area / weight * covariance / variance
    return found.masked_fill(~(grid.whole & (variance > 0)), torch.nan)


class SpatialResult(NamedTuple):
    """How each latent lies on the images, in float64."""

    coherence: Tensor
    """(M,): Moran's I, mean over the images where it is defined; NaN if there are none."""
    extent: Tensor
    """(M,), in (0, 1]: the share of an image's patches that are active, mean over the images with
    an active patch; NaN if there are none."""


class SpatialSums(NamedTuple):
    """Sums over images. Updates change the tensor in place."""

    sums: Tensor
    """(4, M) float64: the images with an active patch, their extents, the images with a Moran's I,
    and their Moran's I."""

    @property
    def shape(self) -> tuple[int, int]:
        """(4, M)."""
        return self.sums.shape[0], self.sums.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        return self._asdict()


_NUM_SUMS = 4


class Spatial(StreamingMetric[SpatialSums]):
    """Coherence and extent of every latent on the grids of images, in one pass.

    The memory is 32 bytes for each latent. All samples of an image must come in one update.

    Examples:
        >>> metric = Spatial()
        >>> grid = torch.tensor([[2, 2]]).repeat(4, 1)
        >>> top_row = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
        >>> metric.update(top_row, torch.zeros(4).long(), torch.arange(4), grid)
        >>> metric.compute().extent
        tensor([0.5000], dtype=torch.float64)

    Source: Moran 1950; see :mod:`monoloss_plugin.spatial`.
    """

    REDUCED_BY: ClassVar = {"sums": "sum"}
    SIZES = "numbers of sums and latents"
    SIZED_BY = "sums"

    @torch.inference_mode(False)  # or the sums could not be updated outside it
    def _zeros(self, shape: tuple[int, int], device: torch.device) -> SpatialSums:
        return SpatialSums(torch.zeros(shape, dtype=torch.float64, device=device))

    def _check_sizes(self, shape: tuple[int, ...], argument: str) -> None:
        if shape[0] != _NUM_SUMS:
            raise ValueError(f"{argument}: expected {_NUM_SUMS} sums, got {shape[0]}")

    def update(
        self,
        latents: Tensor | Support,
        images: Tensor | ImagesOfBatch,
        places: Tensor | None = None,
        grids: Tensor | None = None,
    ) -> None:
        """Add a batch of whole images.

        Args:
            latents: (B, M), floating, finite; dense, sparse COO, or a ``Support``. Only positive
                activations count.
            images: (B,) integer: the image of each sample.
            places: (B,) integer, as :func:`maps_of` takes them.
            grids: (B, 2) integer, as :func:`maps_of` takes them.

        Raises:
            TypeError: latents not floating; images, places or grids not integer.
            ValueError: shapes that do not match each other or earlier batches, NaN or infinite
                values, or as :func:`maps_of`; the metric is then unchanged.
        """
        a = latents
        if not isinstance(a, Support):
            a = as_rows(as_tensor(a, "latents"), "latents", keep_sparse=True)
        of = images if isinstance(images, ImagesOfBatch) else ImagesOfBatch.of(images, a.device)
        if len(of.of_sample) != a.shape[0]:
            raise ValueError(
                f"images: expected {a.shape[0]} to match latents, got {len(of.of_sample)}"
            )
        state = self._own((_NUM_SUMS, a.shape[1]), a.device)
        if a.shape[1] != state.shape[1]:
            raise ValueError(
                f"latents: expected width {state.shape[1]} as in earlier batches, got {a.shape[1]}"
            )
        entries = a if isinstance(a, Support) else support_of(a)
        require_finite(entries.values, "latents")
        found = maps_of(entries, of, places, grids)
        mapped = ~found.moran.isnan()
        for row, added in enumerate(
            (torch.ones_like(found.extent), found.extent, mapped, found.moran.nan_to_num())
        ):
            state.sums[row].index_add_(0, found.latents, added.double())
        self._keep(state)

    def compute(self) -> SpatialResult:
        """Return coherence and extent over everything seen so far.

        Raises:
            ValueError: no data yet.
        """
        images, extents, mapped, moran = self._seen().sums
        return SpatialResult(coherence=moran / mapped, extent=extents / images)


def _positive(latents: Tensor | Support) -> Support:
    """Return the positive entries of latents (B, M)."""
    a = latents if isinstance(latents, Support) else support_of(latents.detach())
    values = a.values.detach()
    kept = values > 0
    return Support.of(a.rows[kept], a.columns[kept], values[kept], a.shape)


def _sums(values: Tensor, of_entry: Tensor, groups: int) -> Tensor:
    """Return the sums of values (E,) over groups of entries (groups,), in float64."""
    zeros = values.new_zeros(groups, dtype=torch.float64)
    return zeros.index_add_(0, of_entry, values.double())

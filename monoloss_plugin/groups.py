"""Groups of samples whose pairs are left out, such as the patches of one image.

Two patches of an image are alike because they are of one image, which says nothing about a latent
that is active on both. The score and the loss are then over pairs of samples of different groups:

    MS = Σ ã_i ã_j h_i·h_j / Σ ã_i ã_j,    over i and j of different groups.

With the sums over the samples j of the group of i, i itself included,

    A_i = Σ ã_j      Z_i = Σ ã_j h_i·h_j      v = Σ ã_i A_i      t = Σ ã_i Z_i

it is (||w||² - t) / (u² - v) again, and its gradient has A_i in place of ã_i, and Z_i in place of
ã_i ||h_i||². If each sample is a group of its own, these are what they replace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monoloss_plugin._checks import as_labels
from monoloss_plugin.kernels.support import Support, bags, products_at


def as_groups(groups: Any, num_rows: int) -> Tensor:
    """Return the groups of N samples, any integers, as numbers below N (N,) int64, in their order.

    Raises:
        TypeError: they are not integers.
        ValueError: not one for each sample.
    """
    given = as_labels(groups, "groups").flatten()
    if len(given) != num_rows:
        raise ValueError(
            f"groups: expected {num_rows}, one for each of the latents' rows, got {len(given)}"
        )
    # Without torch.unique, whose result has a size that an accelerator would have to tell.
    ordered, order = given.sort(stable=True)
    number = F.pad(ordered.diff() != 0, (1, 0)).cumsum(0)[:num_rows]
    return torch.empty_like(number).index_copy_(0, order, number)


def summed_within(values: Tensor, groups: Tensor) -> Tensor:
    """Return, for each sample, the sum of ``values`` (N, ...) over its group."""
    return torch.zeros_like(values).index_add_(0, groups, values).index_select(0, groups)


def similarities_within(h: Tensor, groups: Tensor) -> Tensor:
    """Return the products h_i·h_j of samples of one group, and 0 for others, (N, N)."""
    return (h @ h.T).masked_fill_(groups.unsqueeze(1) != groups, 0.0)


class Segments(NamedTuple):
    """The entries of sparse latents, put together where latent and group are the same."""

    order: Tensor
    """(E,): the entries, segment after segment."""
    of_entries: Tensor
    """(E,): the segment of each entry, in that order."""
    counts: Tensor
    """(S,): the number of entries of each segment."""
    columns: Tensor
    """(S,), ascending: the latent of each segment."""
    groups: Tensor
    """(S,): the group of each segment."""

    @classmethod
    def of(cls, support: Support, groups: Tensor) -> Segments:
        """Return the segments of latents (N, M) and groups (N,) below N."""
        keys = support.columns * support.num_rows + groups.index_select(0, support.rows)
        keys, order = keys.sort(stable=True)
        found, segment, counts = keys.unique_consecutive(return_inverse=True, return_counts=True)
        columns = found.div(support.num_rows, rounding_mode="floor")
        return cls(order, segment, counts, columns, found - columns * support.num_rows)

    def sums(self, of_entries: Tensor) -> Tensor:
        """Return the sum of ``of_entries`` (E,), in the order of segments, over each (S,)."""
        zeros = of_entries.new_zeros(len(self.counts))
        return zeros.index_add(0, self.of_entries, of_entries)

    def shared(self) -> tuple[Tensor, Tensor]:
        """Return which entries (E',) are in segments of several, and where each of these starts.

        Patches of many images, well shuffled, have few.
        """
        shared = self.counts > 1
        entries = shared.index_select(0, self.of_entries).nonzero().squeeze(1)
        return entries, F.pad(self.counts[shared].cumsum(0), (1, 0))

    def shared_sums(self, a: Tensor, rows: Tensor, h: Tensor) -> Tensor:
        """Return Σ ã h of each segment of several entries (S', d).

        Args:
            a: (E,), in the order of segments.
            rows: (E,), the sample of each entry, in the same order.
            h: (N, d)
        """
        entries, offsets = self.shared()
        if not len(entries):
            return h[:0]
        return bags(rows.index_select(0, entries), offsets, a.index_select(0, entries), h)


def within_sums(support: Support, a: Tensor, h: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return v = Σ ã A and t = Σ ã Z of sparse latents, each (M,).

    Args:
        support: the entries of latents (N, M).
        a: (E,), ã of each entry.
        h: (N, d) unit embeddings.
        groups: (N,), below N.
    """
    segments = Segments.of(support, groups)
    a, rows = a.index_select(0, segments.order), support.rows.index_select(0, segments.order)
    weight = segments.sums(a)
    similarity = segments.sums(a.square() * h.square().sum(1).index_select(0, rows))
    sums = segments.shared_sums(a, rows, h)
    similarity[segments.counts > 1] = sums.square().sum(1)  # Σ ã Z of a segment is ||Σ ã h||²

    def of_latents(of_segments: Tensor) -> Tensor:
        zeros = a.new_zeros(support.num_latents, dtype=torch.float64)
        return zeros.index_add_(0, segments.columns, of_segments.double()).to(a.dtype)

    return of_latents(weight.square()), of_latents(similarity)


def within_entries(support: Support, a: Tensor, h: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and Z of sparse latents, for each entry; arguments as :func:`within_sums`."""
    segments = Segments.of(support, groups)
    a, rows = a.index_select(0, segments.order), support.rows.index_select(0, segments.order)
    weight = segments.sums(a).index_select(0, segments.of_entries)
    similarity = a * h.square().sum(1).index_select(0, rows)
    shared, offsets = segments.shared()
    if len(shared):
        sums = segments.shared_sums(a, rows, h)
        products = products_at(rows.index_select(0, shared), offsets, sums, h)
        similarity.index_copy_(0, shared, products)
    in_order, order = torch.empty_like(a), segments.order
    return in_order.index_copy(0, order, weight), in_order.index_copy(0, order, similarity)


def active_means(support: Support, features: Tensor, groups: Tensor) -> tuple[Support, Tensor]:
    """Return each group as one sample of each latent that it activates, with features of its own.

    A sample's activation is the sum over the group, and its features are the mean over the samples
    of the group that activate the latent. So samples differ between latents: each has one entry.

    Args:
        support: the entries of latents (N, M), at least 0; differentiable.
        features: (N, d).
        groups: (N,), below N.

    Returns:
        The entries of (S + 1, M) latents, and features (S + 1, d). The last sample is zero: a
        latent that alone has entries would otherwise be active on every sample.
    """
    order, _, counts, columns, _ = segments = Segments.of(support, groups)
    values, rows = support.values.index_select(0, order), support.rows.index_select(0, order)
    active = (values.detach() > 0).to(features.dtype)
    sums = bags(rows, F.pad(counts.cumsum(0), (1, 0)), active, features)
    means = sums / segments.sums(active).clamp(min=1).unsqueeze(1)
    number = torch.arange(len(columns), device=columns.device)
    shape = len(columns) + 1, support.num_latents
    samples = Support.of(number, columns, segments.sums(values), shape)
    return samples, F.pad(means, (0, 0, 0, 1))

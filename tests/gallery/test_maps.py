"""Latents of patches: the images that activate them, and where."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from monoloss_plugin import Batch, show_latents, top_images
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.gallery import ActivatingSamples, activating_samples, heat_maps
from monoloss_plugin.gallery.maps import NOT_HELD, view_patches
from monoloss_plugin.gallery.show import best_latents
from tests.features.test_patches import GRIDS, IDS, PLACES, dataset_of, images

LATENTS = 12


class DenseSAE:
    """Random directions and a ReLU."""

    def __init__(self, width: int, threshold: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(LATENTS, width, generator=generator)
        self.weight[3] = 0.0  # never active
        self.threshold = threshold

    def encode(self, x: Tensor) -> Tensor:
        return (x.float() @ self.weight.T - self.threshold).relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ (self.weight / 50) + 0.25


class SparseSAE(DenseSAE):
    """The same latents, as a sparse tensor."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x).to_sparse()

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.to_dense())


RAGGED = FeatureSet(dataset_of())
"""Images of different grids, one with a class token, one without all of its patches."""


def photographs(count: int = 40, grid: tuple[int, int] = (3, 4), width: int = 6) -> FeatureSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, grid[0] * grid[1], width, generator=generator)
    x = x + torch.randn(count, 1, width, generator=generator)
    ids = [f"{n}.png" for n in range(count)]
    said = {"encoder": {"preprocessing": {"size": 64, "resize_mode": "shortest"}}}
    labels = torch.arange(count) % 3
    return FeatureSet.from_tensors(x, labels, ids, grid=grid, record=said)


@pytest.mark.parametrize("make", [DenseSAE, SparseSAE])
@pytest.mark.parametrize("batch_size", [1, 9, 2048])
def test_a_map_holds_the_activations_of_the_images_patches(
    make: Callable[[int], DenseSAE], batch_size: int
) -> None:
    sae = make(RAGGED.width)
    pairs = [(k, n) for n in (6, 0, 2, 1) for k in (5, 0, 5)]
    found = heat_maps(
        *(sae, RAGGED, [k for k, _ in pairs], [n for _, n in pairs]),
        normalize=False,
        batch_size=batch_size,
    )
    for (k, n), one in zip(pairs, found, strict=True):
        height, width = GRIDS[n]
        assert (tuple(one.shape), one.dtype) == ((height, width), torch.float32)
        expected = {
            place: float(images()[n][at].float() @ sae.weight[k])
            for at, place in enumerate(PLACES[n])
        }
        for place in range(height * width):
            value = float(one[place // width, place % width])
            if place in expected:
                assert value == pytest.approx(max(0.0, expected[place]), abs=1e-5)
            else:
                assert np.isnan(value)


def test_only_the_images_that_are_needed_are_encoded() -> None:
    seen = []

    class Counting(DenseSAE):
        def encode(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().encode(x)

    heat_maps(Counting(RAGGED.width), RAGGED, [1, 2], [3, 3])
    assert sum(seen) == len(PLACES[3])


def test_features_are_scaled_as_evaluate_scales_them() -> None:
    sae = DenseSAE(RAGGED.width)
    scaled = heat_maps(sae, RAGGED, [1], [3])[0]
    unit = torch.nn.functional.normalize(images()[3].float(), dim=1)
    assert scaled.flatten().tolist() == pytest.approx(sae.encode(unit)[:, 1].tolist(), abs=1e-6)


def test_the_strongest_latents_of_every_place() -> None:
    sae = DenseSAE(RAGGED.width)
    wanted = [2, 0, 5]
    found = view_patches(sae, RAGGED, [], [], also=wanted, count=3, normalize=False).strongest
    for n, one in zip(wanted, found, strict=True):
        height, width = GRIDS[n]
        assert one.latents.shape == one.values.shape == (height, width, 3)
        for place in range(height * width):
            here = one.latents[place // width, place % width].tolist()
            if place not in PLACES[n]:
                assert here == [NOT_HELD] * 3
                assert one.values[place // width, place % width].isnan().all()
                continue
            activations = sae.encode(images()[n])[PLACES[n].index(place)].tolist()
            ranking = sorted(range(LATENTS), key=lambda k: -activations[k])[:3]
            assert here == [k if activations[k] > 0 else -1 for k in ranking]
            values = one.values[place // width, place % width].tolist()
            assert values == pytest.approx([max(0.0, activations[k]) for k in ranking], abs=1e-5)


def test_an_sae_of_fewer_latents_leaves_the_other_ranks_empty() -> None:
    sae = DenseSAE(6)
    sae.weight = sae.weight[:2]
    (strongest,) = view_patches(sae, photographs(2), [], [], also=[1], count=4).strongest
    assert strongest.latents.shape == strongest.values.shape == (3, 4, 4)
    assert (strongest.latents[..., 2:] == -1).all()
    assert (strongest.values[..., 2:] == 0).all()
    assert (strongest.latents[..., :2] >= 0).any()


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"features": FeatureSet.from_tensors(torch.eye(5))}, ValueError, "expected a patch set"),
        ({"features": torch.eye(5)}, TypeError, "features: expected a FeatureSet"),
        ({"latents": [1, 2]}, ValueError, "images: expected 2, one for each of the latents, got 1"),
        ({"latents": [LATENTS]}, ValueError, "latents: expected 0 to 11, got 12"),
        ({"latents": [0.5]}, TypeError, "latents: expected integers"),
        ({"images": [7]}, IndexError, "images: expected 0 to 6, got 7"),
        ({"images": [-1]}, IndexError, "images: expected 0 to 6, got -1"),
        ({"sae": 3}, TypeError, "sae"),
    ],
)
def test_wrong_arguments(wrong: dict, error: type[Exception], said: str) -> None:
    right = {"sae": DenseSAE(5), "features": RAGGED, "latents": [0], "images": [0]}
    with pytest.raises(error, match=re.escape(said)):
        heat_maps(**{**right, **wrong})


def largest_by_definition(sae: DenseSAE, features: FeatureSet) -> Tensor:
    """The largest activation (N, M) of each image's patches."""
    activations = sae.encode(features.tensor())
    assert features.patches is not None
    return torch.stack(
        [part.amax(0) for part in activations.split(features.patches.starts.diff().tolist())]
    )


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("batch_size", [12, 100, 2048])
def test_samples_of_patches_are_images_by_their_largest_patch(
    threshold: float, batch_size: int
) -> None:
    features, sae = photographs(), DenseSAE(6, threshold)
    found = activating_samples(sae, features, count=4, normalize=False, batch_size=batch_size)
    largest = largest_by_definition(sae, features)
    # The same images and activations, as samples that are no patches.
    again = activating_samples(
        *(Identity(), [Batch(largest, features.images.tensor())]), count=4, normalize=False
    )
    for name, band in again.bands.items():
        assert torch.equal(found.bands[name].rows, band.rows), name
        torch.testing.assert_close(found.bands[name].values, band.values)
    assert torch.equal(found.histogram, again.histogram)
    torch.testing.assert_close(found.mean_embeddings, again.mean_embeddings)
    torch.testing.assert_close(found.signatures, again.signatures, atol=1e-4, rtol=1e-4)
    assert found.class_counts is not None
    labels = features.images.labels
    expected = [(largest[labels == c] > 0).sum(0).tolist() for c in range(3)]
    assert found.class_counts.tolist() == expected


class Identity:
    def encode(self, x: Tensor) -> Tensor:
        return x.relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def test_the_view_from_an_image_is_its_share_of_the_mean_reconstruction() -> None:
    features, sae = photographs(), DenseSAE(6, 1.0)
    found = activating_samples(sae, features, normalize=False, batch_size=50).of_rows
    mean = sae.encode(features.tensor()).view(40, 12, LATENTS).mean(1)
    directions = sae.weight / 50
    assert found.rows.tolist() == list(range(40))
    for n in range(40):
        whole = mean[n] @ directions
        for k, share in zip(found.latents[n].tolist(), found.shares[n].tolist(), strict=True):
            if k >= 0:
                expected = mean[n, k] * directions[k] @ whole / (whole @ whole)
                assert share == pytest.approx(float(expected), abs=1e-4)
        assert float(found.shares[n].nansum()) == pytest.approx(1, abs=1e-4)


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), "uint8")


@pytest.fixture(scope="module")
def found() -> ActivatingSamples:
    return activating_samples(DenseSAE(6), photographs(), normalize=False)


def test_top_images_of_patches_have_the_ids_of_images(found: ActivatingSamples) -> None:
    largest = largest_by_definition(DenseSAE(6), photographs())
    (images_of,) = top_images(found, photographs(), [5], count=3).values()
    values, rows = largest[:, 5].topk(3)
    assert [one.row for one in images_of] == rows.tolist()
    assert [one.image_id for one in images_of] == [f"{n}.png" for n in rows.tolist()]
    assert [one.activation for one in images_of] == pytest.approx(values.tolist())


def test_a_notebook_shows_a_map_and_a_frame_over_each_image(found: ActivatingSamples) -> None:
    features = photographs()
    grid = show_latents(found, features, PIXELS, latents=[5, 0], count=3)
    html = grid._repr_html_()
    shown = [one for latent in grid.latents for of in latent.bands.values() for one in of]
    mapped = [one for one in shown if one.overlay is not None]
    assert len(mapped) == html.count("<svg") > 6
    assert html.count('class="frame"') == len(mapped)
    for latent, number in zip(grid.latents, (5, 0), strict=True):
        assert latent.largest == pytest.approx(float(found.top.values[number, 0]))
        assert not any(one.overlay for one in latent.bands["near misses"])
        for one in latent.bands["top"]:
            row = int(one.image_id.removesuffix(".png"))
            assert one.overlay is not None
            expected = heat_maps(DenseSAE(6), features, [number], [row], normalize=False)[0]
            assert torch.equal(one.overlay.values, expected)
            place = int(expected.argmax())
            at = f"row {place // 4 + 1}, column {place % 4 + 1} of 3 x 4"
            words = f"{one.image_id}: activation {one.value:.3g}, strongest at {at}"
            assert f'aria-label="{words}"' in html
            assert one.overlay.part == pytest.approx((0.125, 0, 0.75, 1))  # a square of 64 x 48
    assert "activation of a patch: 0 <b" in html
    assert "does not say which part" not in html


def test_the_figure_draws_the_maps(found: ActivatingSamples) -> None:
    grid = show_latents(found, photographs(), PIXELS, latents=[5], count=2, bands=["top"])
    figure = grid.figure()
    axes = [one for one in figure.axes if len(one.images) == 2 and one.patches]
    assert len(axes) == 2
    for one, image in zip(axes, grid.latents[0].bands["top"], strict=True):
        assert image.overlay is not None
        drawn = one.images[1]
        assert drawn.get_array().tolist() == image.overlay.colours().tolist()
        assert drawn.get_extent() == pytest.approx([7.5, 55.5, 47.5, -0.5])
        frame = one.patches[-1]
        place = image.overlay.strongest()
        assert place is not None
        assert frame.get_xy() == pytest.approx((7.5 + 12 * place.column, -0.5 + 16 * place.row))
    figure.canvas.draw()


def test_images_without_all_patches_are_striped_and_their_maps_lie_over_the_whole() -> None:
    sae = DenseSAE(5)
    pixels = PIXELS[:7]
    grid = show_latents(sae, RAGGED, pixels, latents=[0, 5], bands=["top"])
    html = grid._repr_html_()
    assert "the maps lie over whole images" in html
    of = [one for latent in grid.latents for one in latent.bands["top"] if one.image_id == IDS[2]]
    assert of
    assert all(one.overlay is not None and len(one.overlay.unknown()) == 2 for one in of)
    assert html.count('class="stripes"') == len(of)
    assert grid.figure().axes


def test_a_latent_of_a_class_token_has_a_dark_map_without_a_frame() -> None:
    class ClassTokenSAE(DenseSAE):
        def encode(self, x: Tensor) -> Tensor:
            return (torch.nn.functional.normalize(x.float(), dim=1) @ self.weight.T - 0.99).relu()

    sae = ClassTokenSAE(5)
    sae.weight = torch.nn.functional.normalize(images()[0][:1].float(), dim=1).expand(LATENTS, 5)
    assert PLACES[0][0] == -1
    grid = show_latents(sae, RAGGED, PIXELS[:7], latents=[0], bands=["top"])
    (image,) = grid.latents[0].bands["top"]
    assert image.image_id == IDS[0]
    assert image.overlay is not None
    assert image.overlay.values.tolist() == [[0.0] * 3] * 2
    html = grid._repr_html_()
    assert "at no place of 2 x 3" in html
    assert 'class="frame"' not in html
    figure = grid.figure()
    figure.canvas.draw()
    drawn = [one for axes in figure.axes for one in axes.patches]
    assert all(one.get_fill() for one in drawn)  # frames are not filled


def test_latents_of_patches_are_sorted_by_measures_of_images_too(found: ActivatingSamples) -> None:
    table = found.evaluation.latents()
    candidates = table[table["significant"]] if table["significant"].any() else table
    for by in ("images_max_adjusted", "images_mean_adjusted", "coherence", "extent", "adjusted"):
        ranked = candidates.sort_values(by, ascending=False, kind="stable").index[:4].tolist()
        assert best_latents(found.evaluation, 4, by) == ranked
    plain = activating_samples(Identity(), torch.rand(5, 4))
    with pytest.raises(ValueError, match="by: 'extent' needs features of patches"):
        best_latents(plain.evaluation, 3, "extent")
    with pytest.raises(ValueError, match="by: expected one of"):
        show_latents(plain, FeatureSet.from_tensors(torch.rand(5, 4)), PIXELS[:5], by="extent")

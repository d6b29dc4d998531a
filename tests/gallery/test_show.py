from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.digits import digit_images
from monoloss_plugin.figures import describe
from monoloss_plugin.gallery.samples import activating_samples
from monoloss_plugin.gallery.show import (
    ActivatingImage,
    best_latents,
    show_latents,
    top_images,
)

SAE = load_pretrained("digits").sae
HELD_OUT = load_features("digits", "held_out")
FOUND = activating_samples(SAE, HELD_OUT)


def activations() -> Tensor:
    x = torch.nn.functional.normalize(HELD_OUT.tensor().float(), dim=1)
    return SAE.encode(x).detach()


def test_top_images_are_those_of_the_largest_activations() -> None:
    found = top_images(SAE, HELD_OUT, [7, 24], count=3)
    ids = HELD_OUT.ids_of(torch.arange(len(HELD_OUT)))
    assert ids is not None
    for latent, images in found.items():
        values, rows = activations()[:, latent].topk(3)
        assert [image.row for image in images] == rows.tolist()
        assert [image.image_id for image in images] == [ids[row] for row in rows.tolist()]
        assert [image.activation for image in images] == pytest.approx(values.tolist())
    assert list(found) == [7, 24]


def test_top_images_of_every_active_latent_without_ids() -> None:
    features = FeatureSet.from_tensors(torch.eye(3))
    found = top_images(Identity(), features, count=2)
    assert found == {k: [ActivatingImage(str(k), 1.0, k)] for k in range(3)}


class Identity:
    def encode(self, x: Tensor) -> Tensor:
        return x.relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def test_the_best_latents_are_the_largest_of_those_above_chance() -> None:
    table = FOUND.evaluation.latents()
    for by in ("adjusted", "score", "purity", "purity_adjusted", "support", "largest"):
        tested = table[table["significant"]].sort_values(by, ascending=False, kind="stable")
        assert best_latents(FOUND.evaluation, 9, by) == tested.index[:9].tolist()
    assert len(best_latents(FOUND.evaluation, 1000)) == int(table["significant"].sum())


def test_without_significant_latents_those_with_a_score_are_shown() -> None:
    few = evaluate(Identity(), torch.rand(3, 3) + 0.1)
    assert not few.monoscore.significant().any()
    assert len(best_latents(few, 5)) == 3


def test_the_grid_shows_the_images_of_each_band() -> None:
    grid = show_latents(FOUND, HELD_OUT, latents=[24, 7], count=5)
    assert [latent.title.partition(":")[0] for latent in grid.latents] == ["Latent 24", "Latent 7"]
    assert grid.pixelated
    pixels = (digit_images(HELD_OUT) * 255).round().byte()
    for latent, number in zip(grid.latents, [24, 7], strict=True):
        assert list(latent.bands) == ["top", "middle", "bottom", "near misses"]
        for name, images in latent.bands.items():
            rows = [row for row in FOUND.bands[name].rows[number].tolist() if row >= 0][:5]
            assert [image.image_id for image in images] == HELD_OUT.ids_of(
                torch.tensor(rows).long()
            )
            for image, row in zip(images, rows, strict=True):
                assert decoded(image.thumbnail)[:, :, 0].tolist() == pixels[row].tolist()


def decoded(thumbnail: bytes) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(thumbnail)).convert("RGB"))


def test_a_notebook_shows_it_with_alternative_texts() -> None:
    grid = show_latents(FOUND, HELD_OUT, top=2, count=3, bands=["top"])
    html = grid._repr_html_()
    assert html.count("<img") == 6
    assert re.findall(r'alt="([^"]*)"', html) == [
        image.image_id for latent in grid.latents for image in latent.bands["top"]
    ]
    assert 'class="monoloss-grid pixelated"' in html
    assert repr(grid) == "LatentGrid of 2 latents"


def test_ids_and_images_that_cannot_be_read_stay_texts(tmp_path) -> None:
    ids = ["<b>a</b>", '"onerror="x', "c"]
    features = FeatureSet.from_tensors(torch.eye(3), ids=ids)
    images = [tmp_path / "none.png", *np.zeros((2, 40, 30, 3), np.uint8)]
    with pytest.raises(TypeError, match="images"):
        show_latents(Identity(), features, 7)
    html = show_latents(Identity(), features, images, latents=[0, 1], bands=["top"])._repr_html_()
    assert "&lt;b&gt;a&lt;/b&gt;" in html
    assert "<b>a" not in html
    assert '"onerror' not in html.replace("&#34;onerror", "")
    assert html.count("<img") == 1  # the other cannot be read


def test_the_figure_draws_every_image_and_title() -> None:
    grid = show_latents(FOUND, HELD_OUT, latents=[24, 7, 27], count=4)
    figure = grid.figure(columns=2, title="Digits")
    drawn = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(drawn) == sum(len(of) for one in grid.latents for of in one.bands.values())
    assert {image.get_interpolation() for image in drawn} == {"nearest"}
    first = decoded(grid.latents[0].bands["top"][0].thumbnail)
    assert drawn[0].get_array().tolist() == first.tolist()
    words = describe(figure)
    assert "Digits" in words
    assert all(latent.title in words for latent in grid.latents)


def test_latents_that_are_never_active_have_an_empty_row() -> None:
    dead = int((FOUND.evaluation.monoscore.support == 0).nonzero()[0])
    grid = show_latents(FOUND, HELD_OUT, latents=[dead])
    assert grid.latents[0].title == f"Latent {dead}: active on 0, no score"
    assert not any(grid.latents[0].bands.values())
    assert grid.figure().axes


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"latents": [256]}, ValueError, "latents: expected 0 to 255, got 256"),
        ({"latents": [-1]}, ValueError, "latents: expected 0 to 255, got -1"),
        ({"latents": ["3"]}, TypeError, "latents: expected integers, got str"),
        ({"latents": 3}, TypeError, "latents"),
        ({"by": "z"}, ValueError, "by: expected one of"),
        ({"bands": ["best"]}, ValueError, "bands: expected one of"),
        ({"bands": "top"}, TypeError, "bands"),
        ({"top": 0}, ValueError, "top: expected at least 1"),
        ({"count": 0}, ValueError, "count: expected at least 1"),
        ({"features": torch.eye(3)}, TypeError, "features: expected a FeatureSet"),
        ({"sae": 3}, TypeError, "sae"),
    ],
)
def test_wrong_arguments(wrong: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        show_latents(**{"sae": FOUND, "features": HELD_OUT, **wrong})


def test_purity_needs_labels() -> None:
    unlabelled = replace(FOUND.evaluation, purity=None)
    with pytest.raises(ValueError, match="by: 'purity' needs features with labels"):
        best_latents(unlabelled, 3, "purity")

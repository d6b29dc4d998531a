"""An evaluation on patches equals plain definitions over patches and over images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monoloss_plugin import MonoScore, functional
from monoloss_plugin.batch import Batch
from monoloss_plugin.comparison import compare, label_of
from monoloss_plugin.dictionary import redundancy
from monoloss_plugin.evaluation import IMAGE_MEASURES, MEASURES, Evaluation, evaluate
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.probing import latents_of, preserved_accuracy, small_budget_probe
from monoloss_plugin.purity import Purity
from monoloss_plugin.saes import make_baseline
from monoloss_plugin.saes.selection import k_robustness
from monoloss_plugin.scoring import Scoring
from tests.test_spatial import moran

WIDTH, LATENTS = 6, 40
GRIDS = [(2, 3), (1, 1), (3, 3), (2, 2), (1, 4), (3, 2), (2, 3), (4, 2), (1, 2), (2, 2)]
TOKENS = [True, True, False, False, True, True, False, True, False, True]
LABELS = torch.tensor([0, 1, 2, 0, -1, 1, 2, 0, 1, 1])


class Dense:
    """Latents of which half are active; the last is dead."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.encoder = torch.randn(WIDTH, LATENTS, generator=generator)
        self.encoder[:, -1] = 0
        self.decoder = torch.linalg.pinv(self.encoder)

    def encode(self, x):
        return (x @ self.encoder).relu()

    def decode(self, latents):
        return latents @ self.decoder


class Sparse(Dense):
    """Two latents of each patch."""

    def encode(self, x):
        kept = super().encode(x).topk(2, dim=1)
        return torch.zeros(len(x), LATENTS).scatter(1, kept.indices, kept.values)


class Stored(Sparse):
    def encode(self, x):
        return super().encode(x).to_sparse()


def rows_of(image: int) -> list[int]:
    h, w = GRIDS[image]
    return [-1] * TOKENS[image] + list(range(h * w))


PLACES = torch.tensor([place for image in range(10) for place in rows_of(image)])
IMAGES = torch.tensor([image for image in range(10) for _ in rows_of(image)])
X = torch.randn(len(PLACES), WIDTH, generator=torch.Generator().manual_seed(1))
EMBEDDINGS = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))


def batches(at_once: int, embedded: bool = True, **changed: Tensor | None) -> list[Batch]:
    """The images, so many in a batch, in another order and with larger numbers."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    found = []
    for some in order.split(at_once):
        rows = torch.cat([(image == IMAGES).nonzero().squeeze(1) for image in some])
        batch = Batch(
            X[rows],
            EMBEDDINGS[IMAGES[rows]] if embedded else None,
            LABELS[IMAGES[rows]],
            rows=rows,
            images=100 + 7 * IMAGES[rows],
            places=PLACES[rows],
            grids=torch.tensor(GRIDS)[IMAGES[rows]],
        )
        found.append(batch._replace(**changed))
    return found


def dense_latents(sae) -> Tensor:
    a = sae.encode(X)
    return (a.to_dense() if a.is_sparse else a).double()


def by_image(values: Tensor, how: str) -> Tensor:
    parts = [values[image == IMAGES] for image in range(10)]
    return torch.stack([part.amax(0) if how == "largest" else part.mean(0) for part in parts])


def scores_of(a: Tensor, e: Tensor, apart: Tensor) -> tuple[Tensor, Tensor, float]:
    """MonoScore, where it is defined, and chance, over the ordered pairs of a mask (N, N)."""
    h = torch.nn.functional.normalize(e.double(), dim=1)
    a = a - a.amin(0)
    similar, together = (h @ h.T) * apart, apart.double()
    weight = torch.einsum("nk,nm,mk->k", a, together, a)
    scores = torch.einsum("nk,nm,mk->k", a, similar, a) / weight
    return scores.nan_to_num(), weight > 0, float(similar.sum() / apart.sum())


KINDS = {"dense": Dense, "sparse": Sparse, "stored sparse": Stored}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 4, 10])
def test_patches_of_different_images_are_compared_by_their_own_features(kind, at_once) -> None:
    sae = KINDS[kind]()
    found = evaluate(sae, batches(at_once), num_classes=3)
    a = dense_latents(sae)
    scores, defined, chance = scores_of(a, X, IMAGES[:, None] != IMAGES)
    torch.testing.assert_close(found.monoscore.scores, scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.monoscore.defined, defined)
    assert found.monoscore.chance == pytest.approx(chance, abs=1e-7)
    assert found.monoscore.num_samples == len(X)
    plain = evaluate(sae, X)
    assert found.r2 == pytest.approx(plain.r2, abs=1e-6)
    assert found.l0 == plain.l0
    assert torch.equal(found.monoscore.support, plain.monoscore.support)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 4, 10])
@pytest.mark.parametrize("embedded", [True, False])
def test_images_are_compared_by_their_embeddings_or_mean_features(kind, at_once, embedded) -> None:
    sae = KINDS[kind]()
    found = evaluate(sae, batches(at_once, embedded), num_classes=3).images
    assert found.num_images == 10
    e = EMBEDDINGS if embedded else by_image(X, "mean")
    apart = ~torch.eye(10, dtype=torch.bool)
    for how in ("largest", "mean"):
        a, of = by_image(dense_latents(sae), how), getattr(found, how)
        scores, defined, chance = scores_of(a, e, apart)
        torch.testing.assert_close(of.scores, scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(of.defined, defined)
        assert of.chance == pytest.approx(chance, abs=1e-7)
        assert torch.equal(of.support, (a > 0).sum(0))
        metric = MonoScore()
        metric.update(a, e.double())
        torch.testing.assert_close(
            of.p_values, metric.compute().p_values, rtol=1e-3, atol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("kind", KINDS)
def test_purity_is_that_of_images_with_a_label(kind) -> None:
    sae = KINDS[kind]()
    found = evaluate(sae, batches(10), num_classes=3).purity
    known = LABELS >= 0
    largest = by_image(dense_latents(sae), "largest")
    expected = functional.class_purity(largest[known], LABELS[known], 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    smaller = evaluate(sae, batches(3), num_classes=3).purity
    # Purity above chance depends on the order of the samples, as it does without patches.
    for name in ("binary", "weighted", "dominant"):
        torch.testing.assert_close(
            getattr(smaller, name), getattr(found, name), rtol=1e-6, atol=1e-9, equal_nan=True
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 4, 10])
def test_coherence_and_extent_are_those_of_the_maps(kind, at_once) -> None:
    sae = KINDS[kind]()
    found = evaluate(sae, batches(at_once), num_classes=3).images
    a = dense_latents(sae)
    for latent in range(LATENTS):
        maps = [a[(n == IMAGES) & (PLACES >= 0), latent].reshape(GRIDS[n]) for n in range(10)]
        active = [one for one in maps if (one > 0).any()]
        extents = [float((one > 0).double().mean()) for one in active]
        morans = [moran(one.numpy()) for one in active]
        morans = [one for one in morans if not math.isnan(one)]
        for given, values in ((found.coherence, morans), (found.extent, extents)):
            expected = sum(values) / len(values) if values else math.nan
            assert float(given[latent]) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_what_is_not_known_of_the_grids_is_nan(recwarn) -> None:
    for changed in ({"grids": None}, {"places": None}, {"places": None, "grids": None}):
        found = evaluate(Dense(), batches(4, **changed), num_classes=3)
        assert found.images.coherence.isnan().all()
        assert math.isnan(found.summary()["coherence"])
        assert not found.images.extent[:-1].isnan().any()


def test_samples_that_are_images_of_their_own_score_as_samples_do() -> None:
    plain = evaluate(Dense(), [Batch(X)])
    assert plain.images is None
    assert plain.tested is plain.monoscore
    found = evaluate(Dense(), [Batch(X, images=torch.arange(len(X)))])
    # With groups, products are taken in float64.
    for of in (found.monoscore, found.images.largest, found.images.mean):
        torch.testing.assert_close(of.scores, plain.monoscore.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found.tested.p_values, plain.monoscore.p_values, equal_nan=True, rtol=1e-3, atol=1e-6
    )


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return evaluate(Dense(), batches(4), num_classes=3)


def test_the_summary_tells_of_images_too(found) -> None:
    summary = found.summary()
    assert set(summary) == set(MEASURES) | set(IMAGE_MEASURES)
    assert summary["images_max_adjusted"] == found.images.largest.mean_adjusted
    assert summary["images_mean_adjusted"] == found.images.mean.mean_adjusted
    assert summary["coherence"] == pytest.approx(float(found.images.coherence[:-1].mean()))
    assert summary["extent"] == pytest.approx(float(found.images.extent[:-1].mean()))
    assert summary["num_images"] == 10
    assert found.tested is found.images.mean
    assert summary["significant_share"] == float(found.images.mean.significant().sum()) / LATENTS
    assert "num_images=10, l0=" in repr(found)
    assert list(found.to_frame().index) == [(MEASURES | IMAGE_MEASURES)[name] for name in summary]


def test_the_table_of_latents_tests_images(found) -> None:
    table = found.latents()
    torch.testing.assert_close(
        torch.tensor(table["p"].to_numpy()), found.images.mean.p_values, equal_nan=True
    )
    assert table["significant"].tolist() == found.images.mean.significant().tolist()
    assert table["images"].tolist() == found.images.largest.support.tolist()
    assert table["support"].tolist() == found.monoscore.support.tolist()
    for name, values in (
        ("images_max_adjusted", found.images.largest.adjusted),
        ("images_mean_adjusted", found.images.mean.adjusted),
        ("coherence", found.images.coherence),
        ("extent", found.images.extent),
    ):
        assert table[name].isna().tolist() == [False] * (LATENTS - 1) + [True]
        assert table[name].tolist()[:-1] == values.tolist()[:-1]
    shown = found._repr_html_()
    assert f"{LATENTS} latents on {len(X)} samples of 10 images" in shown
    assert "Moran" in shown


def test_what_is_saved_of_patches_comes_back(found, tmp_path: Path) -> None:
    loaded = Evaluation.load(found.save(tmp_path))
    assert loaded.summary() == pytest.approx(found.summary(), rel=0, abs=0, nan_ok=True)
    for one, other in (
        (loaded.monoscore, found.monoscore),
        (loaded.images, found.images),
    ):
        assert list(one.tensors()) == list(other.tensors())
        for name, values in other.tensors().items():
            torch.testing.assert_close(one.tensors()[name], values, rtol=0, atol=0, equal_nan=True)
    assert loaded.latents().equals(found.latents())
    assert loaded.images.mean.chance == found.images.mean.chance
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["images"]["largest"]["num_samples"] == 10
    (tmp_path / "evaluation.json").write_text(json.dumps({**content, "images": {}}))
    with pytest.raises(ValueError, match=r"not what Evaluation\.save writes"):
        Evaluation.load(tmp_path)


def test_batches_that_do_not_fit_together_are_named() -> None:
    whole = batches(10)[0]
    cut = [
        Batch(*(None if of is None else of[part] for of in whole))
        for part in (slice(0, 12), slice(12, None))
    ]
    with pytest.raises(ValueError, match=r"images: expected all patches .* got image \d+ in two"):
        evaluate(Dense(), cut, num_classes=3)
    first, second = batches(5)
    for pair in ([first, second._replace(images=None)], [first._replace(images=None), second]):
        with pytest.raises(ValueError, match="images: expected in every batch or in none"):
            evaluate(Dense(), pair, num_classes=3)
    for name in ("images", "labels", "embeddings", "places", "grids"):
        short = whole._replace(**{name: getattr(whole, name)[:-1]})
        with pytest.raises(ValueError, match=f"{name}: expected"):
            evaluate(Dense(), [short], num_classes=3)
    with pytest.raises(ValueError, match="labels: expected the same for all samples of an image"):
        evaluate(Dense(), [whole._replace(labels=torch.arange(len(X)) % 3)], num_classes=3)


def test_a_pass_tells_of_the_images_of_each_batch() -> None:
    scoring = Scoring(Sparse(), batches(4), num_classes=3)
    seen = {}
    for encoded in scoring.batches("", False):
        assert torch.equal(encoded.embeddings, encoded.features)
        latents = encoded.images.latents.by_sample().to_dense()
        for row, number in enumerate(encoded.images.numbers.tolist()):
            seen[(number - 100) // 7] = latents[row], encoded.images.embeddings[row]
    assert sorted(seen) == list(range(10))
    found = torch.stack([seen[image][0] for image in range(10)])
    torch.testing.assert_close(found.double(), by_image(dense_latents(Sparse()), "largest"))
    torch.testing.assert_close(torch.stack([seen[n][1] for n in range(10)]), EMBEDDINGS)


def test_a_tensor_of_patches_with_labels_of_images_is_told_what_to_do() -> None:
    x = torch.randn(5, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"4 patches of each of 5 images, pass FeatureSet\.from_t"):
        evaluate(Dense(), x, torch.arange(5) % 2)
    flat = evaluate(Dense(), x, (torch.arange(20) % 2).view(5, 4))
    assert flat.images is None
    assert flat.monoscore.num_samples == 20
    assert evaluate(Dense(), x[:, :1], torch.arange(5) % 2).monoscore.num_samples == 5


TRAIN_IMAGES, HELD_OUT_IMAGES, PATCHES = 60, 50, 6


def patch_set(num_images: int, seed: int) -> FeatureSet:
    """Images of three classes: two thirds of the patches are near the class's direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 3
    x = 0.3 * torch.randn(num_images, PATCHES, 8, generator=generator)
    x[:, :4] += 2 * torch.eye(8)[labels][:, None]
    x[:, 4:] += torch.eye(8)[3 + torch.randint(5, (num_images, 2), generator=generator)]
    ids = [f"{seed}/{n}" for n in range(num_images)]
    return FeatureSet.from_tensors(
        x, labels, ids, grid=(2, 3), record={"encoder": {"name": "mine"}}
    )


TRAIN, HELD_OUT = patch_set(TRAIN_IMAGES, 0), patch_set(HELD_OUT_IMAGES, 1)


def sae_of(seed: int = 0, k: int = 2):
    return make_baseline("data points", TRAIN, num_latents=20, l0=k, seed=seed)


@pytest.mark.parametrize("batch_size", [1, 14, 2048])
def test_a_patch_set_is_scored_as_its_patches_and_images(batch_size: int) -> None:
    sae = sae_of()
    found = evaluate(sae, HELD_OUT, batch_size=batch_size)
    rows = torch.arange(len(HELD_OUT))
    x, image = HELD_OUT.take(rows), HELD_OUT.image_of(rows)
    with torch.no_grad():
        a = sae.encode(torch.nn.functional.normalize(x, dim=1)).double()
    scores, _, chance = scores_of(a, x, image[:, None] != image)
    torch.testing.assert_close(found.monoscore.scores, scores, rtol=1e-5, atol=1e-6)
    assert found.monoscore.chance == pytest.approx(chance, abs=1e-7)
    largest = a.view(HELD_OUT_IMAGES, PATCHES, -1).amax(1)
    pooled = HELD_OUT.images.tensor()
    expected = scores_of(largest, pooled, ~torch.eye(HELD_OUT_IMAGES, dtype=torch.bool))[0]
    torch.testing.assert_close(found.images.largest.scores, expected, rtol=1e-5, atol=1e-6)
    purity = functional.class_purity(largest, HELD_OUT.images.labels, 3)
    torch.testing.assert_close(found.purity, Purity(*purity), rtol=1e-6, atol=1e-9, equal_nan=True)
    assert not found.images.coherence.isnan().all()
    assert found.summary()["num_images"] == HELD_OUT_IMAGES
    of = HELD_OUT.compared_by
    means = f"{of}, the mean over the patches of each image"
    assert found.spaces.scored == f"{of} (patches) and {means} (images)"


def test_batches_of_a_patch_set_are_scored_whole_however_they_shuffle() -> None:
    sae, expected = sae_of(), evaluate(sae_of(), HELD_OUT)
    for shuffle in ("all", "images", "none"):
        found = evaluate(sae, FeatureBatches(HELD_OUT, batch_size=40, shuffle=shuffle))
        assert found.summary() == pytest.approx(expected.summary(), rel=1e-5)
        assert found.spaces == expected.spaces
    other = torch.randn(HELD_OUT_IMAGES, 3, generator=torch.Generator().manual_seed(7))
    ids = HELD_OUT.images.ids_of(torch.arange(HELD_OUT_IMAGES))
    space = FeatureSet.from_tensors(other, ids=ids, record={"encoder": {"name": "another"}})
    found = evaluate(sae, FeatureBatches(HELD_OUT, embeddings=space, batch_size=40))
    torch.testing.assert_close(found.monoscore.scores, expected.monoscore.scores)
    assert found.images.mean.chance == pytest.approx(
        scores_of(other.double(), other, ~torch.eye(HELD_OUT_IMAGES, dtype=torch.bool))[2], abs=1e-6
    )
    assert found.spaces.scored == "features of mine (patches) and features of another (images)"


def test_saes_are_compared_on_patches() -> None:
    saes = {"mine": [sae_of(0), sae_of(1)], "other": sae_of(0, 3)}
    found = compare(saes, HELD_OUT, train=TRAIN, baselines=["PCA"], match="l0")
    assert list(found.runs) == ["mine", "other", "PCA"]
    assert set(found.measures()) >= set(MEASURES) | set(IMAGE_MEASURES)
    assert len({label_of(measure) for measure in found.measures()}) == len(found.measures())
    cells = {row[0]: row[1:] for row in found.cells()}
    assert cells["images"] == ["50.0 ± 0.0", "50.0", "50.0 ± 0.0"]
    assert any(note.startswith("Probes read the mean over each image's") for note in found.notes)
    for run in found.runs["mine"] + found.runs["other"]:
        assert run["l0"] == pytest.approx(2.0, rel=0.1)


def test_spaces_compare_each_patch_by_its_image_and_leave_pairs_of_one_image_out() -> None:
    sae, other = sae_of(), torch.randn(30, 3, generator=torch.Generator().manual_seed(7))
    ids = HELD_OUT.images.ids_of(torch.arange(29, -1, -1))
    spaces = {"itself": HELD_OUT, "fewer": FeatureSet.from_tensors(other, ids=ids)}
    found = compare({"a": sae}, HELD_OUT, train=TRAIN, spaces=spaces, groups=["spaces"])
    run = found.runs["a"][0]
    rows = torch.arange(len(HELD_OUT))
    image = HELD_OUT.image_of(rows)
    with torch.no_grad():
        a = sae.encode(torch.nn.functional.normalize(HELD_OUT.take(rows), dim=1)).double()
    one_hot = torch.nn.functional.one_hot(HELD_OUT.images.labels, 3)
    for name, embeddings in (
        ("itself", HELD_OUT.images.tensor()),
        ("labels", one_hot),
        ("fewer", other.flip(0)),
    ):
        known = image < len(embeddings)
        apart = image[known][:, None] != image[known]
        scores, defined, chance = scores_of(a[known], embeddings[image[known]], apart)
        adjusted = ((scores - chance) / (1 - chance))[defined]
        assert run[f"adjusted/{name}"] == pytest.approx(float(adjusted.mean()), abs=1e-5), name


def test_probes_read_the_mean_over_the_patches_of_an_image() -> None:
    sae = sae_of()
    run = compare({"a": sae}, HELD_OUT, train=TRAIN, groups=["probes"]).runs["a"][0]

    def by_image(values):
        return values.view(-1, PATCHES, values.shape[1]).mean(1)

    x = [torch.nn.functional.normalize(one.tensor(), dim=1) for one in (TRAIN, HELD_OUT)]
    with torch.no_grad():
        latents = [by_image(sae.encode(one)) for one in x]
        reconstructed = by_image(sae.decode(sae.encode(x[1])))
    y = [one.images.labels for one in (TRAIN, HELD_OUT)]
    expected = small_budget_probe(latents[0], y[0], latents[1], y[1])
    assert {name: run[name] for name in run if name.startswith("probe/")} == {
        f"probe/{n}": pytest.approx(value, abs=0.021) for n, value in expected.items()
    }
    on = preserved_accuracy(by_image(x[0]), y[0], by_image(x[1]), reconstructed, y[1])
    assert run["accuracy/features"] == pytest.approx(on.on_features, abs=1e-9)
    assert run["accuracy/reconstructions"] == pytest.approx(on.on_reconstructions, abs=0.021)


def test_latents_of_patches_are_means_over_images() -> None:
    found = latents_of(Stored(), batches(10)).toarray()
    torch.testing.assert_close(
        torch.from_numpy(found).double(), by_image(dense_latents(Stored()), "mean")
    )


def test_budgets_and_dictionaries_are_those_of_patches() -> None:
    sae = sae_of()
    run = compare({"a": sae}, HELD_OUT, train=TRAIN, groups=["budgets", "dictionary"]).runs["a"][0]
    x = torch.nn.functional.normalize(HELD_OUT.tensor(), dim=1)
    assert run["r2/2"] == pytest.approx(k_robustness(sae, x, ks=[4])[4], abs=1e-6)
    alive = evaluate(sae, HELD_OUT).monoscore.support > 0
    assert run["redundancy"] == redundancy(sae.W_dec.detach(), alive=alive)


def test_halves_are_of_images() -> None:
    found = compare({"a": sae_of()}, HELD_OUT, groups=["spaces", "probes"])
    assert found.evaluations["a"][0].images.num_images == HELD_OUT_IMAGES // 2
    assert found.evaluations["a"][0].monoscore.num_samples == HELD_OUT_IMAGES // 2 * PATCHES
    assert found.runs["a"][0]["accuracy/features"] > 0.9

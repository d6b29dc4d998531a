"""Names of latents: known ones are found, and they are what a calculation by hand gives."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from monoloss_plugin import Batch, MonoScore
from monoloss_plugin.features import (
    FeatureBatches,
    FeatureSet,
    extract,
    load_encoder,
    load_text_encoder,
)
from monoloss_plugin.gallery.names import LatentNames, name_latents, names_from_means
from monoloss_plugin.gallery.samples import activating_samples
from tests import oracle
from tests.text_models import files_of, save_open_clip, save_transformers

TEXTS = ["a photo of zero", "one", "a photo of two", "three", "photo of four", "five"]


class Detectors(nn.Module):
    """An SAE whose latents look in given directions (M, d), above a threshold of each."""

    def __init__(self, directions: Tensor, thresholds: Tensor) -> None:
        super().__init__()
        self.directions = nn.Parameter(directions)
        self.register_buffer("thresholds", thresholds)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.directions.T - self.thresholds).relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.directions


def detectors_for(features: Tensor, num_latents: int) -> Detectors:
    """Latents that are each active on a quarter of the features; the last is dead."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(num_latents, features.shape[1], generator=generator)
    thresholds = (features @ directions.T).quantile(0.75, dim=0)
    thresholds[-1] = 1e9
    return Detectors(directions, thresholds)


def by_hand(latents: Tensor, embeddings: Tensor, of_texts: Tensor) -> np.ndarray:
    """Cosines (M, T) of latents' mean embeddings and texts, each less the mean of its kind."""
    units = [e / np.linalg.norm(e) for e in embeddings.double().numpy()]
    centre = sum(units) / len(units)
    words = [t / np.linalg.norm(t) for t in of_texts.double().numpy()]
    middle = sum(words) / len(words)
    means = oracle.mean_embeddings_by_loops(latents, embeddings)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))

    return np.array(
        [
            [cosine(mean - centre, word - middle) if mean.any() else math.nan for word in words]
            for mean in means
        ]
    )


def require_names(found: LatentNames, cosines: np.ndarray, texts: list[str], count: int) -> None:
    """Check names, similarities and z-scores against cosines (M, T)."""
    for latent, row in enumerate(cosines):
        if np.isnan(row).any():
            assert found.texts[latent] == []
            assert found.similarities[latent].isnan().all()
            assert found.z_scores[latent].isnan().all()
            continue
        order = np.argsort(-row)[:count]
        assert found.texts[latent] == [texts[i] for i in order]
        np.testing.assert_allclose(found.similarities[latent], row[order], atol=1e-4)
        z = (row[order] - row.mean()) / row.std()
        np.testing.assert_allclose(found.z_scores[latent], z, atol=1e-3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits as PNG files."""
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(load_digits().images[:40]):
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module", params=["open_clip", "clip"])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny model's library and folder."""
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "open_clip":
        return "open_clip", save_open_clip(folder)
    return "transformers", save_transformers("clip", folder)


@torch.no_grad()
def library_embeddings(library: str, folder: Path) -> Tensor:
    """The embeddings of TEXTS, as the library itself gives them."""
    if library == "open_clip":
        name = f"local-dir:{folder}"
        own = open_clip.create_model(name).eval()
        return own.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    own = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.cat(
        [
            own.get_text_features(tokenizer([t], return_tensors="pt").input_ids).pooler_output
            for t in TEXTS
        ]
    )


def test_from_images_to_names_with_one_model(model, photos, tmp_path) -> None:
    library, folder = model
    extract(photos, load_encoder(f"{library}:{folder}"), tmp_path / "set", workers=0)
    features = FeatureSet.open(tmp_path / "set")
    x = torch.nn.functional.normalize(features.tensor().float())
    sae = detectors_for(x, 9)
    of_texts = library_embeddings(library, folder)
    cosines = by_hand(sae.encode(x).detach(), x, of_texts)
    for encoder in (
        f"{library}:{folder}",
        load_text_encoder(f"{library}:{folder}"),
        lambda texts: of_texts[[TEXTS.index(text) for text in texts]].numpy(),
    ):
        found = name_latents(sae, features, [*TEXTS, "one"], encoder, batch_size=13)
        require_names(found, cosines, TEXTS, count=3)
    assert len({texts[0] for texts in found.texts if texts}) > 1
    everything = name_latents(sae, features, TEXTS, encoder, count=99)
    require_names(everything, cosines, TEXTS, count=len(TEXTS))


def test_features_say_which_encoder_reads_the_texts(model, photos, tmp_path, hub) -> None:
    library, folder = model
    hub.put("alice/clip", files_of(folder))
    name = "transformers:alice/clip" if library == "transformers" else "open_clip:hf-hub:alice/clip"
    extract(photos, name, tmp_path / "set", workers=0)
    features = FeatureSet.open(tmp_path / "set")
    x = torch.nn.functional.normalize(features.tensor().float())
    sae = detectors_for(x, 5)
    cosines = by_hand(sae.encode(x).detach(), x, library_embeddings(library, folder))
    require_names(name_latents(sae, features, TEXTS, count=2), cosines, TEXTS, count=2)


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_another_encoder_than_the_features_name_is_a_warning(library, model, tmp_path) -> None:
    own, folder = model
    record = {"library": library, "name": folder.name, "output": "pooled", "layer": None}
    x = torch.randn(20, 24)
    features = FeatureSet.from_tensors(x, record={"encoder": record})
    arguments = (detectors_for(x, 3), features, TEXTS, f"{own}:{folder}")
    if library == own:
        name_latents(*arguments)  # a warning would be an error
        return
    with pytest.warns(UserWarning, match=f"say that {library}:.* and {own}:.* encodes the texts"):
        name_latents(*arguments)


def gap_world() -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Images and texts of eight things, with the gap and the hub text that CLIP has.

    Returns:
        Embeddings (400, 64), texts, their embeddings (9, 64), and the thing in each image (400,).
    """
    generator = torch.Generator().manual_seed(3)
    things = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    of_images, of_texts, things = 3 * things[8], 3 * things[9], things[:8]
    seen = torch.arange(400) % 8
    noise = torch.randn(400, 64, generator=generator)
    images = of_images + things[seen] + 0.1 * noise
    texts = of_texts + 0.5 * things
    # One text is nearest to all images: it lies between the two kinds.
    hub = of_texts + of_images
    return images, [f"thing {i}" for i in range(8)] + ["hub"], torch.cat((texts, hub[None])), seen


@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_known_names_are_found_across_the_gap_where_cosines_do_not(stretch) -> None:
    images, texts, of_texts, seen = gap_world()
    latents = torch.nn.functional.one_hot(seen).float() * stretch
    metric = MonoScore()
    metric.update(latents, images)
    means = metric.mean_embeddings()
    raw = torch.nn.functional.cosine_similarity(means[:, None], of_texts[None], dim=2)
    assert (raw.argmax(1) == 8).all()  # the hub names every latent
    lengths = 1 + torch.rand(9, 1)  # the texts' lengths do not count
    found = names_from_means(means, metric.mean_embedding(), texts, of_texts * lengths)
    assert [names[0] for names in found.texts] == texts[:8]
    assert all(len(names) == 3 for names in found.texts)
    assert (found.similarities[:, 0] > 0.5).all()
    # In a world of one image and text a thing, the rest is far below.
    assert (found.z_scores[:, 0] > 2).all()
    assert (found.similarities.diff(dim=1) <= 0).all()


def test_a_constant_added_to_the_activations_does_not_change_the_names() -> None:
    images, texts, of_texts, seen = gap_world()
    latents = torch.nn.functional.one_hot(seen).float()
    named = []
    for given in (latents, latents + 5):
        metric = MonoScore()
        metric.update(given, images)
        named.append(
            names_from_means(metric.mean_embeddings(), metric.mean_embedding(), texts, of_texts)
        )
    assert named[0].texts == named[1].texts


def test_batches_may_bring_the_embeddings_that_are_named() -> None:
    images, texts, of_texts, seen = gap_world()
    sae = Detectors(torch.eye(8), torch.full((8,), 0.5))
    batches = [
        Batch(torch.nn.functional.one_hot(seen[rows], 8).float(), embeddings=images[rows])
        for rows in torch.arange(400).split(90)
    ]
    found = name_latents(sae, batches, texts, lambda given: of_texts, count=1)
    assert found.texts == [[text] for text in texts[:8]]


def test_latents_that_are_never_active_have_no_name() -> None:
    means = torch.tensor([[0.0, 0.0], [0.6, 0.2], [0.5, 0.5]])
    found = names_from_means(means, torch.tensor([0.5, 0.5]), ["a", "b", "c"], torch.randn(3, 2))
    assert found.texts[0] == found.texts[2] == []  # the last is no direction
    assert len(found.texts[1]) == 3
    assert found.similarities.isnan().all(1).tolist() == [True, False, True]
    none = names_from_means(torch.zeros(2, 2), torch.ones(2), ["a"], torch.ones(1, 2))
    assert none.texts == [[], []]


def test_few_texts() -> None:
    means, mean = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5, 0.5])
    one = names_from_means(means, mean, ["a"], torch.tensor([[2.0, 0.0]]))
    assert one.texts == [["a"], ["a"]]
    torch.testing.assert_close(
        one.similarities, torch.tensor([[0.5], [-0.5]]).sqrt().nan_to_num(-math.sqrt(0.5))
    )
    two = names_from_means(means, mean, ["a", "b"], torch.eye(2))
    assert two.texts == [["a", "b"], ["b", "a"]]
    torch.testing.assert_close(two.similarities, torch.tensor([[1.0, -1.0]] * 2))
    assert one.z_scores.isnan().all()
    assert two.z_scores.isnan().all()


def test_many_texts_go_in_chunks(monkeypatch) -> None:
    means, mean, texts = torch.randn(20, 8), torch.randn(8), [str(i) for i in range(50)]
    of_texts = torch.randn(50, 8)
    whole = names_from_means(means, mean, texts, of_texts)
    monkeypatch.setattr("monoloss_plugin.gallery.names._COSINES", 150)
    parts = names_from_means(means, mean, texts, of_texts)
    assert parts.texts == whole.texts
    torch.testing.assert_close(parts.similarities, whole.similarities)
    torch.testing.assert_close(parts.z_scores, whole.z_scores)


def test_names_as_a_table() -> None:
    found = LatentNames(
        [["dog", "cat", "fox"], []],
        torch.tensor([[0.5, 0.25, 0.0], [torch.nan] * 3]),
        torch.tensor([[2.0, 1.0, 0.0], [torch.nan] * 3]),
    )
    table = found.to_frame()
    assert table.index.name == "latent"
    assert table.loc[0].to_dict() == {
        "name": "dog",
        "similarity": 0.5,
        "z": 2.0,
        "others": "cat, fox",
    }
    assert table.loc[1, "name"] == table.loc[1, "others"] == ""
    assert math.isnan(table.loc[1, "similarity"])


X = torch.rand(6, 4)
TIMM = {"encoder": {"library": "timm", "name": "resnet18", "output": "pooled"}}
CLS = {"encoder": {"library": "open_clip", "name": "RN50/openai", "output": "cls"}}
FOLDER = {"encoder": {"library": "transformers", "name": "clip", "output": "pooled"}}


def name(**changed: object) -> LatentNames:
    arguments = {
        "sae": Detectors(torch.eye(4), torch.zeros(4)),
        "features": X,
        "texts": ["a", "b"],
        "encoder": lambda texts: torch.eye(4)[: len(texts)],
    }
    return name_latents(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"texts": []}, ValueError, "texts: expected at least one, got none"),
        ({"texts": "dog"}, TypeError, "texts: expected a list, got str"),
        ({"texts": ["a", 3]}, TypeError, "texts: expected a list of strings, got one with 3"),
        ({"texts": [None]}, TypeError, "texts: expected a list of strings, got one with None"),
        ({"count": 0}, ValueError, "count: expected at least 1, got 0"),
        ({"sae": object()}, TypeError, "sae: expected an SAE"),
        ({"features": X[:0]}, ValueError, "features: expected at least one sample"),
        ({"encoder": 3}, TypeError, "encoder: expected a name, a TextEncoder or a function"),
        ({"encoder": "timm:resnet18"}, ValueError, "encoder: 'timm:resnet18' has no text side"),
        ({"encoder": "vit-l16"}, ValueError, "encoder: 'vit-l16' has no text side"),
        ({"encoder": None}, ValueError, "encoder: the features do not say which encoder"),
        (
            {"encoder": None, "features": FeatureSet.from_tensors(X)},
            ValueError,
            "encoder: the features do not say which encoder",
        ),
        (
            {"encoder": None, "features": FeatureSet.from_tensors(X, record=TIMM)},
            ValueError,
            "encoder: 'resnet18' has no text side that is known",
        ),
        (
            {"encoder": None, "features": FeatureSet.from_tensors(X, record=CLS)},
            ValueError,
            "encoder: texts can be compared with its output 'pooled' alone",
        ),
        (
            {"encoder": None, "features": FeatureSet.from_tensors(X, record=FOLDER)},
            ValueError,
            "encoder: 'clip' is of a local folder",
        ),
        (
            {"encoder": lambda texts: torch.rand(len(texts), 5)},
            ValueError,
            "text_embeddings: expected (2, 4), one for each text and as wide as the samples' "
            "embeddings, got (2, 5)",
        ),
        ({"encoder": lambda texts: torch.rand(1, 4)}, ValueError, "text_embeddings: expected (2"),
        ({"encoder": lambda texts: [[1, 2]]}, TypeError, "encoder(texts): expected a floating"),
        (
            {"encoder": lambda texts: torch.full((2, 4), torch.nan)},
            ValueError,
            "text_embeddings: contains NaN",
        ),
    ],
)
def test_errors_name_the_argument(changed, error, said) -> None:
    with pytest.raises(error, match=f"^{re.escape(said)}"):
        name(**changed)


def test_features_of_another_output_are_refused_with_a_given_encoder(model) -> None:
    library, folder = model
    record = {"library": library, "name": folder.name, "output": "pooled", "layer": "blocks.3"}
    features = FeatureSet.from_tensors(torch.rand(6, 24), record={"encoder": record})
    sae = Detectors(torch.eye(24), torch.zeros(24))
    with pytest.raises(ValueError, match=r"^encoder: texts can be .* of layer 'blocks.3'"):
        name_latents(sae, features, TEXTS, f"{library}:{folder}")


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"mean_embedding": torch.rand(3)}, ValueError, "mean_embedding: expected (4,)"),
        ({"mean_embeddings": torch.rand(4)}, ValueError, "mean_embeddings: expected at least 2"),
        ({"mean_embeddings": [[1, 2]]}, TypeError, "mean_embeddings: expected a floating"),
        ({"mean_embedding": X[0] * torch.inf}, ValueError, "mean_embedding: contains NaN"),
        ({"texts": ["a"]}, ValueError, "text_embeddings: expected (1, 4)"),
        ({"count": 1.5}, TypeError, "count: expected an integer"),
    ],
)
def test_errors_of_means_name_the_argument(changed, error, said) -> None:
    arguments = {
        "mean_embeddings": X,
        "mean_embedding": X.mean(0),
        "texts": ["a", "b"],
        "text_embeddings": torch.rand(2, 4),
    }
    with pytest.raises(error, match=f"^{re.escape(said)}"):
        names_from_means(**{**arguments, **changed})


def test_what_was_found_of_an_sae_gets_the_same_names_without_a_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator)
    sae = Identity()
    texts = ["one", "two", "three", "four"]
    vectors = torch.randn(4, 8, generator=generator)

    def encode(given: list[str]) -> torch.Tensor:
        return vectors[[texts.index(one) for one in given]]

    expected = name_latents(sae, x, texts, encode)
    found = activating_samples(sae, x)
    assert name_latents(found, x, texts, encode).texts == expected.texts


class Identity:
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_latents_of_patches_are_named_by_their_images() -> None:
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(30, 4, 6, generator=generator)
    of_images = torch.randn(30, 5, generator=generator)
    ids = [str(number) for number in range(30)]
    features = FeatureSet.from_tensors(patches, ids=ids)
    batches = FeatureBatches(
        features, embeddings=FeatureSet.from_tensors(of_images, ids=ids), batch_size=8
    )
    sae = detectors_for(nn.functional.normalize(patches.flatten(0, 1), dim=1), 7)
    of_texts = torch.randn(len(TEXTS), 5, generator=generator)
    names = name_latents(sae, batches, TEXTS, lambda _: of_texts, count=len(TEXTS))
    with torch.no_grad():
        latents = sae.encode(nn.functional.normalize(patches, dim=2))
    expected = by_hand(latents.amax(1), of_images, of_texts)
    for latent in range(6):
        order = np.argsort(-expected[latent])
        assert names.texts[latent] == [TEXTS[number] for number in order]
        np.testing.assert_allclose(names.similarities[latent], expected[latent][order], atol=1e-5)

"""Table 2: fine-tuning with MonoLoss, on digits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset, NamedSplit
from matplotlib.axes import Axes
from PIL import Image
from timm.models import save_for_hf

from monoloss_plugin import functional, load_features
from monoloss_plugin.features import FeatureSet, Source, open_source
from monoloss_plugin.features.digits import digit_images
from monoloss_plugin.features.images import decode
from monoloss_plugin.reproduce import fine_tune
from monoloss_plugin.reproduce.experiment import Features, Setting
from monoloss_plugin.reproduce.table2 import TABLE2, Scale, measure, paper_scale

SPLITS = ("train", "held_out")


def pixels_of(split: str) -> FeatureSet:
    """The digits' pixels, as another encoder's features of the same images."""
    digits = load_features("digits", split)
    ids = digits.ids_of(torch.arange(len(digits)))
    return FeatureSet.from_tensors(digit_images(digits).flatten(1), digits.labels, ids)


def images_of(split: str) -> Source:
    digits = load_features("digits", split)
    pixels = (digit_images(digits) * 255).byte().numpy()
    columns: dict[str, Any] = {
        "image": [Image.fromarray(one) for one in pixels],
        "label": digits.labels.tolist(),
        "image_id": digits.ids_of(torch.arange(len(digits))),
    }
    return open_source(Dataset.from_dict(columns, split=NamedSplit(split)))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(
        tmp_path_factory.mktemp("runs"),
        {
            "pixels": Features(*map(pixels_of, SPLITS)),
            "digits": Features(*(load_features("digits", split) for split in SPLITS)),
        },
        seeds=(0, 1),
        images=dict(zip(SPLITS, map(images_of, SPLITS), strict=True)),
    )


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    """A small ResNet that has learnt nothing."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    size = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1), "stem_width": 8, "in_chans": 1}
    model = timm.create_model("resnet18", num_classes=10, **size)
    model.pretrained_cfg |= {"input_size": (1, 32, 32), "crop_pct": 1.0, "mean": 0.0, "std": 1.0}
    save_for_hf(model, str(folder), model_args=size)
    return Scale(
        encoder=f"timm:{folder}",
        image_size=16,
        train_images=500,
        held_out_images=200,
        epochs=3,
        batch_size=50,
        lr=0.1,
        lams=(0.0, 3.0),
    )


@pytest.fixture(scope="module")
def found(setting: Setting, scale: Scale) -> Any:
    return measure(setting, scale)


def runs_of(found: Any, lam: float, shuffled: bool = False) -> list[Any]:
    return [run for run in found["runs"] if (run["lam"], run["shuffled"]) == (lam, shuffled)]


def test_monoloss_makes_the_images_of_a_latent_more_alike(found) -> None:
    """Held-out images, by the encoder trained on and by one that training has not seen."""
    for plain, with_loss in zip(runs_of(found, 0.0), runs_of(found, 3.0), strict=True):
        for space in ("digits", "pixels"):
            assert with_loss["spaces"][space]["adjusted"] > plain["spaces"][space]["adjusted"]


def test_the_control_takes_embeddings_of_other_images() -> None:
    own = torch.arange(50.0)[:, None]
    dealt = fine_tune.embeddings_of_others(own, seed=0)
    assert not (dealt == own).any()
    assert torch.equal(dealt.sort(dim=0).values, own)
    assert not torch.equal(dealt, fine_tune.embeddings_of_others(own, seed=1))


def test_each_run_gets_its_weight_and_its_embeddings(setting, scale, tmp_path, monkeypatch) -> None:
    given = []

    def record(encoder, photographs, embeddings, loss, scale, device) -> list[float]:
        own = photographs.embeddings["digits"]
        given.append(
            (loss and loss.lam, torch.equal(embeddings, own), list(photographs.embeddings))
        )
        return [1.0]

    monkeypatch.setattr(fine_tune, "fine_tune", record)
    small = replace(scale, train_images=50, held_out_images=50, lams=(0.0, 0.1, 1.0))
    measure(replace(setting, out=tmp_path, seeds=(0,)), small)
    own = ["digits"]  # the last encoder; training sees no other
    assert given == [(None, True, own), (0.1, True, own), (1.0, True, own), (1.0, False, own)]


def test_embeddings_and_labels_are_those_of_the_image(setting) -> None:
    digits = setting.features["digits"].train
    chosen = fine_tune.choose_photographs(setting.images["train"], {"digits": digits}, 50)
    rows = torch.tensor(chosen.rows)  # the digits' features are in the order of their images
    assert torch.equal(chosen.embeddings["digits"], digits.take(rows).float())
    assert chosen.labels == digits.labels[rows].tolist()
    assert len(set(chosen.rows)) == 50
    again = fine_tune.choose_photographs(setting.images["train"], {"digits": digits}, 50)
    assert again.rows == chosen.rows


def test_images_without_a_label_are_left_out(setting) -> None:
    source = setting.images["held_out"]
    some = source.rows.map(lambda row: {"label": -1 if row["label"] < 8 else row["label"]})
    chosen = fine_tune.choose_photographs(replace(source, rows=some), {}, None)
    assert set(chosen.labels) == {8, 9}
    with pytest.raises(ValueError, match="expected labels"):
        fine_tune.choose_photographs(replace(source, label=None), {}, None)


def test_measures_are_those_of_the_latents(setting, scale) -> None:
    features = {name: of.held_out for name, of in setting.features.items()}
    chosen = fine_tune.choose_photographs(setting.images["held_out"], features, 150)
    encoder = fine_tune.load_model(scale, 10, seed=0)
    found = fine_tune.measure_model(encoder, chosen, scale, "cpu")
    images = [encoder.preprocess(decode(chosen.source[row], "L")) for row in chosen.rows]
    with torch.no_grad():
        model: Any = encoder.model.eval()
        maps = model.forward_features(torch.stack(images))
        # The new layer passes a ResNet's features on, which are not negative.
        latents = model.forward_head(maps, pre_logits=True)
        right = model.forward_head(maps).argmax(1) == torch.tensor(chosen.labels)
    support = (latents > 0).sum(0)
    assert found["accuracy"] == pytest.approx(right.double().mean().item())
    assert (found["num_latents"], found["dead"]) == (64, int((support == 0).sum()))
    assert found["images"] == int(support.median())
    assert found["active"][0] == pytest.approx(support.max().item() / 150, abs=1e-5)
    for space, h in chosen.embeddings.items():
        scores = functional.monoscore(latents, h)
        assert found["spaces"][space]["monoscore"] == pytest.approx(scores.mean().item(), abs=1e-5)
        assert found["spaces"][space]["curve"][0] == pytest.approx(scores.max().item(), abs=1e-4)


def test_a_run_is_taken_from_its_file_the_second_time(setting, scale, found, monkeypatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a run that is there was made again")

    for name in ("load_model", "fine_tune", "measure_model"):
        monkeypatch.setattr(fine_tune, name, never)
    assert measure(setting, scale) == found


def test_tables_come_from_json_alone(found) -> None:
    accuracy, latents, seconds = TABLE2.tables(json.loads(json.dumps(found)))
    for table in (accuracy, latents, seconds):
        assert {len(row) for row in table.rows} == {len(table.header)}
    rows = {row[0]: row[1:] for row in accuracy.rows}
    assert rows["lam 0.1"] == ["98.43", "98.20", "", ""]
    percent = [100 * run["accuracy"] for run in runs_of(found, 3.0)]
    assert (
        rows["lam 3"][2] == f"{sum(percent) / 2:.2f} ± {abs(percent[0] - percent[1]) / 2**0.5:.2f}"
    )
    gains = [
        100 * (one["accuracy"] - plain["accuracy"])
        for one, plain in zip(runs_of(found, 3.0), runs_of(found, 0.0), strict=True)
    ]
    assert rows["lam 3"][3].startswith(f"{sum(gains) / 2:.2f} ±")
    assert rows["lam 0"][3] == ""
    assert [row[0] for row in latents.rows] == [
        "before fine-tuning",
        "lam 0",
        "lam 3",
        "lam 3, shuffled embeddings",
    ]
    assert latents.rows[0][1] == f"{found['before']['spaces']['digits']['adjusted']:.3f}"
    assert seconds.rows[2][1:3] == ["1.14", "1.01"]


def test_the_figure_has_a_curve_for_each_weight_and_chance(found) -> None:
    ax = TABLE2.draw(json.loads(json.dumps(found)))
    assert isinstance(ax, Axes)
    names = [text.get_text().partition("\n")[0] for text in ax.get_legend().get_texts()]
    assert names == [
        "before fine-tuning",
        "lam 0",
        "lam 3",
        "lam 3, shuffled embeddings",
        "chance",
    ]


def test_one_encoder_and_too_few_images_are_refused(setting, scale, tmp_path) -> None:
    only = {"digits": setting.features["digits"]}
    with pytest.raises(ValueError, match=r"two encoders, .* got 1"):
        measure(replace(setting, features=only), scale)
    few = replace(scale, train_images=20, held_out_images=20)
    with pytest.raises(ValueError, match="at least 50, a batch, got 20"):
        measure(replace(setting, out=tmp_path), few)


def test_the_papers_settings_differ_for_imagenet() -> None:
    assert (paper_scale(10).lr, paper_scale(10).warm_up_epochs) == (0.1, 0)
    assert (paper_scale(1000).lr, paper_scale(1000).warm_up_epochs) == (1e-3, 5)

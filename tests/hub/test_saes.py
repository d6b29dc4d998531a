"""SAEs, published and loaded by the real clients."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens
import torch
from huggingface_hub import ModelCard, RepoCard
from huggingface_hub.errors import RepositoryNotFoundError
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from monoloss_plugin import (
    MonoLoss,
    OffSupportL1,
    list_pretrained,
    load_features,
    load_pretrained,
    publish_features,
    publish_sae,
    refit_decoder,
)
from monoloss_plugin.convert import (
    from_dictionary_learning,
    from_monoloss,
    from_overcomplete,
    from_sparsify,
)
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.hub.repository import bundled_folder
from tests.adapters.conftest import ARCHITECTURES, make_sae, make_trainer, stream
from tests.hub.server import OWNER_TOKEN, Fault

REPO = "alice/vision-saes"
DIGITS = bundled_folder("digits") / "models"
WITH, WITHOUT = "batchtopk-256-monoloss-0.003", "batchtopk-256"


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """The digits' features, of unit norm."""
    features = load_features("digits", "train").tensor().float()
    return torch.nn.functional.normalize(features, dim=1)


@pytest.fixture(scope="session")
def held_out():
    return load_features("digits", "held_out")


def trained(architecture, images, *terms, steps=30):
    sae = make_sae(architecture)
    trainer = make_trainer(sae, stream(images), steps=steps)
    for term in terms:
        trainer.add_loss(term)
    trainer.fit()
    return sae


def as_inference(sae, folder) -> SAE:
    """What SAELens itself makes of a trained SAE."""
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def assert_equal(found, expected, x) -> None:
    latents = expected.encode(x)
    assert (latents > 0).any()
    assert torch.equal(found.encode(x), latents)
    assert torch.equal(found.decode(latents), expected.decode(latents))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sae_lens_alone_loads_every_architecture(architecture, images, tmp_path, hub) -> None:
    sae = trained(architecture, images, MonoLoss(lam=3e-4))
    state, config = copy.deepcopy(sae.state_dict()), sae.cfg.to_dict()
    done = publish_sae(sae, REPO)
    assert all(torch.equal(state[key], value) for key, value in sae.state_dict().items())
    assert sae.cfg.to_dict() == config
    assert done.name == f"{architecture.split()[0]}-96-monoloss-0.0003"
    assert done.url == f"{hub.url}/{REPO}"
    assert hub.repos["model", REPO].refs["main"] == done.commit

    expected = as_inference(sae, tmp_path / "expected")
    assert_equal(SAE.from_pretrained(REPO, done.name), expected, images[:200])
    loaded = load_pretrained(REPO)
    assert_equal(loaded.sae, expected, images[:200])
    assert (loaded.sae_id, loaded.revision) == (done.name, done.commit)
    assert loaded.record.lam == 3e-4
    assert loaded.record.losses[0]["lam_units"] == "mse"
    assert loaded.record.inputs == "unit norm"
    (one,) = list_pretrained(REPO)
    assert one.architecture == architecture.split()[0]
    assert (one.d_in, one.d_sae, one.record) == (64, 96, loaded.record)


def test_a_process_without_this_package_loads_it(images, tmp_path, hub) -> None:
    publish_sae(DIGITS / WITH, REPO, sae_id="small/batchtopk")
    torch.save(images[:50], tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "from sae_lens import SAE\n"
        f"sae = SAE.from_pretrained({REPO!r}, 'small/batchtopk')\n"
        "torch.save(sae.encode(torch.load('x.pt')).detach(), 'latents.pt')\n"
        "assert not any(name.startswith('monoloss_plugin') for name in sys.modules)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = SAE.load_from_disk(DIGITS / WITH).encode(images[:50])
    assert torch.equal(torch.load(tmp_path / "latents.pt"), expected)


def test_metrics_with_and_without_the_loss(images, held_out, hub) -> None:
    batches = FeatureBatches(held_out, shuffle="none", drop_last=False)
    evaluation, baseline = (
        evaluate(load_pretrained("digits", i).sae, batches) for i in (WITH, WITHOUT)
    )
    publish_sae(
        DIGITS / WITH,
        REPO,
        sae_id="with",
        evaluation=evaluation,
        baseline=baseline,
        controls={"data | points": {"r2": 0.5, "purity_binary": 0.25}},
        features=held_out,
        license="mit",
        base_model="timm/some_encoder",
        dataset="alice/digit-images",
        tags=["digits"],
    )
    loaded = load_pretrained(REPO, "with")
    assert loaded.record.metrics == evaluation.summary()
    assert loaded.record.baseline == baseline.summary()
    assert loaded.record.encoder == held_out.record.encoder
    compared_by = "features of the demo's vision transformer, 3 blocks"
    assert loaded.record.evaluated_on == {
        "samples": 599,
        "split": "held_out",
        "compared by": compared_by,
    }
    assert loaded.record.controls == {"data | points": {"r2": 0.5, "purity_binary": 0.25}}
    assert torch.allclose(10**loaded.sparsity, evaluation.frequency.float() + 1e-10)

    files = hub.files(REPO)
    assert files["with/curves.png"].startswith(b"\x89PNG")
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "saelens"
    assert card.data.license == "mit"
    assert card.data.base_model == ["timm/some_encoder"]
    assert card.data.datasets == ["alice/digit-images"]
    assert {"digits", "monoloss", "sparse-autoencoder"} <= set(card.data.tags)
    row = next(line for line in card.text.splitlines() if line.startswith("| class purity, binary"))
    shown = [float(cell) for cell in row.split("|")[2:5]]
    assert shown == [
        *(round(e.summary()["purity_binary"], 3) for e in (baseline, evaluation)),
        0.25,
    ]
    assert "learnt nothing, or no more than their name says: data \\| points" in card.text
    assert f"compared by {compared_by}" in card.text
    assert "![MonoScore of every latent, sorted](with/curves.png)" in card.text


def test_the_cards_snippets_run(hub) -> None:
    publish_sae(DIGITS / WITH, REPO)
    snippets = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        names: dict = {}
        exec(snippet, names)
        sae = names["sae"] if "sae" in names else names["loaded"].sae
        assert sae.cfg.d_sae == 256


def test_several_saes_share_a_repository_and_its_card(images, hub) -> None:
    publish_sae(DIGITS / WITHOUT, REPO)
    regularized = trained("topk", images, OffSupportL1(lam=0.1))
    publish_sae(regularized, REPO)
    publish_sae(DIGITS / WITH, REPO)
    listed = list_pretrained(REPO)
    assert [one.sae_id for one in listed] == [WITHOUT, WITH, "topk-96-off_support_l1-0.1"]
    assert [one.record.lam for one in listed] == [0.0, 0.003, 0.0]
    for one in listed:
        assert load_pretrained(REPO, one.sae_id).sae.cfg.d_sae == one.d_sae
    with pytest.raises(ValueError, match=f"has several SAEs: {WITHOUT}, {WITH}, topk"):
        load_pretrained(REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert card.count("monoloss_plugin writes from here") == 1
    for one in listed:
        assert f"### `{one.sae_id}`" in card
        assert f"({one.sae_id}/curves.png)" in card or one.sae_id.startswith("topk")
    assert hub.repos["model", REPO].messages[1:] == [
        f"Publish {m}" for m in (WITHOUT, "topk-96-off_support_l1-0.1", WITH)
    ]


def test_what_the_owner_wrote_in_the_card_stays(hub) -> None:
    own = "---\nlicense: apache-2.0\ntags: [mine]\n---\n# My SAEs\n\nTrained with care.\n"
    hub.put(REPO, {"README.md": own.encode()})
    publish_sae(DIGITS / WITHOUT, REPO, license="mit")
    first = hub.files(REPO)["README.md"].decode()
    hub.put(REPO, {"README.md": first.replace("to here -->", "to here -->\n\nThe end.").encode()})
    publish_sae(DIGITS / WITH, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert "# My SAEs\n\nTrained with care.\n" in card.text
    assert card.text.rstrip().endswith("The end.")
    assert card.text.count(f"### `{WITH}`") == card.text.count(f"### `{WITHOUT}`") == 1
    assert card.data.license == "apache-2.0"
    assert card.data.tags[0] == "mine"
    assert "monoloss" in card.data.tags


def test_publishing_again_sends_nothing_and_overwrites_nothing(images, hub) -> None:
    first = publish_sae(DIGITS / WITH, REPO, sae_id="one")
    before = hub.files(REPO)
    again = publish_sae(DIGITS / WITH, REPO, sae_id="one")
    assert {file.change for file in again.files} == {"same"}
    assert (again.commit, again.size) == (first.commit, 0)
    with pytest.raises(FileExistsError, match=r"has another one/cfg.json, one/curves.png"):
        publish_sae(DIGITS / WITHOUT, REPO, sae_id="one")
    assert hub.files(REPO) == before
    sae = make_sae("standard")
    done = publish_sae(sae, REPO, sae_id="one", overwrite=True)
    assert {f.path for f in done.files if f.change == "gone"} == {
        "one/curves.png",
        "one/sparsity.safetensors",
    }
    assert "one/curves.png" not in hub.files(REPO)
    assert "curves.png" not in hub.files(REPO)["README.md"].decode()
    assert load_pretrained(REPO).sae.cfg.architecture() == "standard"
    assert load_pretrained(REPO, "one", revision=first.commit).record.lam == 0.003


def test_overwriting_leaves_saes_below_alone(hub) -> None:
    publish_sae(DIGITS / WITH, REPO, sae_id="a/b")
    publish_sae(DIGITS / WITHOUT, REPO, sae_id="a")
    publish_sae(DIGITS / WITH, REPO, sae_id="a", overwrite=True)
    assert [one.sae_id for one in list_pretrained(REPO)] == ["a", "a/b"]


def test_a_dry_run_says_what_would_be_uploaded_and_uploads_nothing(hub) -> None:
    planned = publish_sae(DIGITS / WITH, REPO, dry_run=True)
    assert planned.commit is None
    assert not hub.repos
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    done = publish_sae(DIGITS / WITH, REPO)
    assert done.files == planned.files
    files = hub.files(REPO)
    assert {f.path: f.size for f in planned.files} == {
        name: len(content) for name, content in files.items() if name != ".gitattributes"
    }
    assert planned.size == sum(file.size for file in planned.files)


def test_a_dry_run_needs_no_hub(hub, caplog) -> None:
    hub.faults.append(Fault("GET", "", "drop", times=99))
    with caplog.at_level(logging.WARNING):
        planned = publish_sae(DIGITS / WITH, REPO, dry_run=True)
    assert {file.change for file in planned.files} == {"new"}
    assert f"this is what a new repository {REPO} would get" in caplog.text


def test_private_repositories(hub, monkeypatch) -> None:
    publish_sae(DIGITS / WITH, REPO, private=True)
    assert hub.repos["model", REPO].private
    assert load_pretrained(REPO).record.lam == 0.003
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        load_pretrained(REPO)
    hub.put("alice/public", {"README.md": b""})
    with pytest.raises(PermissionError, match="is there already, and public"):
        publish_sae(DIGITS / WITH, "alice/public", private=True, token=OWNER_TOKEN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_that_takes_any_norm(architecture, images, tmp_path) -> None:
    sae = trained(architecture, images)
    done = publish_sae(sae, REPO, take_any_norm=True)
    unit = as_inference(sae, tmp_path / "expected")
    loaded = load_pretrained(REPO, done.name)
    assert loaded.record.inputs == "as they are"
    x, scale = images[:100], torch.linspace(0.1, 30, 100)[:, None]
    latents, expected = loaded.sae.encode(scale * x), unit.encode(x)
    assert torch.equal(latents > 0, expected > 0)
    ratio = latents[latents > 0] / expected[expected > 0]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)
    found = loaded.sae.decode(loaded.sae.encode(scale * x)) / scale
    assert (found - unit.decode(expected)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="take_any_norm: only for an SAE"):
        publish_sae(loaded.sae, REPO, sae_id="again", take_any_norm=True)


def test_published_files_name_no_machine_path_and_no_token(images, tmp_path, hub) -> None:
    folder = tmp_path / "somewhere"
    as_inference(trained("batchtopk", images, MonoLoss(lam=1e-3)), folder)
    publish_sae(folder, REPO)
    for content in hub.files(REPO).values():
        assert str(tmp_path).encode() not in content
        assert str(Path.home()).encode() + b"/" not in content
        assert OWNER_TOKEN.encode() not in content


def test_what_cannot_be_published_is_named(images, tmp_path, hub) -> None:
    sae = make_sae("batchtopk")
    trainer = make_trainer(sae, stream(images))
    trainer.save_checkpoint("at-the-start", tmp_path)
    checkpoint = tmp_path / "at-the-start"
    unfolded = make_sae("standard", normalize_activations="expected_average_only_in")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "ae.pt").write_bytes(b"")
    cases = [
        (checkpoint, ValueError, "architecture 'batchtopk'; this is a training checkpoint"),
        (tmp_path / "none", FileNotFoundError, "no such folder"),
        (tmp_path, FileNotFoundError, "no cfg.json in it"),
        (tmp_path / "pickled", FileNotFoundError, "ae.pt would have to be unpickled"),
        (unfolded, ValueError, "is still 'expected_average_only_in'"),
        (sae.state_dict(), TypeError, "expected a SAELens SAE or a folder, got OrderedDict"),
        (type(sae), TypeError, "the class BatchTopKTrainingSAE"),
    ]
    for given, error, said in cases:
        with pytest.raises(error, match=said):
            publish_sae(given, REPO)
    for metrics in (3, {"r2": "much"}, ["r2"]):
        with pytest.raises(TypeError, match="evaluation: expected an Evaluation or numbers"):
            publish_sae(sae, REPO, evaluation=metrics)
    other = evaluate(load_pretrained("digits").sae, images)
    with pytest.raises(ValueError, match="evaluation: of 256 latents"):
        publish_sae(sae, REPO, evaluation=other)
    assert not hub.repos


def test_numbers_that_are_not_finite_are_left_out(hub) -> None:
    sae = make_sae("standard")
    publish_sae(sae, REPO, evaluation={"r2": 0.5, "monoscore_defined": float("nan")})
    assert load_pretrained(REPO).record.metrics == {"r2": 0.5}
    assert b"NaN" not in hub.files(REPO)["standard-96/monoloss.json"]


def test_a_repository_that_sae_lens_alone_has_published(images, tmp_path, hub) -> None:
    expected = as_inference(trained("topk", images), tmp_path / "topk")
    files = {f"layer/topk/{p.name}": p.read_bytes() for p in (tmp_path / "topk").iterdir()}
    hub.put("bob/theirs", files)
    loaded = load_pretrained("bob/theirs")
    assert_equal(loaded.sae, expected, images[:50])
    assert (loaded.record.losses, loaded.record.inputs, loaded.sparsity) == ([], None, None)


def test_parts_that_a_later_version_adds_to_a_record_are_left_out(hub) -> None:
    publish_sae(DIGITS / WITH, REPO, sae_id="one")
    record = json.loads(hub.files(REPO)["one/monoloss.json"])
    hub.put(REPO, {"one/monoloss.json": json.dumps({**record, "new": 1}).encode()})
    assert load_pretrained(REPO).record.lam == 0.003


def test_dtype_and_folders(tmp_path) -> None:
    loaded = load_pretrained(DIGITS, WITH, dtype="float64")
    assert loaded.sae.W_dec.dtype == torch.float64
    assert loaded.revision is None
    stored = load_file(DIGITS / WITH / "sae_weights.safetensors")
    assert torch.equal(loaded.sae.W_dec.float(), stored["W_dec"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="expected 'user/name', a folder, or one of digits"):
        load_pretrained("digit")


def test_a_string_is_a_folder_by_its_beginning_alone(tmp_path, monkeypatch, hub) -> None:
    monkeypatch.chdir(DIGITS.parent)
    for folder in ("./models", "../digits/models", str(DIGITS)):
        assert len(list_pretrained(folder)) == 2
        assert load_pretrained(folder, WITH).record.lam == 0.003
    with pytest.raises(FileNotFoundError, match=r"for the local 'models', write '\./models'"):
        load_pretrained("models")
    monkeypatch.chdir(DIGITS.parent.parent)
    with pytest.raises(RepositoryNotFoundError, match="for the local 'digits/models', write"):
        list_pretrained("digits/models")
    with pytest.raises(NotADirectoryError, match=r"repo_id: .*cfg.json is a file; give a folder"):
        load_pretrained(DIGITS / WITH / "cfg.json")
    with pytest.raises(NotADirectoryError, match=r"sae: .*cfg.json is a file; give a folder"):
        publish_sae(DIGITS / WITH / "cfg.json", REPO)


def test_an_sae_says_what_it_takes_to_sae_lens_alone(images, tmp_path, hub) -> None:
    sae = trained("topk", images)
    publish_sae(sae, REPO, sae_id="unit")
    publish_sae(sae, REPO, sae_id="raw", unit_norm=False)
    assert sae.cfg.metadata.monoloss is None or "inputs" not in sae.cfg.metadata.monoloss
    for name, inputs in (("unit", "unit norm"), ("raw", "as they are")):
        loaded = load_pretrained(REPO, name)
        assert loaded.record.inputs == loaded.sae.cfg.metadata.monoloss["inputs"] == inputs
        assert SAE.from_pretrained(REPO, name).cfg.metadata.monoloss["inputs"] == inputs
    publish_sae(load_pretrained(REPO, "raw").sae, REPO, sae_id="again")
    assert load_pretrained(REPO, "again").record.inputs == "as they are"
    for name in (WITH, WITHOUT):
        cfg = SAE.load_from_disk(DIGITS / name).cfg
        assert cfg.metadata.monoloss["inputs"] == "unit norm"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path, hub) -> None:
    shutil.copytree(DIGITS / WITH, tmp_path / "one")
    weights = load_file(tmp_path / "one" / "sae_weights.safetensors")
    weights["W_dec"][3, 5] = value
    save_file(weights, tmp_path / "one" / "sae_weights.safetensors")
    for use in (lambda: load_pretrained(tmp_path), lambda: publish_sae(tmp_path / "one", REPO)):
        with pytest.raises(ValueError, match=r"one/sae_weights.safetensors: W_dec: contains NaN"):
            use()
    sae = load_pretrained("digits").sae
    sae.b_enc.data[0] = value
    with pytest.raises(ValueError, match=r"sae/sae_weights.safetensors: b_enc: contains NaN"):
        publish_sae(sae, REPO)
    assert not hub.repos


KINDS = [None, int, 3, 2.5, [1], b"digits", "", {}, torch.zeros(2)]


@pytest.mark.parametrize("wrong", KINDS, ids=repr)
def test_arguments_of_the_wrong_kind_are_named(wrong, hub) -> None:
    features = load_features("digits", "train")
    good = DIGITS / WITH
    calls = {
        "repo_id": [
            load_pretrained,
            list_pretrained,
            load_features,
            lambda repo_id: publish_sae(good, repo_id),
            lambda repo_id: publish_features(features, repo_id),
        ],
        "sae": [lambda sae: publish_sae(sae, REPO)],
        "sae_id": [lambda sae_id: load_pretrained("digits", sae_id)],
        "revision": [lambda revision: load_pretrained("digits", revision=revision)],
        "split": [
            lambda split: load_features("digits", split),
            lambda split: publish_features(features, REPO, split=split),
        ],
        "config": [lambda config: publish_features(features, REPO, config=config)],
        "dtype": [lambda dtype: load_pretrained("digits", dtype=dtype)],
        "device": [lambda device: load_pretrained("digits", device=device)],
        "tags": [lambda tags: publish_sae(good, REPO, tags=tags)],
        "license": [lambda given: publish_features(features, REPO, license=given)],
        "features": [
            lambda given: publish_sae(good, REPO, features=given),
            lambda given: publish_features(given, REPO),
        ],
        "evaluation": [lambda given: publish_sae(good, REPO, evaluation=given)],
        "source": [from_monoloss, from_dictionary_learning, from_overcomplete, from_sparsify],
    }
    optional = ("sae_id", "revision", "split", "dtype", "license", "features", "evaluation")
    for argument, uses in calls.items():
        if (wrong is None and argument in optional) or (wrong == {} and argument == "evaluation"):
            continue
        for use in uses:
            with pytest.raises((TypeError, ValueError), match=rf"\b{argument}: "):
                use(wrong)
    assert not hub.repos


@pytest.mark.parametrize(
    ("encoder", "base_model"),
    [
        ({"library": "transformers", "name": "openai/clip-vit-large-patch14"}, "the same"),
        ({"library": "open_clip", "name": "hf-hub:laion/CLIP-ViT-B-32"}, "laion/CLIP-ViT-B-32"),
        ({"library": "timm", "name": "hf_hub:timm/vit_x@abc"}, "timm/vit_x"),
        ({"library": "open_clip", "name": "ViT-L-14/openai"}, None),
        ({"library": "timm", "name": "vit_large_patch16_224"}, None),
        ({"library": "transformers", "name": "my-folder"}, None),
        ({}, None),
    ],
)
def test_the_encoders_repository_is_named_only_where_its_name_tells_it(
    encoder, base_model, held_out, hub
) -> None:
    source = {"kind": "hub" if base_model else "folder", "name": "ylecun/mnist"}
    described = FeatureSet(held_out.dataset, {"encoder": encoder, "source": source})
    publish_sae(DIGITS / WITH, REPO, features=described)
    data = RepoCard(hub.files(REPO)["README.md"].decode()).data.to_dict()
    expected = encoder["name"] if base_model == "the same" else base_model
    assert data.get("base_model") == (expected and [expected])
    assert data.get("datasets") == (base_model and ["ylecun/mnist"])


CARDS = {
    "no metadata": "# Mine\n",
    "other line ends": "---\r\nlicense: mit\r\n---\r\n# Mine\r\n",
    "a byte order mark": "\ufeff---\nlicense: mit\n---\n# Mine\n",
    "a list of licences": "---\nlicense: mit\ntags: mine\nmodel-index: []\n---\n# Mine\n",
    "lost marks": "---\nlicense: mit\n---\n# Mine\n<!-- to here -->\n",
}


@pytest.mark.parametrize("case", CARDS)
def test_cards_of_all_kinds_are_kept(case, hub) -> None:
    hub.put(REPO, {"README.md": CARDS[case].encode()})
    for name in (WITH, WITHOUT, WITH):
        publish_sae(DIGITS / name, REPO, tags=["more"])
    card = RepoCard(hub.files(REPO)["README.md"].decode())
    assert card.text.count("# Mine") == 1
    assert card.text.count("writes from here") == 1
    assert card.text.count(f"### `{WITH}`") == card.text.count(f"### `{WITHOUT}`") == 1
    assert card.data.to_dict().get("license") in (None, "mit")
    assert card.data.tags.count("more") == 1
    assert "\ufeff" not in card.content


def test_a_card_whose_metadata_is_broken_is_named(hub) -> None:
    hub.put(REPO, {"README.md": b"---\ntags: [a\n---\n# Mine\n"})
    before = hub.files(REPO)
    with pytest.raises(ValueError, match=r"README.md: the metadata .* is not YAML; mend it first"):
        publish_sae(DIGITS / WITH, REPO)
    assert hub.files(REPO) == before


def test_what_a_folder_says_of_its_inputs_is_not_contradicted(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"unit_norm: .* says that it takes 'unit norm'"):
        publish_sae(DIGITS / WITH, REPO, unit_norm=False)
    publish_sae(make_sae("standard"), REPO, sae_id="raw", unit_norm=False)
    assert load_pretrained(REPO).record.inputs == "as they are"


def test_new_measurements_replace_old_ones_and_what_they_were_of(hub) -> None:
    publish_sae(DIGITS / WITH, REPO, sae_id="one", evaluation={"r2": 0.1, "accuracy": 0.5})
    record = load_pretrained(REPO).record
    assert record.metrics == {"r2": 0.1, "accuracy": 0.5}
    assert (record.baseline, record.evaluated_on) == ({}, {})
    card = hub.files(REPO)["README.md"].decode()
    assert "| accuracy | 0.500 |" in card
    publish_sae(DIGITS / WITH, REPO, sae_id="two")
    assert load_pretrained(REPO, "two").record.evaluated_on["samples"] == 599
    with pytest.raises(ValueError, match="baseline: needs an evaluation"):
        publish_sae(DIGITS / WITH, REPO, sae_id="three", baseline={"r2": 0.2})


def test_curves_of_saes_in_folders_and_at_the_root(hub) -> None:
    hub.put(REPO, {p.name: p.read_bytes() for p in (DIGITS / WITHOUT).iterdir()})
    for _ in range(2):
        done = publish_sae(DIGITS / WITH, REPO, sae_id="clip/one")
    assert {file.change for file in done.files} == {"same"}
    card = hub.files(REPO)["README.md"].decode()
    assert "](clip/one/curves.png)" in card
    assert "](curves.png)" in card
    root = load_pretrained(REPO, ".")
    assert root.record.lam == 0.0
    assert torch.equal(SAE.from_pretrained(REPO, ".").W_dec, root.sae.W_dec)


def test_files_of_ones_own_in_an_saes_folder_stay(hub) -> None:
    publish_sae(DIGITS / WITH, REPO, sae_id="one")
    hub.put(REPO, {"one/notes.txt": b"mine"})
    again = publish_sae(DIGITS / WITH, REPO, sae_id="one")
    assert {file.change for file in again.files} == {"same"}
    publish_sae(DIGITS / WITHOUT, REPO, sae_id="one", overwrite=True)
    assert hub.files(REPO)["one/notes.txt"] == b"mine"
    hub.put(REPO, {"two": b"a file"})
    with pytest.raises(FileExistsError, match=r"a file two is there, where two/cfg.json should go"):
        publish_sae(DIGITS / WITH, REPO, sae_id="two")


def test_a_neighbour_that_cannot_be_read_is_only_said(hub, caplog) -> None:
    publish_sae(DIGITS / WITHOUT, REPO, sae_id="theirs")
    whole = hub.files(REPO)
    for name, content, listed in (
        ("monoloss.json", b"{oops", ["one"]),
        ("monoloss.json", b'{"metrics": {"r2": 1' + b"0" * 400 + b"}}", ["one"]),
        ("cfg.json", b"[]", ["one"]),
        ("cfg.json", b'{"d_in": 4, "d_sae": "<img src=x>"}', ["one"]),
        ("cfg.json", b" " * (17 << 20), ["one"]),
    ):
        hub.put(REPO, {**whole, f"theirs/{name}": content})
        publish_sae(DIGITS / WITH, REPO, sae_id="one", overwrite=True)
        assert [one.sae_id for one in list_pretrained(REPO)] == listed
        assert "<img" not in hub.files(REPO)["README.md"].decode()
        assert "alice/vision-saes/theirs" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    "said",
    [
        "text",
        {"terms": [1]},
        {"terms": {"a": {"lam": 1}}},
        {"terms": {"a": {"name": "a", "lam": "x"}}},
        {"converted_from": 3},
        {"refit": {"ridge": "much"}},
    ],
)
def test_metadata_of_others_in_our_place_is_named(said, hub) -> None:
    sae = load_pretrained("digits").sae
    sae.cfg.metadata.monoloss = said
    with pytest.raises(ValueError, match=r"metadata.monoloss is not what this package writes"):
        publish_sae(sae, REPO)


def test_a_refitted_decoder_is_told_on_the_card(held_out, hub) -> None:
    sae = load_pretrained("digits", WITH).sae
    found = refit_decoder(sae, held_out, held_out=held_out)
    publish_sae(sae, REPO)
    record = load_pretrained(REPO).record
    assert (record.refit["r2_before"], record.refit["r2_after"]) == found[:2]
    told = f"held-out R² {found.r2_after:.3f} instead of {found.r2_before:.3f}"
    assert told in hub.files(REPO)["README.md"].decode()


def test_a_name_is_made_of_what_a_folder_may_be_called(images) -> None:
    sae = trained("standard", images, MonoLoss(lam=3e-4, name="my loss/2"), steps=5)
    assert publish_sae(sae, REPO).name == "standard-96-my-loss-2-0.0003"


def test_a_picture_that_is_none_is_not_published(tmp_path, hub) -> None:
    folder = tmp_path / "sae"
    shutil.copytree(DIGITS / WITH, folder)
    (folder / "curves.png").unlink()
    (tmp_path / "secret").write_text("root:x:0:0")
    (folder / "curves.png").symlink_to(tmp_path / "secret")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"curves.png: not a PNG picture"):
        publish_sae(folder, REPO)
    (folder / "curves.png").unlink()
    publish_sae(folder, REPO, sae_id="one")
    files = {name for name in hub.files(REPO) if name.startswith("one/")}
    assert files == {f"one/{p.name}" for p in (DIGITS / WITH).iterdir()} - {"one/curves.png"}


def test_transcoders_of_another_width(images) -> None:
    config = sae_lens.TranscoderConfig(d_in=64, d_out=24, d_sae=32, apply_b_dec_to_input=False)
    transcoder = sae_lens.Transcoder(config)
    publish_sae(transcoder, REPO, sae_id="transcoder")
    loaded = load_pretrained(REPO).sae
    assert_equal(loaded, transcoder, images[:20])
    with pytest.raises(ValueError, match="take_any_norm: not for transcoder"):
        publish_sae(transcoder, REPO, sae_id="scaled", take_any_norm=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions_are_published_as_they_are(dtype, images) -> None:
    sae = make_sae("standard", dtype=dtype)
    publish_sae(sae, REPO)
    loaded = load_pretrained(REPO).sae
    assert loaded.W_dec.dtype == sae.W_dec.dtype == getattr(torch, dtype)
    assert torch.equal(loaded.W_dec, sae.W_dec)


def test_a_folder_called_like_a_bundled_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DIGITS / WITHOUT, tmp_path / "digits" / "mine")
    assert load_pretrained(Path("digits")).sae_id == "mine"
    assert load_pretrained("digits").sae_id == WITH


def test_bad_names_and_devices(hub) -> None:
    for arguments, error, said in (
        ({"sae_id": "README.md"}, ValueError, "sae_id: README.md is the card's name"),
        ({"base_model": "ViT B/32 !!"}, ValueError, "base_model: "),
        ({"dataset": "a b"}, ValueError, "dataset: "),
        ({"tags": "abc"}, TypeError, "tags: expected a list"),
    ):
        with pytest.raises(error, match=said):
            publish_sae(DIGITS / WITH, REPO, **arguments)
    with pytest.raises(ValueError, match="device: cannot use 'tpu7' here"):
        load_pretrained("digits", device="tpu7")
    assert not hub.requests

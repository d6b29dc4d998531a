"""SAELens's own ``from_pretrained`` loads other libraries' SAEs, with our loaders as converters."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
)
from torch import Tensor

from monoloss_plugin.convert import (
    dictionary_learning_loader,
    from_dictionary_learning,
    from_monoloss,
    from_overcomplete,
    from_prisma,
    from_saev,
    from_sparsify,
    monoloss_loader,
    overcomplete_loader,
    prisma_loader,
    saev_loader,
    sparsify_loader,
)
from tests import stage
from tests.convert.test_git_only import saev_file, weights

REPO = "bob/their-saes"
DICTIONARY = "run/trainer_0"


@pytest.fixture
def x() -> Tensor:
    return stage.features("held_out")[:64]


@pytest.fixture
def there(hub, tmp_path, monkeypatch) -> Path:
    """A folder of each library's checkpoint, and the same in the repository."""
    monkeypatch.chdir(tmp_path)
    stage.checkpoints()
    files = {f"{DICTIONARY}/{p.name}": p.read_bytes() for p in Path("trainer_0").iterdir()}
    files |= {f"others/{name}": Path(name).read_bytes() for name in ("checkpoint.pt", "sae.pt")}
    files |= {f"others/layers.3/{p.name}": p.read_bytes() for p in Path("layers.3").iterdir()}
    saev_file(Path("saev.pt"), {"cls": "Relu", "params": {}}, weights())
    Path("prisma").mkdir()
    torch.save(weights(), "prisma/weights.pt")
    Path("prisma/config.json").write_text(
        '{"architecture": "standard", "activation_fn_str": "relu"}'
    )
    others = ("saev.pt", "prisma/weights.pt", "prisma/config.json")
    hub.put(REPO, files | {name: Path(name).read_bytes() for name in others})
    return tmp_path


def assert_same(found: SAE, expected: SAE, x: Tensor) -> None:
    assert found.cfg.architecture() == expected.cfg.architecture()
    assert found.cfg.metadata.monoloss == expected.cfg.metadata.monoloss
    latents = expected.encode(x)
    assert (latents > 0).any()
    assert torch.equal(found.encode(x), latents)
    assert torch.equal(found.decode(latents), expected.decode(latents))


def test_every_loader_gives_what_its_converter_gives(there, x) -> None:
    expected = from_dictionary_learning(there / "trainer_0")
    found = SAE.from_pretrained(REPO, DICTIONARY, converter=dictionary_learning_loader)
    assert_same(found, expected, x)

    batch = stage.features()[:512]
    loader = partial(monoloss_loader, features=batch)
    found = SAE.from_pretrained(REPO, "others/checkpoint.pt", converter=loader)
    assert_same(found, from_monoloss(there / "checkpoint.pt", features=batch), x)

    options = {"sae_class": "TopKSAE", "top_k": 5}
    loader = partial(overcomplete_loader, **options)
    found = SAE.from_pretrained(REPO, "others/sae.pt", converter=loader)
    assert_same(found, from_overcomplete(there / "sae.pt", **options), x)

    found = SAE.from_pretrained(REPO, "saev.pt", converter=saev_loader)
    assert_same(found, from_saev(there / "saev.pt"), x)
    found = SAE.from_pretrained(REPO, "prisma/weights.pt", converter=prisma_loader)
    assert_same(found, from_prisma(there / "prisma/weights.pt"), x)
    found = SAE.from_pretrained(REPO, "others/layers.3", converter=sparsify_loader)
    assert_same(found, from_sparsify(there / "layers.3"), x)


def test_sae_lens_has_the_loaders_by_name(there, x) -> None:
    name = "monoloss_dictionary_learning"
    loader = NAMED_PRETRAINED_SAE_LOADERS[name]
    sae, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(
        REPO, DICTIONARY, converter=loader
    )
    assert_same(sae, from_dictionary_learning(there / "trainer_0"), x)
    assert (cfg["d_in"], cfg["d_sae"], sparsity) == (64, 48, None)
    read = NAMED_PRETRAINED_SAE_CONFIG_GETTERS[name](REPO, DICTIONARY, "cpu", False, {"a": 1})
    assert read["a"] == 1
    assert read["architecture"] == cfg["architecture"] == "jumprelu"
    for library in ("monoloss", "overcomplete", "prisma", "saev", "sparsify"):
        assert f"monoloss_{library}" in NAMED_PRETRAINED_SAE_LOADERS
        assert f"monoloss_{library}" in NAMED_PRETRAINED_SAE_CONFIG_GETTERS


def test_the_dtype_that_sae_lens_is_asked_for(there) -> None:
    sae = SAE.from_pretrained(
        REPO, DICTIONARY, dtype="bfloat16", converter=dictionary_learning_loader
    )
    assert {t.dtype for t in sae.state_dict().values()} == {torch.bfloat16}
    assert sae.cfg.dtype == "bfloat16"


def test_a_dictionary_in_the_main_folder_without_its_config(there, hub, x) -> None:
    hub.put("bob/bare", {"ae.pt": (there / "trainer_0/ae.pt").read_bytes()})
    with pytest.raises(ValueError, match="give dict_class"):
        SAE.from_pretrained("bob/bare", ".", converter=dictionary_learning_loader)
    loader = partial(dictionary_learning_loader, dict_class="BatchTopKSAE")
    found = SAE.from_pretrained("bob/bare", ".", converter=loader)
    assert_same(found, from_dictionary_learning(there / "trainer_0"), x)


def test_one_commit_of_a_repository(there, hub, x) -> None:
    before = hub.repos["model", REPO].refs["main"]
    hub.put(REPO, {f"{DICTIONARY}/ae.pt": b"changed"})
    with pytest.raises(ValueError, match=r"ae\.pt is not a checkpoint of tensors"):
        SAE.from_pretrained(REPO, DICTIONARY, converter=dictionary_learning_loader)
    loader = partial(dictionary_learning_loader, revision=before)
    found = SAE.from_pretrained(REPO, DICTIONARY, converter=loader)
    assert_same(found, from_dictionary_learning(there / "trainer_0"), x)


def test_what_is_not_there_is_named(there) -> None:
    with pytest.raises(EntryNotFoundError, match=r"run/trainer_1/ae\.pt"):
        SAE.from_pretrained(REPO, "run/trainer_1", converter=dictionary_learning_loader)
    with pytest.raises(EntryNotFoundError, match=r"others/sae2\.pt"):
        SAE.from_pretrained(REPO, "others/sae2.pt", converter=overcomplete_loader)

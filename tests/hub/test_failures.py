"""Refusals, lost connections and other people's commits: what is raised, and what is left."""

from __future__ import annotations

import logging
import re
import traceback

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from monoloss_plugin import list_pretrained, load_pretrained, publish_sae
from monoloss_plugin.cli.hub_errors import explain
from monoloss_plugin.hub.repository import bundled_folder
from tests.hub.conftest import use_cache
from tests.hub.server import OWNER_TOKEN, READ_TOKEN, Fault

REPO = "alice/vision-saes"
ONE, OTHER = (
    bundled_folder("digits") / "models" / name
    for name in ("batchtopk-256-monoloss-0.003", "batchtopk-256")
)


@pytest.fixture
def everything_logged(caplog, capfd):
    """All that any logger or print has said, down to the clients' debugging."""
    huggingface_hub.logging.set_verbosity_debug()
    huggingface_hub.logging.enable_propagation()
    with caplog.at_level(logging.DEBUG):
        yield lambda: caplog.text + "".join(capfd.readouterr())
    huggingface_hub.logging.set_verbosity_warning()
    huggingface_hub.logging.disable_propagation()


WRONG = "hf_thisOneIsWrongWrongWrong"
REFUSALS = {
    "wrong": (WRONG, REPO, r"does not accept your token \(401.*hf auth login"),
    "none": (None, REPO, "hf auth login"),
    "read only": (READ_TOKEN, REPO, "may not write to .*hf auth login"),
    "another namespace": (OWNER_TOKEN, "bob/saes", "may not write to .*rights to write to bob"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_token_that_may_not_write(case, hub, monkeypatch, everything_logged) -> None:
    token, repo, said = REFUSALS[case]
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HfHubHTTPError) as refused:
        publish_sae(ONE, repo)
    assert re.search(said, explain(refused.value))
    assert not hub.repos
    if token is not None:
        assert token not in everything_logged() + str(refused.value) + repr(refused.value)


def test_the_token_is_in_no_log_of_a_whole_run(hub, everything_logged) -> None:
    publish_sae(ONE, REPO)
    load_pretrained(REPO)
    seen = everything_logged()
    assert "About to commit" in seen
    assert "hf_owner" not in seen


def test_malformed_tokens_are_not_shown(hub, monkeypatch, everything_logged) -> None:
    monkeypatch.delenv("HF_TOKEN")
    publish_sae(ONE, REPO, token=f" {OWNER_TOKEN}\n")
    for token in ("", "  ", "hf_se\ncret", "hf_s\u00e9cret", "hf_se cret"):
        for use, arguments in ((publish_sae, (ONE, REPO)), (load_pretrained, (REPO,))):
            with pytest.raises(ValueError, match="it is not shown") as refused:
                use(*arguments, token=token)
            shown = "".join(traceback.format_exception(refused.value)) + everything_logged()
            assert "cret" not in shown.replace("secret", "")


def test_what_the_hub_does_not_have_is_the_clients_own_error(hub) -> None:
    publish_sae(ONE, REPO)
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
    hub.faults.append(Fault("GET", "/api/models/bob/gated", 403, headers=headers))
    for arguments, error, said in (
        ({"repo_id": REPO, "token": WRONG}, HfHubHTTPError, "does not accept your token"),
        ({"repo_id": "alice/no"}, RepositoryNotFoundError, "the Hub knows no repository alice/no,"),
        ({"repo_id": REPO, "revision": "v2"}, RevisionNotFoundError, f"{REPO} has no such branch"),
        ({"repo_id": "bob/gated"}, GatedRepoError, "bob/gated is gated: accept its conditions"),
    ):
        with pytest.raises(error) as raised:
            load_pretrained(**arguments)
        assert said in explain(raised.value)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/storage/", "drop", times=99),
        Fault("PUT", "/storage/", 503, times=99),
        Fault("POST", "/preupload/", "drop", times=99),
        Fault("POST", "/commit/", "drop", times=99),
        Fault("POST", "/commit/", 500),
        Fault("POST", "/commit/", 429),
        Fault("POST", "objects/batch", 502, times=99),
        Fault("POST", "/api/repos/create", 500),
    ],
    ids=lambda fault: f"{fault.path.strip('/')} {fault.action}",
)
def test_a_failed_upload_leaves_nothing_and_can_be_run_again(fault, hub) -> None:
    hub.faults.append(fault)
    with pytest.raises((HTTPError, RuntimeError)) as failed:
        publish_sae(ONE, REPO)
    assert "run it again" in explain(failed.value)
    if hub.repos:
        assert list(hub.files(REPO)) == [".gitattributes"]
    hub.faults.clear()
    arrived = set(hub.storage)
    hub.requests.clear()
    done = publish_sae(ONE, REPO)
    large = {"sae_weights.safetensors", "sparsity.safetensors", "curves.png"}
    puts = sum(method == "PUT" for method, _ in hub.requests)
    assert puts == len(large) - len(arrived)
    assert {path.partition("/")[2] for path in hub.files(REPO)} >= large
    assert load_pretrained(REPO).revision == done.commit


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub) -> None:
    hub.faults.append(Fault("POST", "/commit/", "lose"))
    with pytest.raises(HTTPError):
        publish_sae(ONE, REPO)
    again = publish_sae(ONE, REPO)
    assert {file.change for file in again.files} == {"same"}
    assert len(hub.repos["model", REPO].messages) == 2


def test_what_others_commit_meanwhile_is_kept(hub) -> None:
    publish_sae(OTHER, REPO, sae_id="first")
    theirs = {f"theirs/{p.name}": p.read_bytes() for p in OTHER.iterdir()}
    fault = Fault("POST", "/commit/", 0, before=lambda: hub.put(REPO, {**theirs, "NOTES": b"x"}))
    hub.faults.append(fault)
    with pytest.raises(HfHubHTTPError) as failed:
        publish_sae(ONE, REPO, sae_id="second")
    assert (
        explain(failed.value) == f"somebody else has changed {REPO} in the meantime; run it again"
    )
    assert not any(path.startswith("second/") for path in hub.files(REPO))
    publish_sae(ONE, REPO, sae_id="second")
    assert [one.sae_id for one in list_pretrained(REPO)] == ["first", "second", "theirs"]
    files = hub.files(REPO)
    assert files["NOTES"] == b"x"
    assert b"### `theirs`" in files["README.md"]


def test_a_repository_that_appears_meanwhile_is_left_alone(hub) -> None:
    theirs = {"one/cfg.json": b"{}", "README.md": b"# Theirs\n"}
    made = Fault("POST", "/api/repos/create", 0, before=lambda: hub.put(REPO, theirs))
    hub.faults.append(made)
    with pytest.raises(HfHubHTTPError) as failed:
        publish_sae(ONE, REPO, sae_id="one")
    assert "somebody else has changed" in explain(failed.value)
    assert hub.files(REPO) == theirs
    with pytest.raises(FileExistsError, match=r"has another one/cfg.json already"):
        publish_sae(ONE, REPO, sae_id="one")
    with pytest.raises(PermissionError, match="is there already, and public"):
        publish_sae(ONE, REPO, private=True)
    publish_sae(ONE, REPO, sae_id="two")
    assert b"# Theirs" in hub.files(REPO)["README.md"]


def test_a_card_that_the_hub_refuses_leaves_no_empty_repository(hub) -> None:
    with pytest.raises(ValueError, match=r"license.* must be one of, not MIT"):
        publish_sae(ONE, REPO, license="MIT")
    assert not hub.repos


def test_an_organizations_rule_for_new_repositories_holds(hub) -> None:
    hub.private_by_default = True
    publish_sae(ONE, REPO)
    assert hub.repos["model", REPO].private


def test_trees_of_many_pages(hub) -> None:
    hub.page = 2
    publish_sae(ONE, REPO, sae_id="one")
    publish_sae(OTHER, REPO, sae_id="two")
    assert [one.sae_id for one in list_pretrained(REPO)] == ["one", "two"]
    assert load_pretrained(REPO, "two").sparsity is not None


def test_a_download_that_breaks_off_goes_on(hub, tmp_path, monkeypatch) -> None:
    publish_sae(ONE, REPO)
    use_cache(monkeypatch, tmp_path / "fresh")
    hub.faults.append(Fault("GET", "/storage/", "half", times=1))
    assert load_pretrained(REPO).record.lam == 0.003


def test_half_a_file_is_never_loaded(hub, tmp_path, monkeypatch) -> None:
    publish_sae(ONE, REPO)
    use_cache(monkeypatch, tmp_path / "fresh")
    hub.faults.append(Fault("GET", "/storage/", "half", times=99))
    with pytest.raises((HTTPError, OSError)):
        load_pretrained(REPO)
    hub.faults.clear()
    expected = load_pretrained(ONE.parent, ONE.name).sae
    assert torch.equal(load_pretrained(REPO).sae.W_dec, expected.W_dec)


@pytest.mark.parametrize("action", ["drop", 503])
def test_the_cache_serves_where_the_hub_does_not(action, hub) -> None:
    publish_sae(ONE, REPO, sae_id="one")
    publish_sae(OTHER, REPO, sae_id="two")
    online = load_pretrained(REPO, "one")
    hub.faults += [Fault(method, "", action, times=99) for method in ("GET", "HEAD")]
    offline = load_pretrained(REPO, "one")
    assert torch.equal(offline.sae.W_dec, online.sae.W_dec)
    assert (offline.revision, offline.record) == (online.revision, online.record)
    pinned = load_pretrained(REPO, "one", revision=online.revision)
    assert pinned.revision == online.revision
    assert [one.sae_id for one in list_pretrained(REPO)] == ["one"]
    with pytest.raises(FileNotFoundError, match="has no SAE 'two'; it has one"):
        load_pretrained(REPO, "two")
    with pytest.raises(HTTPError) as failed:
        load_pretrained("alice/elsewhere")
    assert "the Hub could not be reached" in explain(failed.value)


def test_the_cache_alone(hub) -> None:
    with pytest.raises(LocalEntryNotFoundError) as failed:
        load_pretrained(REPO, local_files_only=True)
    assert "is not in the cache" in explain(failed.value)
    publish_sae(ONE, REPO)
    load_pretrained(REPO)
    hub.requests.clear()
    assert load_pretrained(REPO, local_files_only=True).record.lam == 0.003
    assert not hub.requests


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_files_that_cannot_be_had_are_no_missing_files(method, hub) -> None:
    publish_sae(ONE, REPO)
    hub.faults.append(Fault(method, "/resolve/|/storage/", "drop", times=99))
    with pytest.raises((HTTPError, LocalEntryNotFoundError)) as failed:
        load_pretrained(REPO)
    assert "the Hub could not be reached" in explain(failed.value)

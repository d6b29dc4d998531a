"""Refusals, lost connections and other hands: what the user reads, and what is left behind."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import tempfile
import traceback

import huggingface_hub
import pytest
import torch

from monoloss_plugin import (
    list_pretrained,
    load_features,
    load_pretrained,
    publish_features,
    publish_sae,
)
from monoloss_plugin.hub.bundled import folder_of
from monoloss_plugin.hub.staging import staging
from tests.hub.conftest import use_cache
from tests.hub.server import OWNER_TOKEN, READ_TOKEN, Fault

REPO = "alice/vision-saes"
ONE, OTHER = (
    folder_of("digits") / "models" / name
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
    "wrong": (WRONG, REPO, r"token: the Hub does not accept it .*\(401\).*hf auth login"),
    "none": (None, REPO, "token: .*hf auth login"),
    "read only": (READ_TOKEN, REPO, "may not write to alice/vision-saes.*write access"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_token_that_may_not_write(case, hub, monkeypatch, everything_logged) -> None:
    token, repo, said = REFUSALS[case]
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=said) as refused:
        publish_sae(ONE, repo)
    assert not hub.repos
    if token is not None:
        seen = everything_logged()
        for error in (refused.value, refused.value.__cause__):
            seen += str(error) + repr(error)
        assert token not in seen


def test_a_token_for_another_namespace(hub) -> None:
    with pytest.raises(PermissionError, match="may not write to bob/saes"):
        publish_sae(ONE, "bob/saes")


def test_the_token_is_in_no_log_of_a_whole_run(hub, everything_logged) -> None:
    publish_sae(ONE, REPO)
    load_pretrained(REPO)
    seen = everything_logged()
    assert "About to commit" in seen
    assert "hf_owner" not in seen


def test_a_wrong_token_to_read(hub) -> None:
    publish_sae(ONE, REPO)
    with pytest.raises(PermissionError, match=r"does not accept it .* \(401\)"):
        load_pretrained(REPO, token=WRONG)
    with pytest.raises(FileNotFoundError, match="knows no repository alice/nothing"):
        load_pretrained("alice/nothing")
    with pytest.raises(ValueError, match=r"revision: .* has no such branch, tag or commit"):
        load_pretrained(REPO, revision="v2")


def puts(hub) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


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
def test_a_failed_upload_leaves_nothing_and_can_be_run_again(fault, hub, capfd) -> None:
    hub.faults.append(fault)
    with pytest.raises(ConnectionError, match="the Hub"):
        publish_sae(ONE, REPO)
    said = capfd.readouterr().err
    assert not [one for one in ("thrown while", "Retrying", "HTTP Error") if one in said]
    if hub.repos:
        assert list(hub.files(REPO)) == [".gitattributes"]
    hub.faults.clear()
    arrived = set(hub.storage)
    hub.requests.clear()
    done = publish_sae(ONE, REPO)
    large = {"sae_weights.safetensors", "sparsity.safetensors", "curves.png"}
    assert puts(hub) == len(large) - len(arrived)
    assert {path.partition("/")[2] for path in hub.files(REPO)} >= large
    assert load_pretrained(REPO).revision == done.commit


def test_an_upload_that_loses_one_connection_goes_on(hub) -> None:
    hub.faults.append(Fault("PUT", "/storage/", "drop"))
    publish_sae(ONE, REPO)
    assert load_pretrained(REPO).record.lam == 0.003


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub) -> None:
    hub.faults.append(Fault("POST", "/commit/", "lose"))
    with pytest.raises(ConnectionError, match="run it again: what has arrived is not sent twice"):
        publish_sae(ONE, REPO)
    again = publish_sae(ONE, REPO)
    assert {file.change for file in again.files} == {"same"}
    assert len(hub.repos["model", REPO].messages) == 2


def test_what_others_commit_meanwhile_is_kept(hub) -> None:
    publish_sae(OTHER, REPO, sae_id="first")
    theirs = {f"theirs/{p.name}": p.read_bytes() for p in OTHER.iterdir()}
    fault = Fault("POST", "/commit/", 0, before=lambda: hub.put(REPO, {**theirs, "NOTES": b"x"}))
    hub.faults.append(fault)
    publish_sae(ONE, REPO, sae_id="second")
    assert fault.times == 0
    assert [one.sae_id for one in list_pretrained(REPO)] == ["first", "second", "theirs"]
    files = hub.files(REPO)
    assert files["NOTES"] == b"x"
    assert b"### `theirs`" in files["README.md"]


def test_somebody_who_commits_all_the_time_is_named_at_last(hub) -> None:
    publish_sae(OTHER, REPO, sae_id="first")
    numbers = iter(range(9))
    hub.faults.append(
        Fault("POST", "/commit/", 0, 9, before=lambda: hub.put(REPO, {f"{next(numbers)}": b"x"}))
    )
    with pytest.raises(OSError, match="somebody else has committed to alice/vision-saes"):
        publish_sae(ONE, REPO, sae_id="second")
    assert not any(path.startswith("second/") for path in hub.files(REPO))


def appears(hub, files: dict[str, bytes]) -> None:
    """Have somebody else make the repository just before we do."""
    made = Fault("POST", "/api/repos/create", 0, before=lambda: hub.put(REPO, files))
    hub.faults.append(made)


def test_a_repository_that_appears_meanwhile_is_added_to(hub) -> None:
    appears(hub, {"NOTES": b"mine", "README.md": b"# Theirs\n"})
    publish_sae(ONE, REPO)
    files = hub.files(REPO)
    assert files["NOTES"] == b"mine"
    assert b"# Theirs" in files["README.md"]
    assert load_pretrained(REPO).record.lam == 0.003


def test_a_repository_that_appears_meanwhile_is_not_overwritten(hub) -> None:
    appears(hub, {"one/cfg.json": b"{}"})
    with pytest.raises(FileExistsError, match=r"has another one/cfg.json already"):
        publish_sae(ONE, REPO, sae_id="one")
    hub.reset()
    appears(hub, {"README.md": b"# Theirs\n"})
    with pytest.raises(PermissionError, match="is there already, and public"):
        publish_sae(ONE, REPO, private=True)
    assert list(hub.files(REPO)) == ["README.md"]


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


def test_tokens_as_files_and_typing_leave_them(hub, monkeypatch, everything_logged) -> None:
    monkeypatch.delenv("HF_TOKEN")
    publish_sae(ONE, REPO, token=f" {OWNER_TOKEN}\n")
    for token in ("", "  ", "hf_se\ncret", "hf_s\u00e9cret", "hf_se cret"):
        for use in (publish_sae, load_pretrained):
            arguments = (ONE, REPO) if use is publish_sae else (REPO,)
            with pytest.raises(PermissionError, match="it is not shown") as refused:
                use(*arguments, token=token)
            shown = "".join(traceback.format_exception(refused.value)) + everything_logged()
            assert "cret" not in shown.replace("secret", "").replace("hf_se", "", 0)


def test_a_download_that_breaks_off_goes_on(hub, tmp_path, monkeypatch) -> None:
    publish_sae(ONE, REPO)
    use_cache(monkeypatch, tmp_path / "fresh")
    hub.faults.append(Fault("GET", "/storage/", "half", times=1))
    assert load_pretrained(REPO).record.lam == 0.003


def test_half_a_file_is_never_loaded(hub, tmp_path, monkeypatch) -> None:
    publish_sae(ONE, REPO)
    use_cache(monkeypatch, tmp_path / "fresh")
    hub.faults.append(Fault("GET", "/storage/", "half", times=99))
    with pytest.raises(ConnectionError, match="the Hub could not be reached"):
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
    with pytest.raises(ConnectionError, match="alice/elsewhere is not in the cache"):
        load_pretrained("alice/elsewhere")


def test_the_cache_alone(hub) -> None:
    with pytest.raises(FileNotFoundError, match="alice/vision-saes is not in the cache"):
        load_pretrained(REPO, local_files_only=True)
    publish_sae(ONE, REPO)
    load_pretrained(REPO)
    hub.requests.clear()
    assert load_pretrained(REPO, local_files_only=True).record.lam == 0.003
    assert not hub.requests


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_files_that_cannot_be_had_are_no_missing_files(method, hub) -> None:
    publish_sae(ONE, REPO)
    hub.faults.append(Fault(method, "/resolve/|/storage/", "drop", times=99))
    with pytest.raises(ConnectionError, match="the Hub could not be reached"):
        load_pretrained(REPO)


def test_a_gated_repository_names_its_conditions(hub) -> None:
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
    hub.faults.append(Fault("GET", "/api/models/bob/gated", 403, headers=headers))
    with pytest.raises(PermissionError, match="asks for its conditions to be accepted"):
        load_pretrained("bob/gated")


def test_what_the_clients_transfer_raises_is_no_connection(hub, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("Data processing error: storage said no")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fail)
    with pytest.raises(ConnectionError, match="Data processing error: storage said no; run it"):
        publish_sae(ONE, REPO)


def publish_in_a_process_that_is_killed(hub) -> None:
    """Publish in another process, which is killed for good when all but the commit is done."""
    hub.faults.append(Fault("POST", "/commit/", "drop", before=lambda: process.kill()))
    for _ in range(3):  # a copy of a process with threads may hang, and then another does not
        process = multiprocessing.get_context("fork").Process(target=publish_alone)
        process.start()
        process.join(20)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def publish_alone() -> None:
    torch.set_num_threads(1)  # the threads of the process before it are not here
    publish_sae(ONE, REPO)


def test_what_a_killed_run_leaves_the_next_one_sweeps(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    publish_in_a_process_that_is_killed(hub)
    (left,) = tmp_path.glob("monoloss-publish-*")
    assert list(left.rglob("sae_weights.safetensors"))
    assert list(hub.files(REPO)) == [".gitattributes"]
    hub.faults.clear()
    publish_features(load_features("digits", "train"), "alice/set", dry_run=True)
    assert not list(tmp_path.glob("monoloss-*"))
    assert publish_sae(ONE, REPO).commit == hub.repos["model", REPO].refs["main"]
    assert not list(tmp_path.glob("monoloss-*"))


def test_a_run_at_work_and_planted_links_are_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").touch()
    (tmp_path / "monoloss-publish-link").symlink_to(mine)
    with staging() as first, staging() as second:
        (first / "file").touch()
        with staging():
            assert (first / "file").exists()
            assert second.is_dir()
    assert (mine / "thesis").exists()
    assert not first.exists()

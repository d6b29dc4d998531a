"""What the list of hosts says, and what users are told if a host is not as tested."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from monoloss_plugin import cli, hosts
from monoloss_plugin.attaching import AttachedTerm, Attachment
from monoloss_plugin.hosts import HOSTS, check_version, failed_import, moved_seam

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("key", HOSTS)
def test_what_is_tested_is_what_the_adapter_is_made_for(key) -> None:
    host = HOSTS[key]
    assert SpecifierSet(host.versions).contains(host.tested)
    pins = [ROOT / "constraints.txt", *(ROOT / "tests/hosts").glob("*/requirements.txt")]
    assert f"\n{host.package}=={host.tested}" in "\n".join(path.read_text() for path in pins)
    assert host.installed is None or host.fits


def test_another_version_is_warned_of_once(monkeypatch) -> None:
    monkeypatch.setattr(hosts, "version", lambda _: "0.9")
    monkeypatch.setattr(hosts, "_warned", set())
    with pytest.warns(UserWarning, match="timm 0.9 is installed.* made for timm >=1.0.28,<2"):
        check_version("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version("timm")


def test_a_method_that_has_moved_names_both_versions() -> None:
    class Ours(Attachment[AttachedTerm]):
        host = "timm"
        replaces = ("run",)

        def run(self, inner):
            return inner()

    class Theirs:
        pass

    said = f"timm {HOSTS['timm'].installed} has no Theirs.run.* tested with timm 1"
    with pytest.raises(RuntimeError, match=said):
        Ours.of(Theirs())


@pytest.mark.parametrize(
    ("gone", "said"), [("timm.task", "timm.task"), ("timm.task:", "timm.task.TrainingTask")]
)
def test_a_moved_import_is_not_called_a_missing_library(monkeypatch, gone, said) -> None:
    module, name, _ = gone.partition(":")
    replaced = ModuleType(module) if name else None
    monkeypatch.setitem(sys.modules, module, replaced)
    monkeypatch.delitem(sys.modules, "monoloss_plugin.adapters.timm", raising=False)
    with pytest.raises(RuntimeError, match=rf"timm \S+ has no {said}, which .*tested with timm 1"):
        importlib.import_module("monoloss_plugin.adapters.timm")


def test_a_broken_library_of_the_host_is_named() -> None:
    error = ModuleNotFoundError("No module named 'antlers'", name="antlers")
    assert "needs antlers" in str(failed_import(error, "timm"))
    assert isinstance(moved_seam("timm", "x"), RuntimeError)


def test_the_command_lists_every_host_and_its_line(monkeypatch) -> None:
    def version(package: str) -> str:
        if package == "lightning":
            raise PackageNotFoundError
        return {"timm": "0.9"}.get(package, HOSTS["sae_lens"].tested)

    monkeypatch.setattr(hosts, "version", version)
    done = CliRunner().invoke(cli.app, ["hosts", "--json"])
    found = json.loads(done.stdout)["hosts"]
    assert found.keys() == HOSTS.keys()
    assert (found["timm"]["installed"], found["timm"]["fits"]) == ("0.9", False)
    assert (found["lightning"]["installed"], found["sae_lens"]["fits"]) == (None, True)
    shown = CliRunner().invoke(cli.app, ["hosts"], env={"COLUMNS": "200"}).stdout
    assert "no: pip install 'lightning>=2.4'" in shown
    assert "0.9: not made for it" in shown
    for key, host in HOSTS.items():
        assert f"monoloss_plugin.adapters.{key}" in shown
        assert host.attach in shown


def test_the_page_of_trainers_shows_what_was_measured() -> None:
    page = (ROOT / "docs/hosts/index.md").read_text()
    results = ROOT / "benchmarks/results"
    for host in json.loads((results / "host-scores.json").read_text()).values():
        for way, runs in host["runs"].items():
            for key in ("r2", "adjusted") if way != "shuffled" else ("adjusted",):
                values = [run[key] for run in runs]
                assert f" {fmean(values):.3f} ± {stdev(values):.3f} |" in page
    for host in json.loads((results / "hosts.json").read_text()).values():
        without, with_it = (host["seconds"][way]["median"] for way in ("without", "with"))
        more = host["with over without"]
        low, high = more["quartiles"]
        cells = (
            f"{without:.3f} s | {with_it:.3f} s | {more['median']:.2f} ({low:.2f} to {high:.2f})"
        )
        assert f"| {cells} |" in page

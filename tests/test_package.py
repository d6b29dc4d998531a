"""The package as it is installed: a wheel, a light import, helpful errors without extras."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from monoloss_plugin import __version__, _optional

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = sysconfig.get_paths()["purelib"]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as a release is."""
    out = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--no-isolation", "-o", out, ROOT, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_has_every_module_and_the_adapters_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    packaged = {name for name in names if name.endswith(".py")}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "monoloss_plugin").rglob("*.py")
        if "adapters" not in path.relative_to(ROOT).parts
    }
    adapters = {f"monoloss_plugin/{p.relative_to(ROOT)}" for p in (ROOT / "adapters").glob("*.py")}
    assert packaged == sources | adapters
    assert "monoloss_plugin/py.typed" in names


def test_the_wheel_has_what_is_bundled_and_stays_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        sizes = {info.filename: info.file_size for info in packed.infolist()}
    place = ROOT / "monoloss_plugin" / "hub" / "bundled_data"
    bundled = {str(p.relative_to(ROOT)) for p in place.rglob("*") if p.is_file()}
    assert len(bundled) > 10
    assert bundled <= set(sizes)
    for name, most in {"digits": 2_000_000, "photos": 8_000_000}.items():
        assert 0 < sum(sizes[path] for path in bundled if f"/{name}/" in path) < most


def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    installed = run(*pip, "install", "-q", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    # torch and SAELens as this environment has them; a path does not activate editable installs.
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(SITE_PACKAGES + "\n")
    check = (
        "import monoloss_plugin, monoloss_plugin.adapters.sae_lens as adapter\n"
        "from sae_lens import SAETrainer\n"
        "assert SAETrainer.add_loss is adapter.add_loss\n"
        "assert monoloss_plugin.load_pretrained('digits').record.lam == 0.003\n"
        "print(monoloss_plugin.__file__, adapter.__file__)\n"
    )
    result = run(python, "-c", check, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for path in result.stdout.split():
        assert Path(path).is_relative_to(tmp_path / "env")
    command = run(tmp_path / "env" / "bin" / "monoloss", "--version", cwd=tmp_path)
    assert command.stdout.strip() == __version__


def test_the_core_imports_torch_alone_and_little_beside_it() -> None:
    check = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import monoloss_plugin\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})\n"
    )
    result = run(sys.executable, "-c", check, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) - sys.stdlib_module_names == {"monoloss_plugin"}


MISSING = {
    ("monoloss_plugin.adapters.sae_lens", "sae_lens"): "sae-lens",
    ("monoloss_plugin.figures", "matplotlib"): "matplotlib",
    ("monoloss_plugin.demo.digits", "timm"): "timm",
    ("monoloss_plugin.features", "datasets"): "datasets",
    ("monoloss_plugin.hub:load_features", "huggingface_hub"): "huggingface-hub",
    ("monoloss_plugin.hub:load_pretrained", "sae_lens"): "sae-lens",
    ("monoloss_plugin.convert.monoloss", "sae_lens"): "sae-lens",
    ("monoloss_plugin.adapters.transformers", "transformers"): "transformers",
    ("monoloss_plugin.adapters.timm", "timm"): "timm",
    ("monoloss_plugin.adapters.lightning", "lightning"): "lightning",
    ("monoloss_plugin.features.extraction", "PIL"): "pillow",
    ("monoloss_plugin.features.digits", "sklearn"): "scikit-learn",
    ("monoloss_plugin:show_latents", "datasets"): "datasets",
    ("monoloss_plugin.gallery.pictures", "PIL"): "pillow",
    ("monoloss_plugin.report.page", "jinja2"): "jinja2",
    ("monoloss_plugin.saes.baselines", "sklearn"): "scikit-learn",
    ("monoloss_plugin.probing", "sklearn"): "scikit-learn",
}

# One process imports torch, and a copy of it tries each; copies of this one, with its threads, may
# hang.
WITHOUT = """
import importlib, json, os, sys
import torch

for module, missing in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.modules[missing] = None
        try:
            name, _, attribute = module.partition(":")
            found = importlib.import_module(name)
            if attribute:
                getattr(found, attribute)
            said = "imported"
        except ModuleNotFoundError as error:
            said = str(error)
        os.write(1, json.dumps([module, missing, said]).encode() + b"\\n")
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def messages() -> dict[tuple[str, str], str]:
    """What each module says where a library is missing."""
    result = run(sys.executable, "-c", WITHOUT, json.dumps(list(MISSING)), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {(module, missing): said for module, missing, said in lines}


@pytest.mark.parametrize(("module", "missing"), MISSING)
def test_a_missing_host_says_what_to_install(module, missing, messages) -> None:
    said = messages[module, missing]
    assert said.startswith(f"needs {missing}")
    command = said.partition(", which is not installed: pip install ")[2]
    asked = {Requirement(one).name.lower().replace("_", "-") for one in shlex.split(command)}
    assert MISSING[module, missing] in asked
    assert "monoloss" not in command


def test_the_command_without_its_extra_says_so_without_a_traceback() -> None:
    check = "import sys; sys.modules['typer'] = None; import monoloss_plugin.cli"
    result = run(sys.executable, "-c", check, cwd=ROOT)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("monoloss: needs typer, which is not installed: pip install '")
    assert "'typer>=0.12'" in line


def test_only_what_is_missing_is_advised(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "rich":
            raise PackageNotFoundError
        return "1"

    monkeypatch.setattr(_optional, "version", version)
    error = ModuleNotFoundError("no", name="rich")
    assert str(_optional.missing_extra(error, "cli")).endswith(": pip install 'rich>=13'")
    # A folder that is not installed has no metadata, and a library's own name is all there is.
    monkeypatch.setattr(_optional, "requires", lambda _: version("rich"))
    assert str(_optional.missing_extra(error, "cli")).endswith(": pip install 'rich'")

"""What a release must pass: ``make release-check``.

Builds sdist and wheel, checks their metadata, and installs each into clean environments: the core
alone, every extra for users by itself, and all of them, where the demo runs from what was
installed. uv lets environments share files; the first run downloads what the extras need.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TOOLS = ("cffconvert", "check-jsonschema")

CORE = """
import sys, torch
before = set(sys.modules)
import monoloss_plugin
assert monoloss_plugin.__version__ == {version!r}, monoloss_plugin.__version__
assert "site-packages" in monoloss_plugin.__file__, monoloss_plugin.__file__
a, e = torch.rand(64, 8, requires_grad=True), torch.randn(64, 4)
monoloss_plugin.MonoLoss(lam=1.0)(a, e).backward()
metric = monoloss_plugin.MonoScore()
metric.update(a.detach(), e)
expected = monoloss_plugin.functional.monoscore_pairwise(a.detach(), e)
assert torch.allclose(metric.compute().scores, expected, atol=1e-5)
"""
"""The core works in every environment, and is the installed one."""

PROMISED = {
    "sae-lens": "import monoloss_plugin.adapters.sae_lens, monoloss_plugin.convert.monoloss",
    "vision": "import monoloss_plugin.adapters.timm, monoloss_plugin.adapters.transformers\n"
    "from monoloss_plugin.features import FeatureBatches, extract, load_encoder\n"
    "from transformers import TrainingArguments\n"
    "TrainingArguments('runs', use_cpu=True)\n"
    "import monoloss_plugin.features.encoders.from_open_clip",
    "hub": "from monoloss_plugin import load_features\n"
    "from monoloss_plugin.features import FeatureBatches\n"
    "next(iter(FeatureBatches(load_features('digits', 'train'), batch_size=64)))",
    "lightning": "import monoloss_plugin.adapters.lightning",
    "report": "from monoloss_plugin.figures import plot_curves, save_figure\n"
    "save_figure(plot_curves({'one': torch.rand(5)}), 'curves.png')",
    "metrics": "import monoloss_plugin.torchmetrics",
    "referee": "from monoloss_plugin.dictionary import redundancy\n"
    "import monoloss_plugin.probing\n"
    "redundancy(torch.eye(3))",
    "cli": "import subprocess\n"
    "subprocess.run([sys.prefix + '/bin/monoloss', '--help'], check=True)",
    "demo": "import monoloss_plugin.demo.run",
    "all": "from monoloss_plugin import load_pretrained\n"
    "assert load_pretrained('digits').sae.cfg.d_sae == 256",
}
"""What each extra is for, tried in an environment that has it alone."""

OF_A_CHECKOUT = {"dev", "docs", "release"}
"""Extras that are for work on the package itself."""

HOSTS = ("sae_lens", "transformers", "timm", "datasets", "lightning", "torchmetrics", "typer")


def run(*command: object, **options: Any) -> str:
    """Run a command; its output is shown where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return str(done.stdout)


def build(out: Path) -> tuple[Path, Path]:
    """Return the sdist, and the wheel that was built from it."""
    run(BIN / "uv", "build", "--quiet", "--out-dir", out, ROOT)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def check_metadata(sdist: Path, wheel: Path, version: str) -> Message:
    """What the index will show."""
    run(BIN / "twine", "check", "--strict", sdist, wheel)
    with zipfile.ZipFile(wheel) as packed:
        name = next(n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_string(packed.read(name).decode())
        assert not any(n.startswith("adapters/") for n in packed.namelist()), "shadows AdapterHub's"
    with tarfile.open(sdist) as packed_source:
        names = {n.partition("/")[2] for n in packed_source.getnames()}
    tracked = set(run("git", "-C", ROOT, "ls-files").splitlines())
    assert names <= tracked | {"PKG-INFO"}, f"not in the repository: {names - tracked}"
    for needed in ("LICENSE", "CHANGELOG.md", "CITATION.cff", "adapters/sae_lens.py"):
        assert needed in names, f"{needed} is not in the sdist"
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == "MIT"
    assert {url.partition(", ")[0] for url in metadata.get_all("Project-URL")} >= {"MonoLoss paper"}
    for minor in range(10, 14):
        classifier = f"Programming Language :: Python :: 3.{minor}"
        assert classifier in metadata.get_all("Classifier"), classifier
    assert set(metadata.get_all("Provides-Extra")) == {*PROMISED, *OF_A_CHECKOUT}
    return metadata


def check_files() -> None:
    """The citation and the workflow, against their own schemas."""
    run(BIN / "uv", "tool", "run", TOOLS[0], "--validate", "-i", ROOT / "CITATION.cff")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    schema = ("--builtin-schema", "vendor.github-workflows")
    run(BIN / "uv", "tool", "run", TOOLS[1], *schema, *workflows)


def check_environment(artifact: Path, extra: str | None, version: str, scratch: Path) -> None:
    """Install into a clean environment, and try there what it is for."""
    started = time.perf_counter()
    place = scratch / f"{artifact.suffix[1:]}-{extra}"
    python = place / "env" / "bin" / "python"
    place.mkdir()
    run(BIN / "uv", "venv", "--quiet", "--python", sys.executable, place / "env")
    wanted = f"monoloss_plugin[{extra}] @ {artifact.as_uri()}" if extra else str(artifact)
    run(BIN / "uv", "pip", "install", "--quiet", "--python", python, wanted)
    check = CORE.format(version=version) + PROMISED.get(extra or "", "")
    if extra is None:
        check += f"\nassert not set({HOSTS}) & (set(sys.modules) - before)"
        check += f"\nimport importlib.util as u\nassert not any(map(u.find_spec, {HOSTS}))"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run(python, "-c", check, cwd=place, env=environment)
    kind = "wheel" if artifact.suffix == ".whl" else "sdist"
    if (kind, extra) == ("wheel", "all"):
        demo = (place / "env" / "bin" / "monoloss", "demo", "--seeds", "1")
        run(*demo, cwd=place, env=environment)
        assert (place / "monoloss-demo" / "results.json").exists()
    shutil.rmtree(place)
    print(f"  {kind}, {extra or 'core'}: {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Check everything, and say what was checked."""
    version = re.findall(
        r'^__version__ = "(.+)"$', (ROOT / "monoloss_plugin/__init__.py").read_text(), re.MULTILINE
    )[0]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sdist, wheel = build(scratch / "dist")
        check_metadata(sdist, wheel, version)
        print(f"{sdist.name}, {wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, metadata right")
        check_files()
        print("CITATION.cff and the workflow are as their schemas want them")
        for extra in (None, *PROMISED):
            check_environment(wheel, extra, version, scratch)
        for extra in (None, "all"):
            check_environment(sdist, extra, version, scratch)
    if f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text():
        print(f"{version} may be released")
    else:
        print(f"all is right; to release it, give CHANGELOG.md a heading '## [{version}] - DATE'")


if __name__ == "__main__":
    main()

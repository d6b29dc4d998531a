"""Make each host's environment, and run its tests there."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def applies(requirement: str) -> bool:
    """Return whether a requirement is for this Python."""
    marker = Requirement(requirement).marker
    return marker is None or marker.evaluate()


def environment(name: str) -> Path | None:
    """Return the Python of a host's environment; None if the host is not for this Python."""
    required = HERE / name / "requirements.txt"
    lines = [line for line in required.read_text().splitlines() if line and line[0] != "#"]
    if not all(applies(line) for line in lines):
        return None
    folder = Path(sys.prefix) / "hosts" / name
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    if not done.is_file() or done.read_text() != required.read_text():
        venv.create(folder, clear=True)
        (site,) = folder.glob("lib/python*/site-packages")
        parent = next(path for path in sys.path if path.endswith("site-packages"))
        # Through addsitedir, so that an editable install is found too.
        (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", required], check=True)
        done.write_text(required.read_text())
    return python


def main(names: list[str]) -> int:
    """Run the tests of these hosts, or of all; return the number of hosts whose tests fail."""
    every = sorted(path.parent.name for path in HERE.glob("*/requirements.txt"))
    failed = 0
    for name in names or every:
        python = environment(name)
        if python is None:
            print(f"{name}: not for this Python, {sys.version.split()[0]}")
            continue
        print(f"{name}:", flush=True)
        failed += subprocess.run([python, "-m", "pytest", HERE / name], cwd=ROOT).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every block of code in the README and the documentation runs, in a folder of its own.

Blocks of a page share their names, as a reader would type them one after another. What a page takes
for given (``cfg``, ``photos/``) is made by blocks that the page hides in comments, with
:mod:`tests.stage`. Commands run in this process; ``instead`` says what is smaller than it reads.
The tutorials are not here: they run when the site is built (tests/e2e/test_site.py).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from sybil import Example, Lexeme, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks import over_seeds
from monoloss_plugin import cli
from tests import stage
from tests.hub.server import OWNER_TOKEN

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if "tutorials" not in path.relative_to(ROOT).parts
)
EVERY_PAGE = [*PAGES, *(str(p.relative_to(ROOT)) for p in (ROOT / "docs/tutorials").glob("*.md"))]
PACKAGES = ["", ".features", ".hub", ".finetuning", ".convert", ".figures", ".gallery", ".report"]
PACKAGES += [".adapters.timm"]
EXTRAS = set(metadata("monoloss_plugin").get_all("Provides-Extra"))


def run_shell(example: Example) -> None:
    """Run a block of commands, one line at a time."""
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            run_command(words)


def run_command(words: list[str]) -> None:
    match words:
        case ["monoloss", *arguments]:
            done = CliRunner().invoke(cli.app, arguments)
            assert done.exit_code == 0, f"{words}: {done.output} {done.exception!r}"
        case ["pip", "install", *arguments]:
            check_requirements(arguments)
        case ["make", target]:
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True)
        case ["python", "-m", "benchmarks.over_seeds", *arguments]:
            # The program and the examples are run by tests/e2e.
            given, more = over_seeds.parse(arguments)
            assert given.out is not None
            assert more == []
        case _:
            raise AssertionError(f"no way to run {words} here")


def check_requirements(arguments: list[str]) -> None:
    """What is installed are extras that there are, or tests' own requirements."""
    for argument in arguments:
        if argument == "-e":
            continue
        requirement = Requirement(argument.replace(".[", "monoloss_plugin["))
        assert requirement.name in ("monoloss_plugin", "scikit-learn"), argument
        assert requirement.extras <= EXTRAS, argument


def sybil() -> Sybil:
    return Sybil([PythonCodeBlockParser(), CodeBlockParser("bash", run_shell)], path=str(ROOT))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page: str, tmp_path, monkeypatch, hub) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    document = sybil().parse(ROOT / page)
    document.namespace.update(stage=stage, monkeypatch=monkeypatch, instead={})
    for example in document.examples():
        text = example.parsed
        for given, small in document.namespace["instead"].items():
            text = text.replace(given, small)
        example.parsed = Lexeme(text, example.parsed.offset, example.parsed.line_offset)
        example.evaluate()


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_no_block_is_written_so_that_nothing_runs_it(page: str) -> None:
    fences = re.findall(r"^(.*?)(```+|~~~+)(.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert {mark for _, mark, _ in fences} <= {"```"}
    elsewhere = {"py"} if page.startswith("docs/hosts/") else set()  # see tests/pages.py
    assert {language for *_, language in fences[::2]} <= {"python", "bash", ""} | elsewhere
    assert {language for *_, language in fences[1::2]} <= {""}
    allowed = {""} if "tutorials" in page else {"", "    "}  # a notebook's cells are not indented
    assert {before for before, *_ in fences} <= allowed


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_what_pip_is_asked_for_is_there(page: str) -> None:
    for line in re.findall(r"^ *pip install (.*)$", (ROOT / page).read_text(), re.MULTILINE):
        check_requirements(shlex.split(line, comments=True))


def headings(text: str) -> set[str]:
    """The anchors of a Markdown page."""
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).strip().replace(" ", "-") for one in found}


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    local = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(local) > 5
    for link in local:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            assert anchor in headings((ROOT / (path or "README.md")).read_text()), link


@pytest.mark.parametrize("module", PACKAGES)
def test_the_page_of_the_public_api_has_every_public_name(module: str) -> None:
    page = (ROOT / "docs/reference/index.md").read_text()
    names = import_module(f"monoloss_plugin{module}").__all__
    assert [n for n in names if n[0] != "_" and not re.search(rf"\b{n}s?\b", page)] == []


def test_the_page_of_the_command_line_has_every_command() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    described = re.findall(r"^<!-- options of: (.+) -->$", page, re.MULTILINE)
    assert sorted(described) == sorted(names_of_commands(get_command(cli.app), "monoloss"))


def names_of_commands(command: Any, name: str) -> list[str]:
    """A command, or those of a group."""
    if not hasattr(command, "commands"):
        return [name]
    return [
        found
        for word, one in command.commands.items()
        for found in names_of_commands(one, f"{name} {word}")
    ]


def test_the_map_names_what_is_there() -> None:
    for_users, for_contributors = (ROOT / "docs/map.md").read_text().split("## For contributors")
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| `([\w.]+)` \|", for_users, re.MULTILINE)
    assert len(rows) > 15
    for calls, module in rows:
        for name in re.findall(r"`(\w+)[(`]", calls):
            assert hasattr(import_module(module), name), f"{module}.{name}"
    paths = re.findall(r"^\| `([\w./]+)` \|", for_contributors, re.MULTILINE)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    folders = {
        f"monoloss_plugin/{one.parent.name}/" for one in ROOT.glob("monoloss_plugin/*/__init__.py")
    }
    assert folders <= set(paths)


def test_imports_point_the_way_of_the_arrows_on_the_map() -> None:
    arrows = re.findall(r"^(\w+) +-> (.+)$", (ROOT / "docs/map.md").read_text(), re.MULTILINE)
    allowed = {part: {part, *others.split(", ")} for part, others in arrows}
    assert len(allowed) > 5
    for part in allowed.keys() - {"core"}:
        for path in (ROOT / "monoloss_plugin" / part).rglob("*.py"):
            for name in re.findall(r"from monoloss_plugin\.(\w+)", path.read_text()):
                used = name if name in allowed else "core"
                assert used in allowed[part], f"{path.relative_to(ROOT)}: {name}"


def test_there_are_pages() -> None:
    assert len(PAGES) > 15
    assert len(EVERY_PAGE) - len(PAGES) == 8

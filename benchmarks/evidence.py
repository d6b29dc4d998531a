"""The page of evidence, from what ``monoloss reproduce`` wrote: no number of it is typed.

python -m benchmarks.evidence                 # write docs/evidence.md
python -m benchmarks.evidence ./reproduction  # first take over results and figures from there

The text is in docs/evidence.md.jinja. Results are in benchmarks/results/reproduce/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from monoloss_plugin.figures import save_figure
from monoloss_plugin.reproduce import EXPERIMENTS, Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
TEMPLATE = ROOT / "docs" / "evidence.md.jinja"
PAGE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"


def markdown(table: Table, *, title: bool = True) -> str:
    """Return a table as Markdown, its title in bold above it and its note below."""
    lines = [f"**{table.title}**\n"] if title else []
    lines += [_line(table.header), "|" + "---|" * len(table.header), *map(_line, table.rows)]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Return the text of the page."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}

    def tables(name: str, *numbers: int, title: bool = True) -> str:
        every = EXPERIMENTS[name].tables(found[name])
        chosen = [every[number] for number in numbers] if numbers else every
        return "\n\n".join(markdown(table, title=title) for table in chosen)

    def runs(name: str, *path: str) -> list[dict[str, Any]]:
        content: Any = found[name]
        for key in path:
            content = content[key]
        return list(content)

    def mean(of: Iterable[dict[str, Any]], measure: str, digits: int = 3) -> str:
        return f"{statistics.fmean(run[measure] for run in of):.{digits}f}"

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(found=found, tables=tables, runs=runs, mean=mean)


def take_over(folder: Path) -> None:
    """Copy an experiment's results into this repository, and draw its figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, experiment in EXPERIMENTS.items():
        source = folder / f"{name}.json"
        if not source.exists():
            continue
        shutil.copyfile(source, RESULTS / source.name)
        if experiment.draw is not None:
            axes = experiment.draw(json.loads(source.read_text()))
            save_figure(axes, IMAGES / f"evidence_{name}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", help="what monoloss reproduce wrote to")
    given = parser.parse_args()
    if given.folder is not None:
        take_over(given.folder)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()

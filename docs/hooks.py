"""Run the tutorials while the site is built, and typeset formulas and names.

Each page below ``tutorials/`` is a notebook written as Markdown. It runs from its source in a
kernel and a folder of its own, so no output is ever stored; a cell that fails ends the build. With
MONOLOSS_DOCS_EXECUTE=0 in the environment, pages come without outputs, to look at their text.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import sysconfig
import tempfile
import time
from html import unescape
from pathlib import Path
from typing import Any

import jupytext
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

logger = logging.getLogger("mkdocs.hooks.tutorials")

_TUTORIALS = "tutorials/"
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_SECONDS = 300
"""A cell's time limit."""
_ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?([\w.]+)</code>")
"""How docstrings name what is documented elsewhere."""
_HIDDEN = re.compile(r"<!--- invisible-code-block.*?-->\n+", re.DOTALL)
"""What the tests need to run a page's blocks (tests/test_documents.py)."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SHELL = "%%bash\n"
_INSTALL = re.compile(rf"{_SHELL}pip install .*\n?")
_IN_PYTHON = "---\njupyter:\n  jupytext:\n    main_language: python\n---\n"
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found,ignore:'pin_memory' argument",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
}


def on_startup(**_: Any) -> None:
    """Give the kernels a Hub on loopback, so that the page on publishing publishes nothing."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.hub.environment import only_hub
    from tests.hub.server import OWNER_TOKEN, LoopbackHub

    hub = LoopbackHub()
    hub.start()
    only_hub(hub.url, "")
    os.environ.update(_QUIET, HF_TOKEN=OWNER_TOKEN)
    # The commands of this environment, also where it is not activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a tutorial with its outputs below each block, and other pages as they are written."""
    name = page.file.src_uri
    markdown = _HIDDEN.sub("", markdown)  # or it would come between the tabs of a set
    if not name.startswith(_TUTORIALS) or os.environ.get("MONOLOSS_DOCS_EXECUTE") == "0":
        return markdown
    started = time.perf_counter()
    notebook = jupytext.reads(_IN_PYTHON + markdown, fmt="md")
    for cell in notebook.cells:
        if _INSTALL.fullmatch(cell.source):  # said, not done: what it asks for is here
            cell.update(cell_type="markdown", source=f"```bash\n{cell.source[len(_SHELL) :]}\n```")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_HOME=f"{folder}/.hub", IPYTHONDIR=f"{folder}/.ipython")
        where = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=_SECONDS,
            resources=where,
            coalesce_streams=True,
        )
        client.execute()
    logger.info("Ran %s in %.0f s", name, time.perf_counter() - started)
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    for picture, content in resources["outputs"].items():
        stem = name.removesuffix(".md").replace("/", "-")
        files.append(File.generated(config, f"images/{stem}-{picture}", content=content))
        body = body.replace(f"]({picture})", f"](../images/{stem}-{picture})")
    body = _COLOUR.sub("", body)  # kernels ask for it, also where nobody can see it
    return re.sub(rf"```\w*\n{_SHELL}", "```bash\n", body)


def on_page_content(html: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers show without a script, and names as links."""

    def mathml(found: re.Match[str]) -> str:
        if found[1] == "span":
            return convert(unescape(found[2]), display="inline")
        formula = convert(unescape(found[2]), display="block")
        return f'<div class="formula">{formula}</div>'  # scrolls where the screen is narrow

    documented = re.findall(r'id="([\w.]+)"', html)

    def link(found: re.Match[str]) -> str:
        name = found[1]
        # A short name is of the page it stands on.
        full = next((one for one in documented if one.endswith(f".{name}")), name)
        shown = f"<code>{name.rpartition('.')[2]}</code>"
        return f'<autoref identifier="{full}" optional>{shown}</autoref>'

    return _ROLE.sub(link, _FORMULA.sub(mathml, html))

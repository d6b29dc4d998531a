"""The blocks of a page that are marked ``py``: tests of their own run them, not those of the pages.

They need a library that is not installed beside the others, or a script in examples/.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def py_blocks(page: str) -> list[str]:
    """Return the blocks of a page of docs/hosts, but for those that show a script."""
    found = re.findall(r"^```py\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in found if not block.startswith("--8<--")]

"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from monoloss_plugin._optional import missing_extra


@contextmanager
def progress_bar(title: str, samples: int | None, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Yield a function to call with the number of samples done."""
    if not shown:
        yield lambda _: None
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cli") from error
    with tqdm(total=samples, desc=title, unit=" samples", unit_scale=True) as bar:
        yield bar.update

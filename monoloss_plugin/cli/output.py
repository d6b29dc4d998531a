"""What every command shares: results, JSON, progress, notes, errors and exit codes."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from time import monotonic
from typing import Annotated, Any, NamedTuple, TextIO

import typer
from rich.console import Console
from rich.table import Table
from tqdm.std import tqdm

from monoloss_plugin._checks import visible
from monoloss_plugin.cli.hub_errors import explain

FAILED, INTERRUPTED = 1, 130
"""Exit codes. Typer itself ends with 2 if the command line is wrong."""

_READABLE = (ModuleNotFoundError, OSError, ValueError)
"""Errors whose message alone tells the caller what to do."""

_BETWEEN_LINES = 30.0
"""Seconds between two lines of a progress bar if stderr is no terminal."""


def _options_of_every_command(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object, and nothing else.")
    ] = False,
) -> None:
    """Show typer the options of every command."""


class Output(NamedTuple):
    """The result of a command."""

    content: dict[str, Any]
    """The object that ``--json`` prints."""
    text: Iterable[str | Table]
    """Lines and tables for people."""
    failure: str = ""
    """Why the command ends with 1 although it has a result."""


def table(*header: str, rows: Iterable[Iterable[object]]) -> Table:
    """Return a table that never cuts off its cells."""
    made = Table(show_header=any(header))
    for name in header:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*map(visible, row))
    return made


def one_of(*allowed: str) -> Callable[[str | None], str | None]:
    """Return a check for an option that takes one of several words."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"expected one of {', '.join(allowed)}, got {value!r}")
        return value

    return check


def command(
    app: typer.Typer, shared: Callable[..., None] | None = None, name: str | None = None
) -> Callable[[Callable[..., Output]], Callable[..., None]]:
    """Make a function that returns its output a command, with ``--quiet`` and ``--json``.

    Args:
        app: the group of commands.
        shared: a function that has more options as its parameters; the command gets them by name.
        name: the command's name; by default the function's.
    """

    def register(function: Callable[..., Output]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(quiet: bool, as_json: bool, **arguments: Any) -> None:
            with _errors_in_one_line():
                with _directed_output(quiet, as_json):
                    output = function(**arguments)
                if as_json:
                    print(json.dumps(output.content, default=str))
                elif not quiet:
                    _show(output.text)
                if output.failure:
                    _end(output.failure, FAILED)

        given = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for one in (function, shared, _options_of_every_command)
            if one is not None
            for parameter in inspect.signature(one, eval_str=True).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        run.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in given}
        app.command(name)(run)
        return run

    return register


def _show(text: Iterable[str | Table]) -> None:
    # A file or pipe has no width; a terminal folds what does not fit.
    width = None if sys.stdout.isatty() else 1 << 16
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    for part in text:
        if isinstance(part, Table):
            console.print(part)
        else:
            print(visible(part))


def _end(message: object, code: int) -> None:
    print(f"monoloss: {visible(message)}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Print one line instead of a traceback for an error that the caller can do something about."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the pipe has seen enough; typer ends quietly
    except KeyboardInterrupt:
        _end("stopped; start it again to go on", INTERRUPTED)
    except Exception as error:
        ours = type(error).__module__.startswith("monoloss_plugin")
        explained = explain(error)
        if explained is None and not ours and not isinstance(error, _READABLE):
            raise
        _end(explained or error, FAILED)


@contextmanager
def _directed_output(quiet: bool, as_json: bool) -> Iterator[None]:
    """Send progress and notes to stderr, or nowhere, and keep stdout for the result."""
    with ExitStack() as ends:
        if quiet:
            ends.enter_context(redirect_stdout(ends.enter_context(open(os.devnull, "w"))))
            before = logging.root.manager.disable
            logging.disable(logging.WARNING)
            ends.callback(logging.disable, before)
        elif as_json:
            ends.enter_context(redirect_stdout(sys.stderr))
        ends.enter_context(warnings.catch_warnings())
        warnings.showwarning = lambda message, *_, **__: _note(message)  # without our code
        if quiet:
            warnings.simplefilter("ignore")
        ends.enter_context(_bars(quiet))
        package = logging.getLogger("monoloss_plugin")
        notes = _Notes()
        level = package.level
        package.addHandler(notes)
        package.setLevel(logging.INFO)
        ends.callback(package.setLevel, level)
        ends.callback(package.removeHandler, notes)
        yield


def _note(message: object) -> None:
    """Print a note on a line of its own beside a progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(visible(message), file=sys.stderr)


class _Notes(logging.Handler):
    """Prints what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        _note(record.getMessage())


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """Adapt every progress bar, also of other libraries, to a terminal, a pipe or --quiet."""
    lines = None if sys.stderr.isatty() else _Lines(sys.stderr)
    original = tqdm.__init__

    def suited(bar: Any, *args: Any, **settings: Any) -> None:
        if quiet:
            settings["disable"] = True
        if settings.get("desc"):  # such as the name of a file that is fetched
            settings["desc"] = visible(settings["desc"])
        if lines is not None:
            settings |= {"file": lines, "position": 0, "ascii": True}
            settings |= {"ncols": 80, "dynamic_ncols": False}
        original(bar, *args, **settings)

    tqdm.__init__ = suited
    try:
        yield
    finally:
        tqdm.__init__ = original


class _Lines:
    """Writes a progress bar as lines: the first, one now and then, and the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last, self._due = stream, "", 0.0

    def write(self, text: str) -> None:
        ends, line = text == "\n", text.strip()
        if line:
            self._last = line
        if self._last and (ends or monotonic() >= self._due):
            self._stream.write(self._last + "\n")
            self._last, self._due = "", monotonic() + _BETWEEN_LINES

    def flush(self) -> None:
        self._stream.flush()

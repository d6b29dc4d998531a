"""The ``monoloss`` command."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

from monoloss_plugin import __version__
from monoloss_plugin._optional import missing_extra

try:
    import typer

    from monoloss_plugin.cli.demo import demo
    from monoloss_plugin.cli.features import extract, features
    from monoloss_plugin.cli.hub import convert, pretrained, publish
except ModuleNotFoundError as error:
    sys.exit(f"monoloss: {missing_extra(error, 'cli')}")

app = typer.Typer(
    help="MonoScore, MonoLoss and Top-k regularizers for sparse autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(extract)
app.add_typer(features, name="features")
app.add_typer(publish, name="publish")
app.command()(pretrained)
app.command()(convert)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; what the library logs goes to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("\n%(message)s"))  # past a progress bar
    package = logging.getLogger("monoloss_plugin")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    app(prog_name="monoloss")

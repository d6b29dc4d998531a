"""The ``monoloss`` command."""

from __future__ import annotations

import sys
from typing import Annotated

from monoloss_plugin import __version__
from monoloss_plugin._optional import missing_extra

try:
    import typer

    from monoloss_plugin.cli.demo import demo
    from monoloss_plugin.cli.evaluate import evaluate
    from monoloss_plugin.cli.features import extract, features
    from monoloss_plugin.cli.hosts import hosts
    from monoloss_plugin.cli.hub import convert, pretrained, publish
    from monoloss_plugin.cli.output import command
    from monoloss_plugin.cli.report import report
    from monoloss_plugin.cli.reproduce import reproduce
    from monoloss_plugin.cli.train import recipe_options, sweep, train
except ModuleNotFoundError as error:
    sys.exit(f"monoloss: {missing_extra(error, 'cli')}")

app = typer.Typer(
    help="MonoScore, MonoLoss and Top-k regularizers for sparse autoencoders.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted (Ctrl-C). Results go to "
    "stdout; progress, notes and errors go to stderr. With --json, a command prints its result as "
    "one JSON object; with --quiet, it prints nothing but errors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
command(app)(demo)
command(app)(extract)
command(app, recipe_options)(train)
command(app, recipe_options)(sweep)
command(app)(evaluate)
command(app)(report)
command(app)(reproduce)
app.add_typer(features, name="features")
app.add_typer(publish, name="publish")
command(app)(pretrained)
command(app)(convert)
command(app)(hosts)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command."""
    app(prog_name="monoloss")

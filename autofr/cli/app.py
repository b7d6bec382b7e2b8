"""The command line: parse, call, print. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from autofr.cli import console, drawing, models, policies, results, searching, tuning, worker
from autofr.errors import AutofrError, redacted

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

app = typer.Typer(
    name="autofr",
    help="Find, keep and use policies that make diffusion pipelines faster without changing what"
    " they draw.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

for part in (models, searching, drawing, results, policies, tuning, worker):
    app.add_typer(part.app)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of failures")] = False,
) -> None:
    if debug:
        os.environ["AUTOFR_DEBUG"] = "1"


def main() -> None:
    """Run the command line; exit 2 for what the user can change, 1 for failures."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns Ctrl-C into this
            console.say("autofr: stopped; what was finished is kept, the same command resumes")
        raise
    except Exception as error:
        if os.environ.get("AUTOFR_DEBUG"):
            raise
        if isinstance(error, AutofrError):
            console.say(f"autofr: {redacted(str(error))}")
            sys.exit(error.exit_code)
        console.say(f"autofr failed: {type(error).__name__}: {redacted(str(error))}")
        console.say("(autofr --debug shows the traceback)")
        sys.exit(1)

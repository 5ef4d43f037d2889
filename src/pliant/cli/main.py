"""The program ``pliant``: its options before the verb, and its exit codes."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pliant import __version__
from pliant.cli import describing, making, measuring  # noqa: F401 - they add the verbs
from pliant.cli.app import app, emit
from pliant.errors import BusyError, PliantError

INTERRUPTED = 130
RESUMED = {"compress", "demo", "run"}  # verbs that keep finished work


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 refused with a reason, 2 wrong usage, 3 busy, 130 interrupted."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into this before it gets here
            kept = "; finished evaluations are saved, run the same command to resume"
            _say("interrupted" + (kept if RESUMED.intersection(sys.argv) else ""))
        raise
    except PliantError as error:
        _say(str(error))
        raise SystemExit(3 if isinstance(error, BusyError) else 1) from None


def _say(message: str) -> None:
    print(f"pliant: {message}", file=sys.stderr)  # noqa: T201


def _version(wanted: bool) -> None:
    if wanted:
        emit(f"pliant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    architecture: Annotated[
        list[Path] | None, typer.Option(help="An architecture file of your own; repeatable. It goes before the verb.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log messages of the libraries.")] = False,
) -> None:
    if architecture:
        from pliant.architecture import add_architecture

        for file in architecture:
            add_architecture(file)
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

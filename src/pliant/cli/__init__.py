"""The command line: ``pliant VERB``."""

from pliant.cli.main import main

__all__ = ["main"]

"""The Typer application, the options that several verbs share, and how a verb prints its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.strict_json import to_json

if TYPE_CHECKING:
    from pliant.progress import Progress

app = typer.Typer(
    name="pliant",
    help="The smallest, fastest version of a pre-trained model that still does the job.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of tables, and progress as JSON lines on stderr.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the stored dtype.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: cuda if there is one, else mps, else cpu.")]
Runtime = Annotated[
    str,
    typer.Option(help="transformers, or llama.cpp to measure a .gguf file there; needs the extra 'llamacpp'."),
]
Model = Annotated[str, typer.Argument(help="A model folder, a .gguf file, or the id of a model on a hub.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier result in the folder.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory limit, such as 2GB, for a model larger than that. The weights then stay on the disk."),
]


def emit(text: str) -> None:
    """Print to stdout."""
    print(text)  # noqa: T201


def emit_result(result: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a result as one JSON object, or as the tables of ``show``."""
    emit(to_json(result)) if as_json else show(result)


def progress_of(as_json: bool) -> Progress:
    """Progress on stderr: JSON lines or, for people, a bar."""
    from pliant.progress import Console, Events

    return Events() if as_json else Console()

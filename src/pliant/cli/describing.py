"""Verbs that describe this machine, what pliant has, and a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pliant.cli.app import Device, Dtype, Json, Model, app, emit, emit_result
from pliant.errors import PliantError


@app.command(epilog="Example: pliant doctor")
def doctor(as_json: Json = False) -> None:
    """Show the processor, memory, packages and kernels of this machine."""
    from pliant.cli.doctor import diagnose

    emit_result(diagnose(), as_json, _show_rows)


@app.command(epilog="Example: pliant ls multipruner")
def ls(
    what: Annotated[
        str,
        typer.Argument(
            help="systems, scores, searches, importance or architectures; or a system to list its settings."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """List the systems and their settings, the scores, searches, importance measures and model families.

    Wherever such a name is accepted, module:Name of your own is accepted too, except for model families.
    """
    from pliant import registry
    from pliant.architecture import families

    listed: dict[str, Any] = {
        "systems": registry.STEPS,
        "scores": registry.SCORES,
        "searches": registry.SEARCHES,
        "importance": registry.IMPORTANCE,
        "architectures": None,
    }
    if what in registry.STEPS or ":" in what:
        from pliant.cli.step_options import help_of
        from pliant.step import step_class

        shown = {what: help_of(step_class(what))}
    elif what and what not in listed:
        raise PliantError(f"unknown list {what!r}; choose from: {', '.join([*listed, *registry.STEPS])}")
    else:
        shown = {
            title: families() if table is None else {name: entry.summary for name, entry in table.items()}
            for title, table in listed.items()
            if what in ("", title)
        }
    emit_result(shown, as_json, _show_lists)


def _show_lists(lists: Mapping[str, Mapping[str, Any]]) -> None:
    for title, rows in lists.items():
        emit(title)
        _show_rows(rows, indent="  ")


def _show_rows(rows: Mapping[str, Any], indent: str = "") -> None:
    width = max(14, *map(len, rows)) if rows else 0
    for name, value in rows.items():
        emit(f"{indent}{name:{width}} {value}")


@app.command(epilog="Example: pliant inspect ./smollm2 --no-check")
def inspect(
    model: Model,
    check: Annotated[bool, typer.Option(help="Verify the description on a few tokens.")] = True,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show the blocks of a model, their sizes and how they can be cut, and its memory."""
    from pliant.checkpoint.load import load
    from pliant.cli.show import show_inspection
    from pliant.measure.inspect import inspect

    emit_result(inspect(load(model, dtype=dtype, device=device), self_check=check), as_json, show_inspection)

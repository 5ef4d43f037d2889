"""Verbs that make a model, or plan to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pliant.cli.app import Device, Dtype, Json, Memory, Model, Out, Overwrite, app, emit, emit_result, progress_of
from pliant.errors import PliantError
from pliant.registry import EXPORTS


@app.command(epilog="Example: pliant compress ./smollm2 --ratio 0.2 --data notes.txt --out small")
def compress(
    model: Model,
    out: Out,
    ratio: Annotated[float | None, typer.Option(help="Share of all parameters to remove, between 0 and 1.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text to calibrate and train on: .txt, .jsonl or .json.")] = None,
    subnet: Annotated[
        Path | None,
        typer.Option(
            help="Cut to the sub-network in this file, without a search: pliant's own, or a pruning_config.json of "
            "MultiPruner."
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="System to apply ('pliant ls systems' lists them), or your own as module:Class; repeatable, applied "
            "in order. Default: multipruner."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting as name=value or system.name=value; repeatable. 'pliant ls multipruner' lists them.",
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Key of the text in JSON rows.")] = "text",
    perplexity: Annotated[
        list[Path] | None,
        typer.Option(help="Held-out text to measure perplexity on. Default: a tenth of the calibration rows."),
    ] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help="Question files to measure on.")] = None,
    windows: Annotated[int, typer.Option(help="Maximum number of windows of held-out text.")] = 32,
    limit: Annotated[int, typer.Option(help="Maximum number of questions of each file.")] = 200,
    speed: Annotated[
        bool, typer.Option(help="Time both models alternately at the end, and measure their memory.")
    ] = True,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Show both models' replies to this prompt; repeatable.")
    ] = None,
    overwrite: Overwrite = False,
    memory: Memory = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make a model smaller: search, cut, measure, and write a folder that transformers loads.

    Interrupted work is kept beside the output folder; the same command resumes it.
    """
    from pliant.cli.show import show_report
    from pliant.cli.step_options import known_subnet, recipe
    from pliant.data import text
    from pliant.run.compress import compress
    from pliant.run.recipe import Measuring

    if data is None and column != "text":
        raise PliantError(f"--column {column} has no effect without --data; leave it out, or give the rows with --data")
    if subnet is not None and ratio is not None:
        raise PliantError("--subnet names what to keep, --ratio how much to remove; give one of them")
    calibration = None if data is None else text(data, column=column)
    systems = system or ["multipruner"]
    if subnet is not None:
        steps = known_subnet(subnet, systems, setting or [])
    else:
        steps = recipe(systems, {} if ratio is None else {"ratio": ratio}, setting or [])
        if calibration is None and any("text" in step.needs for step in steps):
            raise PliantError("a search reads calibration text: give --data; to cut without a search, give --subnet")
    report = compress(
        model,
        steps,
        calibration,
        out,
        measuring=Measuring(
            perplexity or (), tasks or (), windows=windows, limit=limit, speed=speed, prompts=prompt or ()
        ),
        overwrite=overwrite,
        dtype=dtype,
        device=device,
        memory=memory,
        progress=progress_of(as_json),
    )
    emit_result(report, as_json, partial(show_report, out=out))


Recipe = Annotated[str, typer.Argument(help="A recipe.yaml, or the folder of an artefact that has one.")]
Moved = Annotated[str | None, typer.Option("--model", help="The dense model, if it is not where the recipe says.")]
MovedData = Annotated[
    Path | None, typer.Option("--data", help="The calibration text, if it has moved or to use another one.")
]


@app.command(name="run", epilog="Example: pliant run small/recipe.yaml --out again")
def run_(
    recipe: Recipe,
    out: Out,
    model: Moved = None,
    data: MovedData = None,
    overwrite: Overwrite = False,
    memory: Memory = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Repeat the recipe of an artefact, with the same data.

    Interrupted work is kept beside the output folder; the same command resumes it.
    """
    from pliant.cli.show import show_report
    from pliant.run.compress import run_recipe

    report = run_recipe(
        recipe,
        out,
        model=model,
        data=data,
        overwrite=overwrite,
        device=device,
        memory=memory,
        progress=progress_of(as_json),
    )
    emit_result(report, as_json, partial(show_report, out=out))


@app.command(epilog="Example: pliant plan small/recipe.yaml")
def plan(recipe: Recipe, model: Moved = None, data: MovedData = None, as_json: Json = False) -> None:
    """Estimate the time, memory and disk space of every stage of a recipe."""
    from pliant.cli.show import show_plan
    from pliant.run.plan import plan

    emit_result(plan(recipe, model=model, data=data), as_json, show_plan)


@app.command(epilog="Example: pliant export small --to gguf --type q4_0 --out small.gguf")
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or file for gguf.")],
    to: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {export.summary}" for name, export in EXPORTS.items()) + ".")
    ] = "homogeneous",
    type: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights in a GGUF file: f32, f16, bf16, q8_0, q4_0, q4_1, or q4_k_m and others "
            "that an installed llama.cpp makes. Default: f16."
        ),
    ] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Write a model for tools that do not have pliant."""
    from pliant.exporters.export import export

    options = {} if type is None else {"type": type}
    shown = progress_of(as_json=False)
    written = export(model, out, to, overwrite=overwrite, dtype=dtype, device=device, progress=shown, **options)
    emit(f"wrote {written}")


@app.command(epilog="Example: pliant demo --out build/demo")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model, the text and the result.")] = Path(
        "build/demo"
    ),
    as_json: Json = False,
) -> None:
    """Run the whole job on SmolLM2-135M, fetched by pip: prune, refit, pack, reload, measure, report."""
    from pliant.cli.show import show_report
    from pliant.run.demo import run

    report = run(out, progress_of(as_json))
    emit_result(report, as_json, partial(show_report, out=out / "small"))

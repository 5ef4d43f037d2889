"""Verbs that run a model: quality, speed and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pliant.cli.app import Device, Dtype, Json, Model, Runtime, app, emit, emit_result, progress_of
from pliant.errors import PliantError
from pliant.strict_json import to_json


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
    windows: Annotated[int | None, typer.Option(help="Maximum number of windows of each text.")] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of questions of each task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of a generated answer, in tokens.")] = 256,
    runtime: Runtime = "transformers",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure perplexity and accuracy of a model, or compare two models."""
    from pliant.checkpoint.load import load
    from pliant.cli.show import show_comparison, show_quality
    from pliant.measure.quality.compare import compare, without_items
    from pliant.measure.quality.evaluate import evaluate

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
    other = load(against, dtype=dtype, device=device, runtime=runtime) if against else None
    found = evaluate(load(model, dtype=dtype, device=device, runtime=runtime), reference=other, **settings)
    shown = without_items(found)
    if other is None:
        emit_result(shown, as_json, show_quality)
        return
    theirs = evaluate(other, **settings)
    comparison = compare(found, theirs)
    if as_json:
        emit(to_json({**shown, "against": without_items(theirs), "comparison": comparison}))
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
    runtime: Runtime = "transformers",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time prefill and decode on this machine."""
    from pliant.checkpoint.load import load
    from pliant.cli.show import show_formats, show_speed
    from pliant.measure.speed.bench import bench

    if (formats and (against or batch != 1)) or (perplexity and not formats):
        raise PliantError(
            "--formats times one model in batches of 1; leave out --against and --batch, and give --perplexity only "
            "with --formats"
        )
    if formats and runtime != "transformers":
        raise PliantError("--formats compares pliant's own packed formats; leave out --runtime")
    if formats and device not in ("cpu", "auto"):
        raise PliantError("--formats packs the model, and packed layers run on the CPU; leave out --device")
    if formats:
        from pliant.run.formats import compare_formats

        found = compare_formats(
            load(model, dtype=dtype),
            perplexity=perplexity,
            prompt=prompt,
            tokens=tokens,
            repeats=repeats,
            progress=progress_of(as_json),
        )
        emit_result(found, as_json, show_formats)
        return
    found = bench(
        load(model, dtype=dtype, device=device, runtime=runtime),
        load(against, dtype=dtype, device=device, runtime=runtime) if against else None,
        prompt=prompt,
        tokens=tokens,
        batch=batch,
        repeats=repeats,
    )
    emit_result(found, as_json, show_speed)


@app.command(epilog='Example: pliant generate small "Once upon a time"')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 64,
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
    from pliant.measure.quality.replies import inputs_of, pad_of

    loaded = load(model, dtype=dtype, device=device)
    check_model(loaded)
    check_finite(loaded)
    tokenizer = tokenizer_of(loaded)
    if chat and not tokenizer.chat_template:
        raise PliantError(f"{model} has no chat template; leave out --chat")
    if tokens < 1:
        raise PliantError(f"--tokens must be at least 1, not {tokens}")
    if not prompt:
        raise PliantError("the prompt is empty; give the model something to continue")
    inputs = inputs_of(loaded, tokenizer, prompt, chat=chat)
    ids = inputs["input_ids"]
    check_ids(loaded, ids)
    check_room(loaded, ids.shape[1], tokens)
    torch.manual_seed(seed)
    out = loaded.generate(**inputs, max_new_tokens=tokens, do_sample=sample, pad_token_id=pad_of(tokenizer))
    emit(tokenizer.decode(out[0, ids.shape[1] :] if chat else out[0], skip_special_tokens=True))

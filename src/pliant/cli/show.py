"""Tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pliant.progress import size


def show_report(report: dict[str, Any], out: Path) -> None:
    """The before/after table of a compression."""
    from pliant.run.card import table

    shown = Table(
        "", "before", "after", title=f"{report['model']}, {report['ratio']:.1%} removed", title_justify="left"
    )
    for row in table(report):
        shown.add_row(*row)
    _print(shown)
    _print(f"wrote {out} (report: {out / 'report.html'})")


def show_inspection(found: dict[str, Any]) -> None:
    """What a model is made of; equal layers in one row."""
    _print(
        f"{found['model']}: {found['model_type']}, read with {found['architecture']}.yaml, self-check {found['self_check']}\n"
        f"{found['parameters']:,} parameters in {found['depth']} layers ({found['outside_blocks']:,} outside the blocks), "
        f"{found['dtype']}, {size(found['weight_bytes'])}\n"
        f"{found['macs_per_token'] / 1e6:,.1f} M multiply-accumulates and {found['cache_bytes_per_token']:,} bytes of cache per "
        f"token; a search keeps {size(found['search_bytes_per_1000_tokens'])} for 1000 calibration tokens"
    )
    rows: dict[tuple, list[int]] = {}
    for block in found["blocks"]:
        _, layer, kind = block["block"].split(".")
        axes = "; ".join(
            f"{name}: {axis['units']} x {axis['width']}"
            + (
                f", {axis['parameters_per_unit']:,} parameters each"
                if axis["parameters_per_unit"]
                else ", cannot be narrowed"
            )
            for name, axis in block["axes"].items()
        )
        rows.setdefault((kind, axes, f"{block['parameters']:,}", f"{block['share']:.2%}"), []).append(int(layer))
    shown = Table("block", "layers", "can be narrowed by", "parameters", "share each")
    for (kind, axes, count, share), layers in rows.items():
        shown.add_row(kind, _ranges(layers), axes, count, share)
    _print(shown)
    if found["removed"]:
        _print(f"removed: {', '.join(found['removed'])}")


def show_quality(found: dict[str, Any]) -> None:
    """Perplexities and accuracies."""
    shown = Table("", "score", "standard error", "on")
    for name, row in found["perplexity"].items():
        error = "" if row["stderr"] is None else f"{row['perplexity'] * row['stderr']:.3f}"
        shown.add_row(
            f"perplexity, {name}", f"{row['perplexity']:.3f}", error, f"{row['windows']} x {row['seqlen']} tokens"
        )
        if "kl" in row:
            shown.add_row(f"KL, {name}", f"{row['kl']:.4f}", "", "nats per token")
    for name, row in found["tasks"].items():
        for metric in ("acc", "acc_norm"):
            shown.add_row(
                f"{name} {metric}", f"{row[metric]:.1%}", f"{row['stderr']:.1%}", f"{row['questions']} questions"
            )
    _print(shown)


def show_speed(found: dict[str, Any]) -> None:
    """Tokens per second, median with p10 and p90."""
    shown = Table("", "prefill, tokens/s", "decode, tokens/s")
    for name in ("model", "against"):
        if name in found:
            shown.add_row(name, *(_spread(found[name][kind], ".1f") for kind in ("prefill", "decode")))
    if "speedup" in found:
        shown.add_row("speed-up", *(_spread(found["speedup"][kind], ".2f") for kind in ("prefill", "decode")))
    _print(shown)
    _print(f"{found['threads']} threads, peak memory {size(found['peak_memory'])}")


def _spread(row: dict[str, float], form: str) -> str:
    return f"{row['median']:{form}} ({row['p10']:{form}} to {row['p90']:{form}})"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans)


def _print(what: object) -> None:
    Console(highlight=False, emoji=False, markup=False).print(what, soft_wrap=isinstance(what, str))

"""Tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from pliant.formatting import duration, human_bytes


def show_report(report: dict[str, Any], out: Path) -> None:
    """The before/after table of a compression."""
    from pliant.record import notes_of
    from pliant.run.card import changed, table

    shown = Table("", "before", "after", title=f"{report['model']}, {changed(report)}", title_justify="left")
    for row in table(report):
        shown.add_row(*row)
    _print(shown)
    for step in report["steps"]:
        if said := notes_of(step):
            _print(said)
    if report.get("replies"):
        answers = Table(
            Column("prompt", overflow="fold"), "before", "after", title="replies", title_justify="left", show_lines=True
        )
        for reply in report["replies"]:
            answers.add_row(reply["prompt"], reply["before"], reply["after"])
        _print(answers)
    _print(f"wrote {out} (report: {out / 'report.html'})")


def show_plan(found: dict[str, Any]) -> None:
    """The stages of a run and their estimates."""
    shown = Table("stage", "time", "memory", "disk", title=f"{found['model']}, rough estimates", title_justify="left")
    for row in [*found["stages"], {"stage": "in all", **found}]:
        disk = human_bytes(row["disk"]) if row["disk"] else ""
        shown.add_row(row["stage"], duration(row["seconds"]), human_bytes(row["memory"]), disk)
    _print(shown)


def show_inspection(found: dict[str, Any]) -> None:
    """The blocks of a model, with equal layers in one row."""
    if "macs_per_image" in found:
        _show_traced(found)
        return
    _print(
        f"{found['model']}: {found['model_type']}, read with {found['architecture']}.yaml, self-check "
        f"{found['self_check']}\n{found['parameters']:,} parameters in {found['depth']} layers "
        f"({found['outside_blocks']:,} outside the blocks), {_stored(found)}, {human_bytes(found['weight_bytes'])}, "
        f"on {found['device']}\n{found['macs_per_token'] / 1e6:,.1f} M multiply-accumulates and "
        f"{found['cache_bytes_per_token']:,} bytes of cache per token; {_state(found)}a search keeps "
        f"{human_bytes(found['search_bytes_per_1000_tokens'])} for 1000 calibration tokens"
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
            + (f", equally many in each of {axis['groups']} groups" if "groups" in axis else "")
            for name, axis in block["axes"].items()
        )
        rows.setdefault((kind, axes, f"{block['parameters']:,}", f"{block['share']:.2%}"), []).append(int(layer))
    shown = Table("block", "layers", "can be narrowed by", "parameters", "share each")
    for (kind, axes, count, share), layers in rows.items():
        shown.add_row(kind, _ranges(layers), axes, count, share)
    _print(shown)
    for limit in found["limits"]:
        _print(f"- {limit}")
    if found["packed"]:
        _print("Runs in one native call." if found["native"] else f"Runs layer by layer: {found['why_not_native']}.")
    if found["removed"]:
        _print(f"removed: {', '.join(found['removed'])}")


def _state(found: dict[str, Any]) -> str:
    """The state of a sequence, if the model has one of a fixed size."""
    return f"{human_bytes(found['state_bytes'])} of state for a sequence; " if found["state_bytes"] else ""


def _stored(found: dict[str, Any]) -> str:
    packed = ", ".join(f"{count} as {form}" for form, count in found["packed"].items())
    return f"linear layers packed ({packed}), the rest {found['dtype']}" if packed else found["dtype"]


def _show_traced(found: dict[str, Any]) -> None:
    """The blocks that can be removed, and the channels that are cut together in all blocks that they run through."""
    _print(
        f"{found['model']}: {found['architecture']}, traced, self-check {found['self_check']}\n"
        f"{found['parameters']:,} parameters, {found['dtype']}, {human_bytes(found['weight_bytes'])}; "
        f"{found['macs_per_image'] / 1e6:,.1f} M multiply-accumulates per image"
    )
    blocks = Table(Column("block", overflow="fold"), "parameters", "share", "can be removed")
    axes: dict[str, dict[str, Any]] = {}
    for block in found["blocks"]:
        blocks.add_row(
            block["block"], f"{block['parameters']:,}", f"{block['share']:.2%}", "yes" if block["removable"] else "no"
        )
        for name, axis in block["axes"].items():
            axes.setdefault(name, {**axis, "in": []})["in"].append(block["block"])
    _print(blocks)
    narrowed = Table(Column("can be narrowed", overflow="fold"), "channels", "parameters each", "blocks")
    for name, axis in axes.items():
        narrowed.add_row(name, str(axis["units"]), f"{axis['parameters_per_unit'] or 0:,}", str(len(axis["in"])))
    _print(narrowed)
    if found["removed"]:
        _print(f"removed: {', '.join(found['removed'])}")


def show_quality(found: dict[str, Any], title: str | None = None) -> None:
    """Perplexities and accuracies."""
    from pliant.measure.quality.evaluate import SHARES

    shown = Table("", "score", "standard error", "on", title=title, title_justify="left")
    for name, row in found["perplexity"].items():
        error = "" if row["stderr"] is None else f"{row['perplexity'] * row['stderr']:.3f}"
        shown.add_row(
            f"perplexity, {name}", f"{row['perplexity']:.3f}", error, f"{row['windows']} x {row['seqlen']} tokens"
        )
        if "kl" in row:
            shown.add_row(f"KL, {name}", f"{row['kl']:.4f}", "", "nats per token")
    for name, row in found["tasks"].items():
        for metric, error in SHARES.items():
            if metric in row:
                shown.add_row(
                    f"{name} {metric}", f"{row[metric]:.1%}", f"{row[error]:.1%}", f"{row['questions']} questions"
                )
        if "perplexity" in row:
            error = "" if row["stderr_perplexity"] is None else f"{row['stderr_perplexity']:.3f}"
            shown.add_row(f"{name} perplexity", f"{row['perplexity']:.3f}", error, f"{row['questions']} questions")
    for name, row in found.get("harness", {}).items():
        for metric, value in row.items():
            if metric not in ("questions", "items") and not metric.endswith("_stderr"):
                error = f"{row[f'{metric}_stderr']:.4f}" if f"{metric}_stderr" in row else ""
                count = f"{row['questions']} questions" if "questions" in row else ""
                shown.add_row(f"{name} {metric}", f"{value:.4f}", error, count)
    _print(shown)


def show_comparison(found: dict[str, Any]) -> None:
    """Differences of the first model from the second, with 95 % intervals."""
    shown = Table("", "difference", "95 % interval", "p", title="first minus second", title_justify="left")
    for rows in found.values():
        for name, metrics in rows.items():
            for metric, row in metrics.items():
                certainty = () if row["p"] is None else (f"{row['low']:+.4f} to {row['high']:+.4f}", f"{row['p']:.4f}")
                shown.add_row(f"{name} {metric}", f"{row['difference']:+.4f}", *certainty)
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
    settings, one = found["settings"], found["on"]["model"]
    _print(
        f"prompt of {settings['prompt']} tokens, {settings['tokens']} decoded, batch {settings['batch']}; on "
        f"{one['device']} in {one.get('dtype') or one['runtime']}, {found['threads']} threads, peak memory "
        f"{human_bytes(found['peak_memory'])}"
    )


def show_formats(found: dict[str, Any]) -> None:
    """Speed and quality of each packed format on this machine, and the recommended one."""
    rows = found["formats"]
    shown = Table(
        "",
        "bits",
        "prefill, tokens/s",
        "decode, tokens/s",
        "perplexity",
        Column("a token, ms: linears + attention + rest", justify="right"),
    )
    for name, row in rows.items():
        split = row["split"]
        times = {
            kind: f"{row[kind]['median']:.0f}"
            + (f" ({row['speedup'][kind]['median']:.2f}x)" if "speedup" in row else "")
            for kind in ("prefill", "decode")
        }
        shown.add_row(
            name,
            f"{row['bits']:.2f}" if "bits" in row else "",
            times["prefill"],
            times["decode"],
            "" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
            f"{split['linears']:.2f} + {split['attention']:.2f} + {split['rest']:.2f} = {split['total']:.2f}",
        )
    _print(shown)
    settings = found["settings"]
    _print(f"prompt of {settings['prompt']} tokens, {settings['tokens']} decoded; {found['threads']} threads")
    for name, row in rows.items():
        if row.get("native") is False:
            _print(f"{name} runs layer by layer: {row['why_not_native']}")
    pays = [f"{form} from {at:.0%} zeros" for form, at in found["break_even"].items() if at <= 1]
    _print(f"Leaving zeros out is faster here: {', '.join(pays) or 'in no format'}. Kernels: {found['kernels']}.")
    _print(f"Recommended: {found['recommended']}.")


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

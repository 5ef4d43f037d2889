"""Tables of results/state_space.json for docs/state-space.md: writes state_space.md beside it.

python benchmarks/report_state_space.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pliant
from machine import RESULTS
from state_space_units import MILLISECONDS, ONE_SHOT

Rows = dict[tuple[Any, ...], dict[str, Any]]
METHODS = ("greedy", ONE_SHOT, "random")
SHOWN = 8  # units of a kind, from each end of the ranking


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def perplexities(row: dict[str, Any]) -> list[str]:
    return [f"{found['perplexity']:.2f}" for found in row["quality"]["perplexity"].values()]


def texts(row: dict[str, Any]) -> list[str]:
    return list(row["quality"]["perplexity"])


def more(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """Difference of the loss in nats per token on every text, with its 95 % interval, window by window."""
    found = pliant.compare(*({"perplexity": each["quality"]["perplexity"]} for each in (row, dense)))["perplexity"]
    losses = [text["loss"] for text in found.values()]
    # a single window has no interval
    bounds = ["" if loss["low"] is None else f" [{loss['low']:+.3f}, {loss['high']:+.3f}]" for loss in losses]
    return [f"{loss['difference']:+.3f}{bound}" for loss, bound in zip(losses, bounds, strict=True)]


def accuracies(row: dict[str, Any]) -> list[str]:
    """Accuracy by the likelihood per byte, with one standard error."""
    return [
        f"{task.get('acc_norm', task['acc']):.1%} ± {task.get('stderr_norm', task['stderr']):.1%}"
        for task in row["quality"]["tasks"].values()
    ]


def sensitivity(rows: Rows) -> list[str]:
    """Of every kind the units without which the loss rises least and most, and their parameters."""
    lines = []
    for key, row in rows.items():
        if key[0] != "sensitivity":
            continue
        units = row["units"]
        title = f"Loss increase in nats per token, {key[1]}, of {row['dense']:.3f}:"
        if not isinstance(next(iter(units.values())), dict):
            lines += [title, "", *table(("kept", "increase"), ([name, f"{v:+.3f}"] for name, v in units.items()))]
            continue
        ranked = sorted(units, key=lambda unit: units[unit]["loss"])
        shown = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], *ranked[-SHOWN:]]
        cells = ([unit, f"{units[unit]['loss']:+.3f}", f"{units[unit]['parameters']:,}"] for unit in shown)
        lines += [title, "", *table(("unit", "increase", "parameters"), cells)]
        total = sum(unit["parameters"] for unit in units.values())
        lines += [f"{len(units)} units; all of them are {total:,} parameters.", ""]
    return lines


def curves(rows: Rows) -> list[str]:
    """Perplexity of every point, a kind and a ratio a row; random orders as a range over their seeds."""
    dense = rows.get(("curve", "dense"))
    points = {key[1:]: row for key, row in rows.items() if key[0] == "curve" and key != ("curve", "dense")}
    if dense is None or not points:
        return []
    lines = [f"Dense: perplexity {' and '.join(perplexities(dense))} on {' and '.join(texts(dense))}.", ""]
    cells = []
    for kind, asked in sorted({(kind, asked) for kind, _, asked, _ in points}, key=lambda pair: (pair[0], pair[1])):
        of = "of the decoding time" if kind == MILLISECONDS else "of the parameters"
        made = points.get((kind, "greedy", asked, "raw"))
        line = [kind, f"{asked:.1%} {of}", "" if made is None else f"{made['ratio']:.2%}"]
        for form in ("raw", "refitted"):
            for method in METHODS:
                found = [row for key, row in points.items() if matches(key, kind, method, asked, form)]
                line.append(spread(found))
        cells.append(line)
    head = [
        "kind",
        "asked",
        "parameters removed by greedy",
        *(f"{method}, {form}" for form in ("raw", "refitted") for method in METHODS),
    ]
    lines += table(head, cells)
    for (kind, method, asked, form), row in points.items():
        if (method, form) == ("greedy", "raw"):
            lines += [f"{kind}, {asked:.1%}: removed in this order: {', '.join(row['path'])}.", ""]
    return lines


def matches(key: tuple[Any, ...], kind: str, method: str, asked: float, form: str) -> bool:
    """Whether a point is of a method; that of random orders has the seed in its name."""
    return key[:1] == (kind,) and key[1].startswith(method) and key[2:] == (asked, form)


def spread(found: list[dict[str, Any]]) -> str:
    """Perplexity on each text, ``a / b``; of several seeds the range."""
    each = []
    for values in zip(*(row["quality"]["perplexity"].values() for row in found), strict=True):
        ordered = sorted(value["perplexity"] for value in values)
        low, high = (f"{value:.1f}" if value < 1000 else f"{value:,.0f}" for value in (ordered[0], ordered[-1]))
        each.append(low if len(ordered) == 1 else f"{low} to {high}")
    return " / ".join(each)


def final(rows: Rows) -> list[str]:
    found = {key[1:]: row for key, row in rows.items() if key[0] == "final"}
    if (dense := found.get(("dense",))) is None:
        return []
    names = texts(dense)
    head = ["model", "removed", *(f"perplexity, {name}" for name in names), *(f"loss, {name}" for name in names)]
    head += list(dense["quality"]["tasks"])
    cells = []
    for key, row in found.items():
        name = " ".join(str(part) for part in key if part != 0.0)
        against = [""] * len(names) if row is dense else more(row, dense)
        removed = f"{row['ratio']:.2%}" if "ratio" in row else ""
        cells.append([name, removed, *perplexities(row), *against, *accuracies(row)])
    return table(head, cells)


def speed(rows: Rows) -> list[str]:
    """Milliseconds per token and the speed-up, measured and predicted from the removed work; median, 10 % and 90 %."""
    cells, threads = [], set()
    for key, row in rows.items():
        if key[0] != "speed":
            continue
        line, ran = [key[1], f"{row['ratio']:.2%}"], row["speed"]
        threads.add(ran["threads"])
        for phase in ("prefill", "decode"):
            for which in ("against", "model"):
                rate = ran[which][phase]
                slow, middle, fast = (1000 / rate[share] for share in ("p10", "median", "p90"))
                line.append(f"{middle:.2f} ({fast:.2f} to {slow:.2f})")
            gain = ran["speedup"][phase]
            line.append(f"{gain['median']:.2f}x ({gain['p10']:.2f} to {gain['p90']:.2f})")
            line.append(f"{row['predicted'][phase]:.2f}x")
        cells.append(line)
    if not cells:
        return []
    columns = [
        f"{phase} {what}"
        for phase in ("prefill", "decode")
        for what in ("dense, ms per token", "cut, ms per token", "speed-up", "predicted")
    ]
    prompt = next(row["speed"]["settings"]["prompt"] for key, row in rows.items() if key[0] == "speed")
    note = f"A prompt of {prompt} tokens, {' or '.join(map(str, sorted(threads)))} threads, both models in turn."
    return [note, "", *table(("kind", "removed", *columns), cells)]


def main() -> None:
    content = json.loads((RESULTS / "state_space.json").read_text())
    lines = [f"Machine: {content['machine']['cpu']}.", ""]
    for model in dict.fromkeys(row["model"] for row in content["rows"]):
        rows: Rows = {tuple(row["key"]): row for row in content["rows"] if row["model"] == model}
        lines += [f"## {model}", "", *sensitivity(rows), *curves(rows), *final(rows), *speed(rows)]
    (RESULTS / "state_space.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()

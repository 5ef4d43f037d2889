"""Table and plot of results/structured.json: writes structured.md and structured.svg beside it.

pip install matplotlib
python benchmarks/report_structured.py
"""

from __future__ import annotations

import json
import math
from typing import Any

import pliant
from machine import RESULTS

METRICS = {"ARC-Easy": "acc_norm", "piqa": "acc_norm", "boolq": "acc", "openbookqa": "acc_norm", "winogrande": "acc"}
FORMS = ("raw", "repaired", "recovered", "repaired and recovered")


def perplexity(row: dict[str, Any]) -> float:
    (found,) = row["quality"]["perplexity"].values()
    return found["perplexity"]


def accuracy(row: dict[str, Any]) -> tuple[float, float]:
    """Mean over the five tasks, and its standard error."""
    tasks = row["quality"]["tasks"]
    stderr = {"acc": "stderr", "acc_norm": "stderr_norm"}
    found = [(tasks[f"{name}-test"][metric], tasks[f"{name}-test"][stderr[metric]]) for name, metric in METRICS.items()]
    return sum(mean for mean, _ in found) / len(found), math.hypot(*(error for _, error in found)) / len(found)


def loss_against(row: dict[str, Any], other: dict[str, Any]) -> str:
    """Difference of the loss in nats per token, with its 95 % interval, window by window."""
    (found,) = pliant.compare(
        {"perplexity": row["quality"]["perplexity"]}, {"perplexity": other["quality"]["perplexity"]}
    )["perplexity"].values()
    found = found["loss"]
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def main() -> None:
    content = json.loads((RESULTS / "structured.json").read_text())
    rows = {(row["line"], row["asked"], row["form"]): row for row in content["rows"]}
    dense = rows["dense", 0, "raw"]
    mean, error = accuracy(dense)
    order = list(dict.fromkeys(line for line, _, _ in rows if line != "dense"))
    lines = [f"Dense: perplexity {perplexity(dense):.2f}, five tasks {mean:.1%} (one standard error is {error:.1%})."]
    if ("dense", 0, "recovered") in rows:  # the table can be drawn before it is whole
        lines.append(f"Trained as the recovered ones: perplexity {perplexity(rows['dense', 0, 'recovered']):.2f}.")
    lines += [
        "",
        *summary(rows, order),
        "",
        "| ratio | method | form | removed | perplexity | five tasks | loss against BlockPruner, raw |",
        "|---|---|---|---|---|---|---|",
    ]
    for line, asked, form in sorted(
        (key for key in rows if key[0] != "dense"), key=lambda k: (k[1], FORMS.index(k[2]), order.index(k[0]))
    ):
        row = rows[line, asked, form]
        base = rows.get(("BlockPruner", asked, "raw"))
        against = "" if base is None or base is row else loss_against(row, base)
        lines.append(
            f"| {asked:.0%} | {line} | {form} | {row['ratio']:.2%} | {perplexity(row):.2f} | {accuracy(row)[0]:.1%} | "
            f"{against} |"
        )
    (RESULTS / "structured.md").write_text("\n".join(lines) + "\n")
    plot(rows, order)


def summary(rows: dict[tuple[str, float, str], dict[str, Any]], order: list[str]) -> list[str]:
    """Perplexity, raw and repaired, a method a row; random orders as a range over their seeds."""
    ratios = sorted({asked for _, asked, _ in rows if asked})
    groups = {line: [line] for line in order if not line.startswith("random")}
    groups["random, three seeds"] = [line for line in order if line.startswith("random")]
    found = ["| perplexity, raw / repaired | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"]
    found.append("|---|" + "---|" * len(ratios))
    for name, members in groups.items():
        cells = [
            " / ".join(
                spread([rows[m, ratio, form] for m in members if (m, ratio, form) in rows]) for form in FORMS[:2]
            )
            for ratio in ratios
        ]
        found.append(f"| {name} | " + " | ".join(cells) + " |")
    return found


def spread(rows: list[dict[str, Any]]) -> str:
    found = sorted(perplexity(row) for row in rows)
    if not found:
        return ""
    low, high = (f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in (found[0], found[-1]))
    return low if len(found) == 1 else f"{low} to {high}"


def plot(rows: dict[tuple[str, float, str], dict[str, Any]], order: list[str]) -> None:
    """Perplexity after repair against the share of parameters removed; random orders as the range of their seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "pliant", "font.family": "sans-serif"}
    import matplotlib.pyplot as plt

    def points(line: str) -> tuple[list[float], list[float]]:
        found = sorted(
            (row["ratio"], perplexity(row)) for (n, _, f), row in rows.items() if (n, f) == (line, "repaired")
        )
        return [100 * ratio for ratio, _ in found], [value for _, value in found]

    figure, axes = plt.subplots(figsize=(7, 4))
    seeds = [points(line) for line in order if line.startswith("random")]
    across = [sum(at) / len(at) for at in zip(*(removed for removed, _ in seeds), strict=True)]
    values = list(zip(*(found for _, found in seeds), strict=True))
    label = f"random order, {len(seeds)} seeds"
    axes.fill_between(across, [min(at) for at in values], [max(at) for at in values], color="0.88", label=label)
    ends = {line: points(line)[1][-1] for line in order if not line.startswith("random")}
    for number, line in enumerate(sorted(ends, key=lambda line: -ends[line])):
        axes.plot(*points(line), color=f"C{number}", label=line)
    axes.axhline(perplexity(rows["dense", 0, "raw"]), color="black", linewidth=0.8, label="dense model")
    axes.set(yscale="log", ylim=(17, 500), xlabel="parameters removed, %", ylabel="perplexity, held-out Wikipedia text")
    axes.set_yticks([20, 30, 50, 100, 200, 500], ["20", "30", "50", "100", "200", "500"])
    axes.set_yticks([], minor=True)
    axes.set_title("SmolLM2-135M, pruned and refitted, without training", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "structured.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

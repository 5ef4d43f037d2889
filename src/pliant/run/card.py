"""The model card, and the versions that every artefact names."""

from __future__ import annotations

import platform
from html import escape
from importlib import metadata
from typing import Any

import torch
import transformers
import yaml

from pliant.checkpoint.load import auto_name
from pliant.measure.quality.evaluate import SHARES
from pliant.record import notes_of

READERS = {"pixel_values": ("processor", "AutoImageProcessor")}
"""Name of a model's input -> the class that prepares it; a tokenizer for all others."""


def versions() -> dict[str, Any]:
    """Versions of the packages that made an artefact."""
    return {
        "versions": {
            "pliant": metadata.version("pliant"),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
    }


def card(model: Any, history: list[dict[str, Any]], report: dict[str, Any] | None) -> str:
    """README.md of an artefact: metadata for hubs, the steps and their results, and how to load the model."""
    base = str(model.name_or_path)
    tags = ["pliant"]
    if any(step["parameters_after"] < step["parameters_before"] for step in history):
        tags.append("pruned")
    tags += [tag for step in history for tag in step.get("tags", []) if tag not in tags]
    metadata = {"base_model": base, "library_name": "transformers", "tags": tags}
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {base.rstrip('/').rpartition('/')[2]}, compressed by pliant",
        "",
    ]
    for step in history:
        lines.append(_text(f"- {step['settings']['step']} ({settings_line(step)})"))
        lines.append(
            f"  {step['parameters_before']:,} to {step['parameters_after']:,} parameters in {step['seconds']:.0f} s"
            + (f". {_text(said)}" if (said := notes_of(step)) else "")
        )
    if report is not None:
        lines += ["", "| | before | after |", "|---|---|---|"]
        lines += ["| " + " | ".join(_text(cell).replace("|", "\\|") for cell in row) + " |" for row in table(report)]
        lines += ["", f"Measured on {measured_on(report)}, in {report['dtype']}."]
    auto = auto_name(getattr(getattr(model, "config", None), "model_type", None), [type(model).__name__])
    name, reader = READERS.get(getattr(model, "main_input_name", ""), ("tokenizer", "AutoTokenizer"))
    lines += [
        "",
        "## Load it",
        "",
        "```python",
        "import pliant  # teaches transformers to load this model",
        f"from transformers import {auto}, {reader}",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder")',
        f'{name} = {reader}.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def settings_line(step: dict[str, Any]) -> str:
    """The settings in the record of a step, as one line."""
    return ", ".join(f"{name}={value}" for name, value in step["settings"].items() if name != "step")


def _text(text: str) -> str:
    """A text in one line of Markdown that no markup in it can end."""
    return " ".join(escape(text, quote=False).split())


def changed(report: dict[str, Any]) -> str:
    """The changes to a model, in a few words."""
    changes = [f"{report['ratio']:.1%} of the parameters removed"] if report["ratio"] else []
    changes += [step["done"] for step in report["steps"] if "done" in step]
    return ", ".join(changes) or "no parameters removed"


def measured_on(report: dict[str, Any]) -> str:
    """The device of a report. For a CPU: its model and the number of threads."""
    where = report["machine"]
    return f"{where['cpu']}, {where['threads']} threads" if report["device"] == "cpu" else report["device"]


def table(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The before/after table: rows of (name, before, after)."""
    before, after = report["before"], report["after"]
    less = f" (-{report['ratio']:.1%})" if report["ratio"] else ""
    rows = [
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}{less}"),
        ("weights", _megabytes(before["weight_bytes"]), _megabytes(after["weight_bytes"])),
    ]
    for key, name in (("disk_bytes", "on disk"), ("run_memory", "memory to run")):
        if before.get(key) and after.get(key):
            rows.append((name, _megabytes(before[key]), f"{_megabytes(after[key])} ({_less(before[key], after[key])})"))
    if before["cache_bytes_per_token"]:
        old, new = (f"{costs['cache_bytes_per_token']:,} B" for costs in (before, after))
        rows.append(("KV cache per token", old, new))
    if before.get("state_bytes"):
        old, new = (f"{costs['state_bytes']:,} B" for costs in (before, after))
        rows.append(("state of a sequence", old, new))
    for name, old in before.get("quality", {}).get("perplexity", {}).items():
        new = after["quality"]["perplexity"][name]
        rows.append((f"perplexity, {name}", f"{old['perplexity']:.2f}", f"{new['perplexity']:.2f}"))
    for name, old in before.get("quality", {}).get("tasks", {}).items():
        new = after["quality"]["tasks"][name]
        rows += [(f"{name} {metric}", f"{old[metric]:.1%}", f"{new[metric]:.1%}") for metric in SHARES if metric in old]
        if "perplexity" in old:
            rows.append((f"{name} perplexity", f"{old['perplexity']:.2f}", f"{new['perplexity']:.2f}"))
    speed = report.get("speed")
    if speed:
        for kind in ("prefill", "decode"):
            old, new, gain = speed["against"][kind], speed["model"][kind], speed["speedup"][kind]
            rows.append((f"{kind}, tokens/s", f"{old['median']:.1f}", f"{new['median']:.1f} ({gain['median']:.2f}x)"))
    return rows


def _less(before: int, after: int) -> str:
    return f"-{1 - after / before:.0%}" if after < before else f"+{after / before - 1:.0%}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"

"""Recipes: read one from a file or an artefact, say what it will take, and repeat it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from pliant.checkpoint.load import auto_class
from pliant.data import Text, text
from pliant.errors import DataError, PliantError, StepError
from pliant.measure.memory import disk_bytes
from pliant.progress import Progress
from pliant.run.compress import Measuring, compress
from pliant.run.stages import path_digest
from pliant.run.target import RECIPE
from pliant.step import Step, recipe_of, step_of

VERSION = 2
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Recipe:
    """What a run does, and to what."""

    model: str
    steps: list[Step]
    data: Text | None
    measuring: Measuring
    dtype: str


def read_recipe(source: str | Path, *, model: str | Path | None = None, data: str | Path | None = None) -> Recipe:
    """A recipe from a ``recipe.yaml``, or from the folder of an artefact.

    Arguments:
        model, data: where the dense model and the calibration text are now, if they are not where the recipe says.

    Raises:
        StepError: the file is not a recipe, or has a step or setting that is not known.
        DataError: a file is missing, or holds something else than when the recipe was written, and ``data`` is not given.
    """
    path = Path(source).expanduser()
    path = path / RECIPE if path.is_dir() else path
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StepError(f"cannot read the recipe {str(path)!r}: {error}") from None
    if not isinstance(raw, Mapping) or not isinstance(raw.get("steps"), list):
        raise StepError(f"{str(path)!r} is not a recipe: it must list steps")
    if raw.get("recipe", VERSION) not in (1, VERSION):
        raise StepError(f"{str(path)!r} was written by a newer pliant; this one reads recipes of version {VERSION}")
    steps = [
        step_of(one["settings"] if isinstance(one, Mapping) and "settings" in one else one) for one in raw["steps"]
    ]
    named = model or raw.get("base_model")
    if not named:
        raise StepError(f"{str(path)!r} names no base_model; give the model")
    for name, digest in (raw.get("read") or {}).items():
        _same(name, digest, path_digest(name))
    measured = raw.get("measuring") or {}
    for task in measured.get("tasks", []):
        _same(task["path"], task.get("hash"), path_digest(task["path"]))
    settings = {key: measured[key] for key in ("seqlen", "windows", "limit", "speed", "prompts") if key in measured}
    measuring = Measuring(
        perplexity=[found for one in measured.get("perplexity", []) if (found := _text(one)) is not None],
        tasks=[task["path"] for task in measured.get("tasks", [])],
        **settings,
    )
    return Recipe(str(named), recipe_of(steps), _text(raw.get("data"), data), measuring, raw.get("dtype", "auto"))


def _text(of: Any, given: str | Path | None = None) -> Text | None:
    """The text that a recipe describes, from where it was or from where it is now."""
    said = {"path": of} if isinstance(of, str) else dict(of or {})
    if given is not None:
        return text(given, column=said.get("column", "text"))
    if not said:
        return None
    if said.get("path") is None:
        raise DataError(f"the recipe was made with text from {said.get('source', 'a list')}; give the text with --data")
    found = text(said["path"], column=said.get("column", "text"))
    _same(said["path"], said.get("hash"), found.digest)
    return found


def _same(path: str, noted: str | None, found: str | None) -> None:
    if noted is not None and noted != found:
        raise DataError(
            f"{path!r} has changed since the recipe was written: its digest is {found}, not {noted}. Give the text to use "
            "with --data, or put the file back"
        )


def run_recipe(
    recipe: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    device: Any = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Repeat a recipe into the folder ``out``, and return the report.

    Arguments:
        recipe: a ``recipe.yaml``, or the folder of an artefact.
        model, data: as for :func:`read_recipe`.
        overwrite, device, memory, progress: as for ``pliant compress``.
    """
    read = read_recipe(recipe, model=model, data=data)
    return compress(
        read.model,
        read.steps,
        read.data,
        out,
        measuring=read.measuring,
        overwrite=overwrite,
        dtype=read.dtype,
        device=device,
        memory=memory,
        progress=progress,
    )


def plan(
    recipe: str | Path | Recipe, *, model: str | Path | None = None, data: str | Path | None = None
) -> dict[str, Any]:
    """The stages of a recipe with a rough estimate of what each takes, before anything is done. No weights are read.

    Arguments:
        recipe: a ``recipe.yaml``, or the folder of an artefact.
        model, data: as for :func:`read_recipe`.

    Returns:
        ``model``, ``parameters``, ``weight_bytes``; ``stages``: for each its ``stage``, ``seconds``, ``memory`` and ``disk`` (bytes
        in memory while it runs, bytes that it leaves on the disk); ``seconds``, ``memory`` (the largest) and ``disk`` of all.
    """
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, model=model, data=data)
    parameters, layers, element = _size(read)
    weights = parameters * element
    rate = _tokens_per_second(parameters)
    rows = read.data.rows if read.data is not None else ()
    each = sum(map(len, rows)) / 4 / len(rows) if rows else 0.0  # about four characters are a token

    def stage(name: str, tokens: float, memory: float, disk: float = 0) -> dict[str, Any]:
        seconds = tokens / rate + weights / 1e9  # and one look at the weights
        return {"stage": name, "seconds": round(seconds, 1), "memory": round(memory), "disk": round(disk)}

    measured = read.measuring
    texts = len(measured.perplexity) or (read.data is not None)
    quality = texts * (measured.windows or 1000) * measured.seqlen + len(measured.tasks) * (measured.limit or 1000) * 64
    copies = 2 if measured.speed else 1
    stages = [stage("load", 0, weights), stage("measure before", quality, weights)]
    for number, step in enumerate(read.steps, 1):
        tokens, beside = step.estimate(2 * layers, each)
        memory = copies * weights + (4 * weights if beside else 0)
        stages.append(stage(f"{number}-{step.kind}", tokens, memory, weights))
    stages.append(stage("measure after", quality, copies * weights))
    stages.append(stage("time", 12 * 300 if measured.speed else 0, copies * weights))
    stages.append(stage("write", 0, copies * weights, weights))
    return {
        "model": read.model,
        "parameters": parameters,
        "weight_bytes": weights,
        "stages": stages,
        "seconds": round(sum(one["seconds"] for one in stages), 1),
        "memory": max(one["memory"] for one in stages),
        "disk": 2 * weights,  # the result of the last step and the artefact
    }


def _size(read: Recipe) -> tuple[int, int, int]:
    """Parameters and layers of a model, and bytes of a weight, from its config."""
    try:
        config = AutoConfig.from_pretrained(read.model)
        with torch.device("meta"):
            model = auto_class(read.model, {}).from_config(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PliantError(f"cannot read the config of {read.model!r}: {error}") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) or 1
    stored = disk_bytes(read.model)
    element = BYTES.get(read.dtype) or (max(1, round(stored / parameters)) if stored else 4)
    return parameters, layers, element


def _tokens_per_second(parameters: int) -> float:
    """Tokens that this machine reads with a model of so many parameters, from one matrix product."""
    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    torch.mm(a, b)
    began = time.perf_counter()
    for _ in range(4):
        torch.mm(a, b)
    per_token = (time.perf_counter() - began) / 4 / 256 / 1024**2  # for one weight
    return 1 / (per_token * parameters * 1.5)  # attention, norms and small matrices take their share

"""``pliant.plan``: estimate the stages of a recipe before anything is done."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from pliant.checkpoint.load import auto_class
from pliant.errors import PliantError
from pliant.measure.memory import disk_bytes
from pliant.run.compress import stages
from pliant.run.recipe import Recipe, read_recipe

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
CHARACTERS = 4  # in a token, about
READ = 1e9  # bytes a second: every stage reads the weights once


def plan(recipe: str | Path, *, model: str | Path | None = None, data: str | Path | None = None) -> dict[str, Any]:
    """Estimate roughly what each stage of a recipe takes. Reads no weights.

    Arguments:
        recipe: a ``recipe.yaml``, or the folder of an artefact.
        model, data: as for :func:`pliant.run.recipe.read_recipe`.

    Returns:
        ``model``, ``parameters``, ``weight_bytes``; ``stages``: for each its ``stage`` (the name), ``seconds``,
        ``memory`` and ``disk`` (bytes in memory while it runs, bytes that it leaves on the disk); ``seconds``,
        ``memory`` (the largest) and ``disk`` of all.
    """
    read = read_recipe(recipe, model=model, data=data)
    parameters, layers, element = _size(read)
    weights = parameters * element
    rate = _tokens_per_second(parameters)
    rows = read.data.rows if read.data is not None else ()
    row = sum(map(len, rows)) / CHARACTERS / len(rows) if rows else 0.0
    estimates = [
        {
            "stage": stage.name,
            "seconds": round(of.tokens / rate + weights / READ, 1),
            "memory": round(of.memory * weights),
            "disk": round(of.disk * weights),
        }
        for stage in stages(read)
        for of in [stage.estimate(2 * layers, row)]
    ]
    return {
        "model": read.model,
        "parameters": parameters,
        "weight_bytes": weights,
        "stages": estimates,
        "seconds": round(sum(one["seconds"] for one in estimates), 1),
        "memory": max(one["memory"] for one in estimates),
        "disk": 2 * weights,  # the result of the last step and the artefact
    }


def _size(recipe: Recipe) -> tuple[int, int, int]:
    """Parameters and layers of a model, and bytes of a weight, from its config."""
    try:
        config = AutoConfig.from_pretrained(recipe.model)
        with torch.device("meta"):
            model = auto_class(recipe.model, {}).from_config(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PliantError(f"cannot read the config of {recipe.model!r}: {error}") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) or 1
    stored = disk_bytes(recipe.model)
    element = BYTES.get(recipe.dtype) or (max(1, round(stored / parameters)) if stored else 4)
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

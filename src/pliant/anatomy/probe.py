"""A small input that any model accepts, for checks that compare the outputs of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedConfig

from pliant.errors import ArchitectureError

_examples: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()


def remember(model: nn.Module, example: Any) -> None:
    """Make :func:`probe` return this example for a model from now on.

    Arguments:
        example: input of ``forward``: a tensor, a sequence of tensors, or a mapping from names to tensors.
    """
    if isinstance(example, Mapping):
        named = dict(example)
    else:
        values = [example] if isinstance(example, torch.Tensor) else list(example)
        names = list(inspect.signature(model.forward).parameters)
        named = dict(zip(names, values, strict=False))
    _examples[model] = named


def probe(model: Any, *, tokens: int = 8, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for one forward pass: random tokens, or random pixels for a vision model.

    Arguments:
        tokens: number of tokens; shape ``(1, tokens)``. Images have the size in the config, else 224 x 224. A model for
            which an example was remembered gets that example.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(model.parameters())
    config: Any = getattr(model, "config", None)
    if model in _examples:
        return {
            name: value.to(first.device) if isinstance(value, torch.Tensor) else value
            for name, value in _examples[model].items()
        }
    if not isinstance(config, PreTrainedConfig):  # a plain module
        name = next(iter(inspect.signature(model.forward).parameters))
        pixels = torch.randn(1, _colours(model), 224, 224, generator=generator)
        return {name: pixels.to(first.device, first.dtype)}
    if model.main_input_name == "pixel_values":
        seen = getattr(config, "vision_config", config)  # a nested config, if the model reads text as well (CLIP)
        size = getattr(seen, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.randn(1, getattr(seen, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(first.device, first.dtype)}
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (1, tokens), generator=generator)
    inputs = {"input_ids": ids.to(first.device)}
    return {**inputs, "use_cache": False} if model.can_generate() else inputs


def _colours(model: nn.Module) -> int:
    """Channels of the images that a plain module takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ArchitectureError(
        f"the input of a {type(model).__name__} is unknown; pass an example: anatomy_of(model, example=…)"
    )


def output_of(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that a model returns, or the first of several: logits, shape ``(batch, …)``."""
    output = model(**inputs)
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, Sequence) else next(iter(output.values()))


def agree(output: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two outputs differ only by rounding, as by another order of summation; NaN agrees with nothing.

    Arguments:
        dtype: of the weights; a coarser one than float32 rounds more.
    """
    output, reference = output.float(), reference.float()
    return (output - reference).abs().max().item() <= 1e-4 * rounding(reference, dtype)


def rounding(reference: torch.Tensor, dtype: torch.dtype) -> float:
    """The unit of a tolerance: the largest value of an output, times how much coarser than float32 the weights are."""
    coarse = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return min(coarse, 100.0) * max(1.0, reference.abs().max().item())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; afterwards restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

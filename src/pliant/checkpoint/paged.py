"""Load a model that may be larger than memory: its weights are copied from the checkpoint straight into files."""

from __future__ import annotations

import copy
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pliant.checkpoint.folder import config_of, parts_of, weight_files
from pliant.errors import ArtefactError, MemoryLimitError
from pliant.formatting import human_bytes, parse_bytes
from pliant.pages import NEAR, Pages, in_file, within_limit

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"  # environment variable of transformers
_COPIES = 3  # in memory while a tensor is assembled from others: the parts, their stacks, and the whole


@torch.no_grad()
def load_paged(
    auto_class: Any, folder: Path, dtype: Any, memory: int | str, scratch: str | Path | None
) -> tuple[Any, dict[str, Any]]:
    """Load the model of ``folder`` with its weights in files, see :mod:`pliant.pages`.

    transformers loads it like any other model, so it converts, renames and ties the same weights as without a limit.
    Each tensor is read lazily, and copied into a file as soon as it becomes a parameter.

    Arguments:
        auto_class: the class of transformers that finds the right one for a config.
        memory: bytes, or a text such as ``2GB``, that the process may take.
        scratch: folder for the files.

    Returns:
        The model, and the loading info of transformers (missing and mismatched keys).

    Raises:
        ArtefactError: the folder has no safetensors weights, or they are quantised.
        MemoryLimitError: the largest tensor alone is more than the limit.
    """
    import transformers

    _check_plain(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    stored = _stored(folder)
    limit = memory if isinstance(memory, int) else parse_bytes(memory)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or _dtype_of(stored)
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with torch.device("meta"):
        shapes = auto_class.from_config(copy.deepcopy(config), dtype=dtype)
    _check_limit(shapes, stored, limit)
    pages = Pages(limit, None if scratch is None else Path(scratch))
    with _placed_in(pages), _one_after_the_other():
        loaded: Any = type(shapes).from_pretrained(
            None, config=config, state_dict=stored, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.pliant_pages = pages
    pages.watch(model)
    return model, info


class _Stored:
    """A tensor of a checkpoint that is read when indexed: the interface by which transformers reads lazily."""

    def __init__(self, file: Path, name: str):
        self._file, self._name = file, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        with safe_open(self._file, "pt") as file:  # closed after each tensor, so that its pages are given back
            return file.get_tensor(self._name)[index]


def _check_plain(folder: Path) -> None:
    """Raise for quantised weights, which would be decoded all at once, and for a peft adapter in the folder."""
    for of in parts_of(config_of(folder)):
        method = of.get("quantization_config") or of.get("compression_config")
        if method:
            name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
            raise ArtefactError(
                f"{str(folder)!r} is quantised ({name}), and quantised weights are not read within a memory limit; "
                "load it without a limit, or give the unquantised model"
            )
    if (folder / "adapter_config.json").exists():
        raise ArtefactError(
            f"{str(folder)!r} holds a peft adapter beside the model, which is not read within a memory limit; load it "
            "without a limit, or give the base model"
        )


def _check_limit(shapes: Any, stored: Mapping[str, Any], limit: int) -> None:
    """Raise if the largest tensor does not fit the limit; a tensor that is assembled from others counts ``_COPIES``
    times."""
    prefix = f"{shapes.base_model_prefix}."
    largest = 0
    for name, parameter in shapes.named_parameters():
        as_it_is = {name, name.removeprefix(prefix), prefix + name} & stored.keys()
        largest = max(largest, parameter.nbytes * (1 if as_it_is else _COPIES))
    if largest > NEAR * limit:
        raise MemoryLimitError(
            f"a limit of {human_bytes(limit)} is too low: the largest tensor of this model takes "
            f"{human_bytes(largest)} while it is loaded, and may take at most {NEAR:.0%} of the limit; give more than "
            f"{human_bytes(largest / NEAR)}"
        )


def save_paged(model: Any, pages: Pages, folder: Path, shard: int) -> None:
    """Write the weights as ``save_pretrained`` does, with at most one shard in memory.

    Arguments:
        shard: bytes in a file at most, unless a tensor is larger.
    """
    tensors = dict(model.named_parameters())  # of tied ones the first name
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: buffer for name, buffer in model.state_dict().items() if name not in tied}
    tensors = _as_stored(model, tensors, pages)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    for file, names in within_limit(model, split.filename_to_tensors.items()):
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8"
        )


def _as_stored(model: Any, tensors: Mapping[str, torch.Tensor], pages: Pages) -> dict[str, torch.Tensor]:
    """Convert tensors back to the names and shapes in checkpoints of this family, a layer at a time."""
    from transformers.core_model_loading import revert_weight_conversion

    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = re.match(r".*?\.\d+\.", name)
        layers.setdefault(layer.group() if layer else "", {})[name] = tensor.detach()
    converted: dict[str, torch.Tensor] = {}
    for layer in within_limit(model, layers.values()):
        held = {id(tensor) for tensor in layer.values()}
        for name, tensor in revert_weight_conversion(model, layer).items():
            converted[name] = tensor if id(tensor) in held or in_file(tensor) else pages.copy(tensor)
    return converted


@contextmanager
def _placed_in(pages: Pages) -> Iterator[None]:
    """While inside, every parameter that this thread registers in a module is moved into a file."""
    thread = threading.get_ident()

    def place(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or in_file(parameter) or threading.get_ident() != thread:
            return None
        placed = nn.Parameter(pages.copy(parameter.detach()), requires_grad=parameter.requires_grad)
        vars(placed).update(vars(parameter))  # transformers marks those that it has read
        pages.hold()
        return placed

    handle = register_module_parameter_registration_hook(place)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _one_after_the_other() -> Iterator[None]:
    """While inside, transformers reads tensors one by one, each after the previous one was placed."""
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before


def _stored(folder: Path) -> dict[str, _Stored]:
    """Tensor name -> lazily read tensor, for all tensors of a checkpoint."""
    stored: dict[str, _Stored] = {}
    for path in weight_files(folder, config_of(folder)):
        if path.suffix != ".safetensors":
            raise ArtefactError(
                f"{str(folder)!r} has no safetensors weights; a memory limit needs them, so save the model as "
                "safetensors first"
            )
        with safe_open(path, "pt") as file:
            stored |= {name: _Stored(path, name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return stored


def _dtype_of(stored: Mapping[str, _Stored]) -> torch.dtype:
    """The dtype of the first floating-point tensor; torch's default if no tensor is one."""
    dtypes = (tensor[...].dtype for tensor in stored.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())

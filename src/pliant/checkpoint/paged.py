"""Load a model that may be larger than memory: its weights go from the checkpoint straight into files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pliant.errors import ArtefactError, MemoryLimitError
from pliant.pages import NEAR, Pages
from pliant.progress import bytes_of, size


@torch.no_grad()
def load_paged(auto_class: Any, folder: Path, dtype: Any, memory: int | str, scratch: str | Path | None) -> Any:
    """A model of ``folder`` whose weights are in files, see :mod:`pliant.pages`.

    Arguments:
        auto_class: the class of transformers that finds the right one for a config.
        memory: bytes, or a text such as ``2GB``, that the process may take.
        scratch: folder for the files.

    Raises:
        ArtefactError: the folder has no safetensors weights, or they are not stored the way the model holds them.
        MemoryLimitError: the largest tensor alone is more than the limit.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    stored = _stored(folder)
    limit = memory if isinstance(memory, int) else bytes_of(memory)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or _dtype_of(stored)
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with _parameters_on_meta():
        model = auto_class.from_config(config, dtype=dtype)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    names: dict[int, list[str]] = {}  # tied parameters have several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    largest = max(parameter.nbytes for parameter in model.parameters())
    if largest > NEAR * limit:
        raise MemoryLimitError(
            f"a limit of {size(limit)} cannot be held: the largest tensor of this model takes {size(largest)}"
        )
    pages = Pages(limit, None if scratch is None else Path(scratch))
    for parameter in list(model.parameters()):
        placed = pages.tensor(tuple(parameter.shape), parameter.dtype)
        _read(placed, names[id(parameter)], stored, model, folder)
        own = nn.Parameter(placed)
        for name in names[id(parameter)]:
            _put(model, name, own)
        pages.hold()
    parameters = {name for alike in names.values() for name in alike}
    for name, buffer in model.state_dict().items():
        if name not in parameters:
            _read(buffer, [name], stored, model, folder)
    model.pliant_pages = pages
    pages.watch(model)
    return model.eval()


def save_paged(model: Any, pages: Pages, folder: Path, shard: int) -> None:
    """What ``save_pretrained`` writes, with no more than a shard in memory.

    Arguments:
        shard: bytes in a file at most, unless a tensor is larger.
    """
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tensors = dict(model.named_parameters())  # of tied ones the first name
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: buffer for name, buffer in model.state_dict().items() if name not in tied}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].detach() for name in names}, folder / file, metadata={"format": "pt"})
        pages.hold()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8"
        )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While inside, parameters are made without memory; buffers, which no checkpoint holds, are made as ever."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _stored(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    if not (folder / "model.safetensors").exists():
        raise ArtefactError(f"{str(folder)!r} has no safetensors weights; only those can be read within a memory limit")
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")


def _dtype_of(stored: dict[str, Path]) -> torch.dtype:
    name, path = next(iter(stored.items()))
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).dtype


def _read(place: torch.Tensor, names: list[str], stored: dict[str, Path], model: Any, folder: Path) -> None:
    """Fill ``place`` from the checkpoint, which may name its tensors with or without the prefix of the trunk."""
    prefix = f"{model.base_model_prefix}."
    known = [*names, *(name.removeprefix(prefix) for name in names), *(prefix + name for name in names)]
    found = next((name for name in known if name in stored), None)
    if found is None:
        raise ArtefactError(
            f"{str(folder)!r} has no tensor {names[0]!r}: it is incomplete, or transformers converts the weights of this family "
            "when it loads them, which cannot be done within a memory limit"
        )
    with safe_open(stored[found], "pt") as file:  # closed after each tensor, so that its pages are given back
        tensor = file.get_tensor(found)
        if tensor.shape != place.shape:
            raise ArtefactError(
                f"{found!r} has shape {tuple(tensor.shape)} in {str(folder)!r}, the model expects {tuple(place.shape)}"
            )
        place.copy_(tensor)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)

"""Turn a cut model into one that stock transformers, vLLM and llama.cpp load without pliant."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pliant.anatomy import (
    Anatomy,
    agree,
    anatomy_of,
    evaluating,
    global_size,
    layers_of,
    output_of,
    plain_config,
    probe,
    text_config_of,
)
from pliant.checkpoint.fingerprint import check_finite
from pliant.checkpoint.packed_bytes import is_packed
from pliant.errors import ArtefactError
from pliant.progress import Progress
from pliant.run.save import save

_BY_LAYER = ("layer_types", "no_rope_layers")  # config keys with one entry per layer
_INSTEAD = "use the cut folder, which loads after 'import pliant'"


def write_homogeneous(model: Any, out: Path, *, overwrite: bool, progress: Progress) -> Path:  # noqa: ARG001
    """Write the result of :func:`homogeneous` into a folder."""
    return save(homogeneous(model), out, overwrite=overwrite)


def homogeneous(model: Any) -> Any:
    """The same model with an ordinary config: layers without blocks are dropped and the rest renumbered.

    The result shares its weights with ``model``, which stays as it is.

    Raises:
        ArtefactError: the model is packed, a layer is only half removed, widths differ, or a layer or its output
            depends on its index; the message says which.
    """
    if is_packed(model):
        raise ArtefactError(
            "this model is packed, and only pliant's kernels read packed layers; export the model it was packed "
            "from. The packed folder loads after 'import pliant'"
        )
    check_finite(model)
    anatomy = anatomy_of(model)
    if anatomy.traced:
        raise ArtefactError(
            f"{type(model).__name__} has no list of layers that could be shortened, and is not exported; {_INSTEAD}"
        )
    if text_config_of(model.config) is not model.config:
        raise ArtefactError(
            f"the text decoder is only one part of {type(model).__name__}, and such models are not exported; {_INSTEAD}"
        )
    layers = _whole_layers(anatomy)
    config = _uniform_config(model.config, anatomy, len(layers))
    for key in _BY_LAYER:
        if (whole := getattr(plain_config(model.config), key, None)) is not None:
            _set_by_layer(config, key, [whole[layer] for layer in layers])
    with torch.device("meta"):
        rebuilt = type(model)(config)
    all_layers = layers_of(model, anatomy.source)
    prefix = next(path for path, module in model.named_modules() if module is all_layers) + "."

    def renamed(name: str) -> str | None:
        if not name.startswith(prefix):
            return name
        number, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{layers.index(int(number))}.{rest}" if int(number) in layers else None

    state = {new: tensor for name, tensor in model.state_dict().items() if (new := renamed(name))}
    _check_shapes(state, rebuilt.state_dict(), config)
    try:
        rebuilt.load_state_dict(state, assign=True)
    except RuntimeError:  # such as experts in every third layer
        raise ArtefactError(
            f"the config of {config.model_type} gives the remaining layers other parts when they are renumbered; "
            f"{_INSTEAD}"
        ) from None
    for name, buffer in model.named_buffers():  # those that state_dict leaves out, such as rotary frequencies
        new = renamed(name)
        if new is not None and new not in state:
            module, _, attribute = new.rpartition(".")
            setattr(rebuilt.get_submodule(module), attribute, buffer)
    rebuilt.tie_weights()
    rebuilt.eval()
    with evaluating(model), torch.inference_mode():
        inputs = probe(model)
        same = agree(output_of(rebuilt, inputs), output_of(model, inputs), next(model.parameters()).dtype)
    if not same:
        raise ArtefactError(
            f"the outputs of this {config.model_type} model change when its layers are renumbered; {_INSTEAD}"
        )
    if model.can_generate():
        rebuilt.generation_config = copy.deepcopy(model.generation_config)
    rebuilt.name_or_path = model.name_or_path
    return rebuilt


def _set_by_layer(config: Any, key: str, values: list[Any]) -> None:
    with suppress(AttributeError):  # some families compute them from other keys
        setattr(config, key, values)
    if list(getattr(config, key)) != values:
        raise ArtefactError(
            f"the config of {config.model_type} computes {key} from the number of a layer, so these layers cannot be "
            f"dropped; {_INSTEAD}"
        )


def _whole_layers(anatomy: Anatomy) -> list[int]:
    alive = {
        layer: [f"layers.{layer}.{spec.kind}" in anatomy.blocks for spec in anatomy.specs(layer)]
        for layer in range(anatomy.depth)
    }
    half = [layer for layer, blocks in alive.items() if any(blocks) and not all(blocks)]
    if half:
        raise ArtefactError(
            f"layers {_listed(half)} have lost one block and kept another; only whole layers can be dropped: {_INSTEAD}"
        )
    return [layer for layer, blocks in alive.items() if all(blocks)]


def _uniform_config(old: Any, anatomy: Anatomy, depth: int) -> Any:
    config = copy.deepcopy(plain_config(old))
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    axes = [(short, axis) for block in anatomy.blocks.values() for short, axis in block.axes.items()]
    for short, spec in anatomy.architecture.axes.items():
        sizes = sorted({axis.size for name, axis in axes if name == short})
        if len(sizes) > 1:
            raise ArtefactError(
                f"{spec.config_key} differs from layer to layer ({_listed(sizes)}), but the config holds one value "
                f"for all: {_INSTEAD}"
            )
        if sizes == [0]:
            raise ArtefactError(
                f"{spec.config_key} would be 0, because every scan is removed; stock tools do not run that: {_INSTEAD}"
            )
        if sizes and not spec.built and sizes[0] != global_size(config, spec.size):
            if spec.config_key is None:
                raise ArtefactError(
                    f"the config of {config.model_type} has no key for the number of {short}, now {sizes[0]}: "
                    f"{_INSTEAD}"
                )
            setattr(config, spec.config_key, sizes[0])
    for short, axis in axes:
        spec = anatomy.architecture.axes[short]
        if global_size(config, spec.unit) != axis.unit:
            key = str(spec.unit).split(" or ")[0]
            if not key.isidentifier() or not hasattr(config, key):
                raise ArtefactError(
                    f"the config of {config.model_type} has no key for the size of a head, which is {axis.unit} for "
                    f"{axis.size} heads: {_INSTEAD}"
                )
            setattr(config, key, axis.unit)
    config.num_hidden_layers = depth
    return config


def _check_shapes(state: Mapping[str, torch.Tensor], built: Mapping[str, torch.Tensor], config: Any) -> None:
    """Raise if transformers builds a tensor in another shape: it does not read the key of a size that pliant added."""
    for name, tensor in state.items():
        if name in built and built[name].shape != tensor.shape:
            raise ArtefactError(
                f"{name} has shape {tuple(tensor.shape)}, but transformers builds {tuple(built[name].shape)}: the "
                f"config of {config.model_type} has no key for this size; {_INSTEAD}"
            )


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))

"""Check a model folder before its weights are read, and recognise other kinds of folders for the error message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pliant.errors import ArtefactError

INDEX = ".index.json"
_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_POINTER = 1024  # bytes: a pointer is a few lines of text


def check_folder(folder: Path, *, variant: str | None = None) -> None:
    """Check the config and the weight files of a folder without reading the weights.

    Arguments:
        variant: as in transformers: a word in the names of the weight files.

    Raises:
        ArtefactError: config.json is missing or unreadable, weights are missing, or a shard is missing or has another
            length than its header declares.
    """
    config = config_of(folder)
    quantised = any(of.get("quantization_config") or of.get("compression_config") for of in parts_of(config))
    for path in weight_files(folder, config, variant=variant):
        _check_weights(path, quantised)


def parts_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config, and the configs nested in it."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]


def config_of(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        ArtefactError: it is missing, or is not the config of a model; the message says what the folder seems to be.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtefactError(_without_config(folder)) from None
    except ValueError as error:
        if is_lfs_pointer(path):
            raise ArtefactError(_fetch(path)) from None
        raise ArtefactError(f"{str(path)!r} is not JSON: {error}") from None
    except OSError as error:
        raise ArtefactError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        if isinstance(config, dict) and "_class_name" in config:
            raise ArtefactError(
                f"{str(folder)!r} is a part of a diffusers pipeline ({config['_class_name']}); give a transformers "
                "model"
            )
        refuse_original_mamba(config, folder)
        raise ArtefactError(
            f'{str(path)!r} names no model_type; transformers needs one, such as "model_type": "llama", to know the '
            "model"
        )
    return config


def refuse_original_mamba(config: Any, source: str | Path) -> None:
    """Refuse a checkpoint of the mamba_ssm package, whose config names no model_type.

    Raises:
        ArtefactError: it is one.
    """
    if isinstance(config, dict) and "d_model" in config and ("ssm_cfg" in config or "n_layer" in config):
        family = "mamba2" if "2" in str((config.get("ssm_cfg") or {}).get("layer", "")) else "mamba"
        raise ArtefactError(
            f"{str(source)!r} is a checkpoint of the mamba_ssm package, which transformers cannot read; give its form "
            f"for transformers, whose name ends in '-hf', or convert it with models/{family}/"
            f"convert_{family}_ssm_checkpoint_to_pytorch.py in the source of transformers"
        )


def _without_config(folder: Path) -> str:
    """The error message for a folder without config.json."""
    named = repr(str(folder))
    if (folder / "adapter_config.json").is_file():
        return f"{named} is a peft adapter of {_base_of(folder)!r}, not a model; {_MERGE}"
    inside = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob("*/config.json"))
    inside += sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob("snapshots/*/config.json"))
    if (folder / "model_index.json").is_file():
        models = ", ".join(inside) or "none here"
        return f"{named} is a diffusers pipeline; give a sub-folder with a transformers model: {models}"
    for suffix, content in (
        (".gguf", "GGUF files; give one of them"),
        (".onnx", "an ONNX model; give the model it was made from"),
    ):
        files = sorted(
            path.relative_to(folder).as_posix()
            for pattern in (f"*{suffix}", f"*/*{suffix}")
            for path in folder.glob(pattern)
        )
        if files and not inside:
            return f"{named} has no config.json, but {content}: {', '.join(files[:3])}"
    if inside:
        return f"{named} has no config.json, but its sub-folders do; give one of them: {', '.join(inside[:5])}"
    return f"{named} has no config.json: it is not a model folder"


_MERGE = "load both with peft, call merge_and_unload() and save the result, and give the folder of that"


def _base_of(folder: Path) -> str:
    """The base model that an adapter names."""
    try:
        return str(json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a model that it does not name"


def weight_files(folder: Path, config: Mapping[str, Any], *, variant: str | None = None) -> list[Path]:
    """The files that transformers reads the weights from. As in transformers, a single file takes precedence over an
    index.

    Raises:
        ArtefactError: the weights are missing, or the index is damaged; the message says what the folder holds instead.
    """

    def varied(name: str) -> Path:
        stem, _, end = name.rpartition(".")
        return folder / (f"{stem}.{variant}.{end}" if variant else name)

    named = config.get("transformers_weights")
    names = [folder / str(named)] if named else [varied(stem + end) for stem in _STEMS for end in ("", INDEX)]
    chosen = next((path for path in names if path.is_file()), None)
    if chosen is None:
        raise ArtefactError(_without_weights(folder, names[0].name))
    if chosen.suffix != ".json":
        return [chosen]
    return sorted({folder / file for file in weight_map(chosen).values()})


_STEMS = ("model.safetensors", "pytorch_model.bin")
_OTHER = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ckpt", "onnx/*.onnx")


def _without_weights(folder: Path, expected: str) -> str:
    """The error message for a folder without weights."""
    if (folder / "adapter_config.json").is_file():
        return f"{str(folder)!r} has no {expected}, but a peft adapter of {_base_of(folder)!r}; {_MERGE}"
    other = [path.relative_to(folder).as_posix() for pattern in _OTHER for path in sorted(folder.glob(pattern))]
    if not other:
        return f"{str(folder)!r} has no {expected}"
    if all(name.endswith(".gguf") for name in other):
        return f"{str(folder)!r} has no {expected}, but GGUF files; give one of them: {', '.join(other[:3])}"
    variants = {parts[1] for name in other if len(parts := name.split(".")) == 3 and f"{parts[0]}.{parts[2]}" in _STEMS}
    hint = f"; pass variant={min(variants)!r}" if variants else ""
    listed = ", ".join(dict.fromkeys(other[:3]))
    return f"{str(folder)!r} has no {expected}; transformers cannot load {listed} under these names{hint}"


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, read from the index of a sharded checkpoint.

    Raises:
        ArtefactError: the file is not such an index.
    """
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ArtefactError(
            _fetch(index) if is_lfs_pointer(index) else f"{str(index)!r} is not the index of a sharded model"
        ) from None


def _check_weights(path: Path, quantised: bool) -> None:
    if not path.is_file():
        raise ArtefactError(f"the shard {str(path)!r} is missing")
    try:
        pointer = is_lfs_pointer(path)
    except OSError as error:
        raise ArtefactError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    if pointer:
        raise ArtefactError(_fetch(path))
    if path.stat().st_size == 0:
        raise ArtefactError(f"{str(path)!r} is empty")
    if path.suffix == ".safetensors":
        _check_safetensors(path, quantised)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a git-lfs pointer instead of the large file itself."""
    if path.stat().st_size > _LFS_POINTER:
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def _fetch(path: Path) -> str:
    return f"{str(path)!r} is a git-lfs pointer, not the file itself; run 'git lfs pull' in {str(path.parent)!r}"


def _check_safetensors(path: Path, quantised: bool) -> None:
    """Check the header and the length of a safetensors file: 8 bytes with the header's length, a JSON header, the data.

    Arguments:
        quantised: whether the config declares a quantisation, so that 8-bit codes are expected.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= size else None
            ends = [entry["data_offsets"][1] for name, entry in (header or {}).items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            header = None
            ends = []
    if header is None:
        raise ArtefactError(f"{str(path)!r} is damaged: it has no safetensors header")
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ArtefactError(
            f"{str(path)!r} is truncated or damaged: it has {size} bytes, but its header declares {expected}"
        )
    codes = [
        name for name, entry in header.items() if name != "__metadata__" and entry.get("dtype", "").startswith("F8")
    ]
    if codes and not quantised:
        raise ArtefactError(
            f"{str(path)!r} holds 8-bit codes ({codes[0]!r}), but the config.json beside it has no "
            "quantization_config to decode them; read as weights they would be noise. Add the quantization_config, "
            "or give the unquantised model"
        )


_SKIPPED = {  # reason -> patterns of files that are not copied from a model's folder
    "weights": (
        *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx"),
        *(
            "*.onnx_data",
            "*.ot",
            "*.tflite",
            "*.pkl",
            "*.pickle",
            "*.npz",
            "*.npy",
            "*.nemo",
            "*.mlmodel",
            "openvino_*",
        ),
    ),
    "of these weights alone": (
        *("*.index.json", "config.json", "generation_config.json", "*quant*_config.json", "params.json"),
    ),
    "an adapter": ("adapter_config.json",),
    "of a training": ("trainer_state.json", "*_results.json"),
    "of an earlier result": ("README*", "recipe.yaml", "report.json", "report.html", "measured.json", "stages.json"),
    "data, pictures, archives": (
        *("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.log", "*.ipynb", "*.png", "*.jpg", "*.jpeg", "*.gif"),
        *("*.svg", "*.webp", "*.mp4", "*.wav", "*.pdf", "*.zip", "*.tar", "*.gz", "*.7z"),
    ),
    "hidden": (".*",),
}
_LARGEST = 2**27  # bytes: tokenizers stay well below
_TEMPLATES = "additional_chat_templates"


def companions(folder: Path) -> list[Path]:
    """The files of a model besides its weights and config: tokenizer, processor, templates, custom code, licence.

    These are all files at the top of the folder that match no pattern of ``_SKIPPED``, the chat templates in
    ``additional_chat_templates``, and the modules that sentence-transformers appends to the model.

    Returns:
        Paths relative to ``folder``.
    """
    skipped = skipped_of_a_hub()
    own = [path for path in folder.iterdir() if not any(fnmatchcase(path.name, pattern) for pattern in skipped)]
    own += [path for place in (_TEMPLATES, *_modules_of(folder)) for path in (folder / place).rglob("*")]
    return sorted(path.relative_to(folder) for path in own if path.is_file() and path.stat().st_size <= _LARGEST)


def skipped_of_a_hub() -> list[str]:
    """Patterns of files that need not be downloaded from a hub repository for its :func:`companions`."""
    return [*(pattern for some in _SKIPPED.values() for pattern in some), "*/*"]


def _modules_of(folder: Path) -> list[str]:
    """Folders listed in the modules.json of sentence-transformers."""
    try:
        named = [Path(str(module["path"])) for module in json.loads((folder / "modules.json").read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path.as_posix() for path in named if path.parts and not path.is_absolute() and ".." not in path.parts]

"""Load a model, dense or cut, from a folder, a GGUF file or a hub id, and refuse incomplete ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pliant.checkpoint.folder import check_folder, is_lfs_pointer, refuse_original_mamba
from pliant.checkpoint.gguf_header import check_gguf
from pliant.checkpoint.gguf_rope import scaled_config
from pliant.device import device_of, free_memory, is_short_of_memory
from pliant.errors import ArtefactError, DeviceError, PliantError
from pliant.formatting import human_bytes
from pliant.runtime.llama_model import LlamaModel
from pliant.runtime.packed_linear import Packed

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a name, or owner/name
_KINDS = (  # in order of preference: an auto class of transformers, and its mapping from model_type to classes
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModel", "MODEL_MAPPING_NAMES"),
)
RUNTIMES = ("transformers", "llama.cpp")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load(
    source: str | Path,
    *,
    dtype: Any = "auto",
    device: Any = None,
    memory: int | str | None = None,
    scratch: str | Path | None = None,
    runtime: str = "transformers",
    **options: Any,
) -> Any:
    """Load a transformers model in evaluation mode, of the class that its config names, else as a causal language
    model.

    Arguments:
        source: a folder, a ``.gguf`` file (dequantised; needs the ``gguf`` extra), or the id of a model on a hub.
        dtype: as in transformers: ``auto`` keeps the stored dtype.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto``, the first available of cuda, mps, cpu; with
            ``auto``, a packed model stays on the CPU. Default: the CPU, unless ``device_map`` is given.
        memory: bytes, or ``"2GB"``, that the process may take on top of what it has already. The weights then stay in
            files, and only the part that fits is in memory, so that a model larger than memory can be pruned. Needs
            Linux and a folder with safetensors weights.
        scratch: folder for these files; default: the temporary folder. They disappear with the model.
        runtime: ``llama.cpp`` opens a ``.gguf`` file in llama.cpp instead, to be measured and no more; needs the
            ``llamacpp`` extra.
        options: passed on to ``from_pretrained``: ``device_map``, ``revision``, ``token``, ``attn_implementation`` …

    Raises:
        ArtefactError: the model does not exist, a shard is missing or truncated, or weights are missing.
        DeviceError: the device is missing, or cannot hold this model.
        MemoryLimitError: the memory limit is too small for this model, or cannot be enforced on this machine.
    """
    if runtime != "transformers":
        given = {"dtype": dtype != "auto", "device": device not in (None, "cpu", "auto"), "memory": memory is not None}
        return _in_llama_cpp(source, runtime, [*(name for name, set_ in given.items() if set_), *options])
    target = None if device is None else device_of(device)
    if target is not None and "device_map" in options:
        raise DeviceError("give device or device_map, not both")
    if "torch_dtype" in options:
        warnings.warn("torch_dtype is now called dtype", FutureWarning, stacklevel=2)
        dtype = options.pop("torch_dtype")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ArtefactError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    ignore_mismatched = options.pop("ignore_mismatched_sizes", False)
    path = _checked_path(source, options)
    if memory is not None:
        if target is not None and target.type != "cpu" and device != "auto":
            raise DeviceError(
                f"within a memory limit the model runs on the CPU; leave out memory or device={str(device)!r}"
            )
        if not path.is_dir() or options:
            refused = ", ".join(options) if path.is_dir() else str(source)
            raise ArtefactError(
                f"within a memory limit, only a model folder is loaded, without other options; not {refused}"
            )
        from pliant.checkpoint.paged import load_paged

        with _faults_named(source):
            loaded: Any = load_paged(auto_class(str(path), options), path, dtype, memory, scratch)
    else:
        with _faults_named(source):
            _scale_positions(path, options)
            location = str(path if path.is_dir() else source)
            loaded = auto_class(location, options).from_pretrained(
                location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    model, info = loaded
    if "gguf_file" in options:
        model.name_or_path = str(path / options["gguf_file"])  # the tokenizer is in the file, too
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ArtefactError(
            f"{str(source)!r} lacks {len(missing)} tensor(s), such as {missing[0]!r}; they would have random values"
        )
    if info["mismatched_keys"] and not ignore_mismatched:
        name, stored, built = min(info["mismatched_keys"])
        raise ArtefactError(
            f"{name!r} has shape {tuple(stored)} in {str(source)!r}, but its config.json describes shape "
            f"{tuple(built)}; config and weights are of different models, or another tool has changed one of them"
        )
    if target is not None and target.type != "cpu":
        _move(model, target, chosen=device != "auto")
    return model.eval()


def _in_llama_cpp(source: str | Path, runtime: str, given: list[str]) -> LlamaModel:
    """A GGUF file in llama.cpp.

    Arguments:
        given: the options of :func:`load` that are set, of which it takes none.
    """
    if runtime not in RUNTIMES:
        raise ArtefactError(f"unknown runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
    path = Path(source).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise ArtefactError(f"llama.cpp opens .gguf files, not {str(source)!r}; 'pliant export --to gguf' writes one")
    if given:
        raise ArtefactError(f"llama.cpp runs the file as it is, on the CPU; leave out {', '.join(given)}")
    return LlamaModel(path)


def _scale_positions(folder: Path, options: dict[str, Any]) -> None:
    """Give a config to a GGUF file whose rotary positions transformers would not scale."""
    file = folder / str(options.get("gguf_file", ""))
    if file.is_file() and "config" not in options and (config := scaled_config(file, check_gguf(file))) is not None:
        options["config"] = config


def _checked_path(source: str | Path, options: dict[str, Any]) -> Path:
    """The folder of a model, or the id of one on a hub; the file name of a GGUF file is added to ``options``."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ArtefactError(f"the file {str(source)!r} does not exist; give a folder, a .gguf file or a hub id")
        if is_lfs_pointer(path):
            raise ArtefactError(
                f"{str(source)!r} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder"
            )
        options["gguf_file"] = path.name
        with suppress(ImportError):  # without this class transformers dequantises every GGUF file
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        return path.parent
    if path.is_dir():
        check_folder(path / options.get("subfolder", ""), variant=options.get("variant"))
    elif not _HUB_ID.fullmatch(str(source)) or path.exists():
        raise ArtefactError(
            f"{str(source)!r} is not a model folder: give a folder with a config.json, a .gguf file, or the id of a "
            "model on a hub (owner/name)"
        )
    return path


def loaded(model: Any, *, dtype: Any = None, device: Any = None) -> Any:
    """The given model; a folder or name is loaded with :func:`load`.

    Raises:
        DeviceError: ``device`` or ``dtype`` is given for a model that is already loaded.
    """
    if isinstance(model, str | Path):
        return load(model, dtype=dtype or "auto", device=device)
    if dtype is not None or device is not None:
        raise DeviceError(
            "device and dtype apply when a model is loaded, and this model already is; use model.to(...), or give "
            "its folder"
        )
    return model


def _move(model: Any, device: torch.device, *, chosen: bool) -> None:
    """Move a model to an accelerator; a packed model stays on the CPU.

    Arguments:
        chosen: the user named the device, so that a packed model is refused instead.
    """
    if any(isinstance(module, Packed) for module in model.modules()):
        if chosen:
            raise DeviceError(
                f"this model is packed, and packed layers run on the CPU; load it without device={str(device)!r}"
            )
        return
    if device.type == "mps" and any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        raise DeviceError("mps has no float64; load the model with dtype='float32'")
    needs = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    try:
        model.to(device)
    except RuntimeError as error:
        if not is_short_of_memory(error):
            raise
        free = free_memory(device)
        raise DeviceError(
            f"the weights take {human_bytes(needs)}, {device} has {'less' if free is None else human_bytes(free)} "
            "free; load the model with dtype='bfloat16', or on the CPU"
        ) from error


@contextmanager
def _faults_named(source: str | Path) -> Iterator[None]:
    """Turn any error of transformers about a model that it cannot load into an ``ArtefactError``."""
    try:
        yield
    except PliantError:
        raise
    except (OSError, ImportError) as error:
        raise ArtefactError(f"cannot load {str(source)!r}: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise ArtefactError(f"cannot load {str(source)!r}: {_first_line(error)}") from error
    except Exception as error:  # a malformed config can raise anything, as each config class reads its keys itself
        raise ArtefactError(f"cannot load {str(source)!r}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def auto_class(source: str, options: dict[str, Any]) -> Any:
    """The auto class for the classes in a config's ``architectures``; ``AutoModelForCausalLM`` if none is known.

    Raises:
        ArtefactError: the model needs custom code, and ``trust_remote_code`` is not given.
    """
    import transformers

    if "gguf_file" in options:
        return transformers.AutoModelForCausalLM
    passed_on = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    known = {key: options[key] for key in passed_on if key in options}
    config, _ = transformers.PreTrainedConfig.get_config_dict(source, **known)
    if not config.get("model_type"):
        refuse_original_mamba(config, source)
    kind, named, own = config.get("model_type"), config.get("architectures") or (), config.get("auto_map") or {}
    if own and kind not in transformers.CONFIG_MAPPING:
        if not options.get("trust_remote_code"):
            raise ArtefactError(
                f"{source!r} runs custom code ({', '.join(sorted(set(map(str, own.values()))))}); read that code, and "
                "if you trust it, load the model in Python with trust_remote_code=True"
            )
        return getattr(transformers, next((name for name, _ in _KINDS if name in own), "AutoModelForCausalLM"))
    return getattr(transformers, auto_name(kind, named))


def auto_name(model_type: str | None, classes: Collection[str]) -> str:
    """The auto class of transformers that maps ``model_type`` to one of ``classes``; ``AutoModelForCausalLM`` if none
    does."""
    from transformers.models.auto import modeling_auto

    for name, mapping in _KINDS:
        made = getattr(modeling_auto, mapping).get(model_type, ())
        if set(classes) & set([made] if isinstance(made, str) else made):
            return name
    return "AutoModelForCausalLM"


def tokenizer_of(model: Any, source: str | Path | None = None) -> Any:
    """The tokenizer that belongs to a model: from ``source``, or from where the model was loaded.

    Raises:
        ArtefactError: no tokenizer is found.
    """
    from transformers import AutoTokenizer

    if isinstance(model, LlamaModel) and source is None:
        return model.tokenizer
    where = str(source or getattr(model, "name_or_path", "") or "")
    if not where:
        raise ArtefactError(
            "this model was not loaded from a folder, a file or a hub, so it has no tokenizer; pass tokenizer="
        )
    path = Path(where).expanduser()
    where = str(path) if path.exists() else where
    if path.suffix == ".gguf" and path.is_file():
        check_gguf(path)
    location, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (where, {})
    try:
        return AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"no tokenizer found for {where!r} ({str(error).splitlines()[0]}); pass tokenizer="
        ) from error

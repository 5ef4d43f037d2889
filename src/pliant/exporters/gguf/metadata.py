"""All metadata of a GGUF file that is not about the shapes of its layers: the tokenizer, and facts on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pliant.checkpoint.load import tokenizer_of
from pliant.exporters.gguf.carried import carried_metadata
from pliant.exporters.gguf.tokenizer import tokenizer_metadata

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json")
_SAMPLING = {  # setting of generation_config -> its key, and the type in the file
    "temperature": ("temp", np.float32),
    "top_k": ("top_k", np.int32),
    "top_p": ("top_p", np.float32),
    "min_p": ("min_p", np.float32),
    "repetition_penalty": ("penalty_repeat", np.float32),
}


def metadata_of(model: Any, rows: int, parameters: int) -> tuple[dict[str, Any], list[str]]:
    """Metadata, and notes on where llama.cpp does not do the same as transformers.

    A model that was loaded from a GGUF file keeps the metadata of that file.

    Arguments:
        rows: of the embedding.
        parameters: number of weights in the file.

    Raises:
        ArtefactError: llama.cpp cannot do what the tokenizer does.
    """
    from gguf import size_label

    source = Path(getattr(model, "name_or_path", None) or "").expanduser()
    size = {"general.size_label": size_label(parameters, 0, 0, 0)}
    if source.suffix == ".gguf" and source.is_file():
        return carried_metadata(source, rows) | size, []
    settings = getattr(model, "generation_config", None)
    settings = {} if settings is None else settings.to_diff_dict()
    ends = settings.get("eos_token_id")
    if ends is None:
        ends = getattr(model.config.get_text_config(), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    tokenizer = tokenizer_of(model) if _has_tokenizer(source) else None
    metadata, notes = tokenizer_metadata(tokenizer, rows, ends)
    return general_metadata(source, settings) | size | metadata, notes


def general_metadata(source: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The name, the licence that the model card states, and the settings of sampling.

    Arguments:
        source: folder of the model, or its id on a hub.
        settings: of ``generation_config``.
    """
    metadata: dict[str, Any] = {"general.type": "model"}
    if source.name:
        metadata["general.name"] = source.name
    card = _card(source / "README.md")
    for name, key in (("license", ""), ("license_name", ".name"), ("license_link", ".link")):
        if isinstance(card.get(name), str):
            metadata[f"general.license{key}"] = card[name]
    for name, (key, kind) in _SAMPLING.items():
        value = settings.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            metadata[f"general.sampling.{key}"] = kind(value)
    return metadata


def _has_tokenizer(source: Path) -> bool:
    """Whether a folder has a tokenizer; an id on a hub is taken to have one."""
    if not source.is_dir():
        return bool(source.name)
    return any((source / name).is_file() for name in _TOKENIZER_FILES)


def _card(path: Path) -> dict[str, Any]:
    """The data at the beginning of a model card, between two lines of dashes; empty if there are none."""
    try:
        _, data, _ = path.read_text("utf-8").split("---\n", 2)
        found = yaml.safe_load(data)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}

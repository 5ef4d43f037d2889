"""Metadata of a GGUF file that a model was loaded from: it goes into a new file as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pliant.checkpoint.gguf_header import check_gguf
from pliant.errors import ArtefactError

_OWN = {  # of one file, not of the model
    "architecture", "alignment", "file_type", "quantization_version", "size_label", "parameter_count",
}  # fmt: skip
_UNUSED = 5  # the type of a token


def carried_metadata(path: Path, rows: int) -> dict[str, Any]:
    """The tokenizer, general information and context length of a file, with the types they have.

    transformers drops some of it, such as the name of the splitting rule. Rotary positions are in the model's config.

    Arguments:
        rows: of the embedding; the list of tokens gets as many.

    Raises:
        ArtefactError: the file is damaged, or has more tokens than the embedding has rows.
    """
    from gguf import GGUFReader

    check_gguf(path)
    fields = GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    metadata: dict[str, Any] = {}
    for key, field in fields.items():
        start, _, rest = key.partition(".")
        if key == f"{architecture}.context_length":
            metadata[f".{rest}"] = _typed(field)
        elif start == "tokenizer" or (start == "general" and rest not in _OWN):
            metadata[key] = _typed(field)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return {"tokenizer.ggml.model": "none"} | metadata | {".vocab_size": rows}
    if len(tokens) > rows:
        raise ArtefactError(f"{str(path)!r} has {len(tokens)} tokens, and the embedding has {rows} rows")
    metadata["tokenizer.ggml.tokens"] = tokens + [f"[PAD{number}]" for number in range(len(tokens), rows)]
    for name, filler in (("token_type", _UNUSED), ("scores", 0)):
        values = metadata.get(f"tokenizer.ggml.{name}")
        if values is not None:
            metadata[f"tokenizer.ggml.{name}"] = np.pad(values, (0, rows - len(values)), constant_values=filler)
    return metadata


def _typed(field: Any) -> Any:
    """A value of a file: text, a list of texts, or numbers of NumPy, whose dtype is that in the file."""
    kind, value = field.types[-1].name, field.contents()
    if kind == "STRING":
        return value
    dtype = np.dtype(kind.lower())
    return np.array(value, dtype) if len(field.types) > 1 else dtype.type(value)

"""Check the header of a GGUF file from elsewhere before any other reader opens it.

The readers of gguf and transformers trust the numbers in a file: some loop over a declared count until memory ends,
others shorten a string or a tensor in silence. This check reads the header once, through a memory map, keeps nothing
but keys and tensor ranges, and never takes a step that the size of the file does not cover.
"""

from __future__ import annotations

import mmap
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pliant.errors import ArtefactError, MissingExtraError

_SCALARS = {  # number of a value type -> its struct format
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_KEYS, _TENSORS, _STRINGS = 2**16, 2**17, 2**23  # most that a file may have; real ones have 2**6, 2**13, 2**20
_LAYERS = 4096  # most that a file may declare
_SHOWN = 80  # characters of a name in a message, and of texts that are kept


class Header(NamedTuple):
    """Metadata and the table of tensors.

    Attributes:
        metadata: numbers and short texts by their key; ``(element type, length)`` for arrays, None for long texts.
        tensors: name -> element type, shape as in PyTorch, and where the tensor begins in the file, in bytes.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, tuple[int, ...], int]]


def check_gguf(path: Path) -> Header:
    """Check that a GGUF file is complete and consistent, and return its header.

    Raises:
        ArtefactError: the file is not GGUF, of another version, truncated, one part of several, or contradicts itself.
        MissingExtraError: the package gguf is not installed.
    """
    size = path.stat().st_size
    if size < 24:
        raise ArtefactError(f"{str(path)!r} is not a GGUF file: it has {size} bytes, and the header alone has 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _checked(_Cursor(data))
        except _FaultError as fault:
            raise ArtefactError(f"{str(path)!r} cannot be read: {fault}") from None


class _FaultError(Exception):
    """The header is wrong; the message says how."""


class _Cursor:
    """A position in the header that never passes the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.position = data, len(data), 0
        self.strings = 0  # read so far

    def claim(self, count: int, what: str) -> int:
        """Pass ``count`` bytes, and return where they begin."""
        start, end = self.position, self.position + count
        if end > self.size:
            raise _FaultError(f"truncated or damaged: {what} needs {count} bytes, and {self.size - start} are there")
        self.position = end
        return start

    def number(self, form: str, what: str) -> Any:
        return struct.unpack_from(form, self.data, self.claim(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        self.strings += 1
        if self.strings > _STRINGS:
            raise _FaultError(f"damaged: it has more than {_STRINGS} strings")
        length = self.number("<Q", what)
        start = self.claim(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise _FaultError(f"damaged: {what} is not text in UTF-8") from None


def _checked(at: _Cursor) -> Header:
    if at.data[at.claim(4, "the magic") : 4] != b"GGUF":
        raise _FaultError("not a GGUF file: bad magic bytes")
    version = at.number("<I", "the version")
    if version and version & 0xFFFF == 0:
        raise _FaultError("it is big-endian; convert it with gguf_convert_endian of the package gguf")
    if version not in (2, 3):
        raise _FaultError(f"its GGUF version is {version}; versions 2 and 3 are supported")
    tensors, keys = at.number("<Q", "the number of tensors"), at.number("<Q", "the number of keys")
    for count, most, least, what in ((keys, _KEYS, 13, "keys"), (tensors, _TENSORS, 24, "tensors")):
        if count > most or count * least > at.size:
            raise _FaultError(f"truncated or damaged: it declares {count} {what}, too many for {at.size} bytes")
    metadata = _metadata(at, keys)
    alignment = _check_metadata(metadata)
    if not tensors:
        raise _FaultError("it holds no tensors, so it is not a model")
    table = _tensors(at, tensors, alignment)
    if "token_embd.weight" in table:
        columns = table["token_embd.weight"][1][-1]
        hidden = metadata.get(f"{metadata['general.architecture']}.embedding_length", columns)
        if hidden != columns:
            raise _FaultError(f"damaged: embedding_length is {hidden}, and 'token_embd.weight' has {columns} columns")
    return Header(metadata, table)


def _metadata(at: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number in range(count):
        name = at.text(f"key {number}")
        if not name or len(name) > 65535:
            raise _FaultError(f"damaged: the name of key {number} has {len(name)} characters")
        if name in found:
            raise _FaultError(f"damaged: the key {_shown(name)} is there twice")
        found[name] = _value(at, name)
    return found


def _value(at: _Cursor, name: str) -> Any:
    what = f"the value of {_shown(name)}"
    kind = at.number("<I", what)
    if kind in _SCALARS:
        return at.number(_SCALARS[kind], what)
    if kind == _STRING:
        text = at.text(what)
        return text if len(text) <= _SHOWN else None
    if kind != _ARRAY:
        raise _FaultError(f"damaged: {what} has the unknown type {kind}")
    of, count = at.number("<I", what), at.number("<Q", what)
    if of in _SCALARS:
        at.claim(count * struct.calcsize(_SCALARS[of]), what)
    elif of == _STRING:
        if count * 8 > at.size - at.position:
            raise _FaultError(f"truncated or damaged: {what} declares {count} strings, more than the file holds")
        for _ in range(count):
            at.text(what)
    else:
        raise _FaultError(f"damaged: {what} is an array of the unsupported type {of}")
    return of, count


def _check_metadata(found: dict[str, Any]) -> int:
    """Check the keys that readers rely on, and return the alignment of tensors in bytes."""
    architecture = found.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _FaultError("it lacks the text general.architecture, so the kind of model is unknown")
    parts = found.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise _FaultError(
            f"it is one of {parts} parts; join them with 'llama-gguf-split --merge FIRST-PART OUT.gguf', and give that"
        )
    kind = found.get("general.type", "model")
    if kind != "model":
        raise _FaultError(f"it holds {_shown(str(kind))}, not a model")
    layers = found.get(f"{architecture}.block_count", 1)
    if not isinstance(layers, int) or not 0 < layers <= _LAYERS:
        raise _FaultError(f"damaged: it declares {layers} layers; {_LAYERS} are supported")
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        value = found.get(f"{architecture}.{name}")
        if isinstance(value, tuple) and value[1] != layers:
            raise _FaultError(f"damaged: {_shown(f'{architecture}.{name}')} has {value[1]} entries for {layers} layers")
    alignment = found.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
        raise _FaultError(f"damaged: general.alignment must be a power of two up to 65536, not {alignment}")
    return alignment


def _tensors(at: _Cursor, count: int, alignment: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise MissingExtraError("GGUF files need the package gguf: pip install 'pliant[gguf]'") from None
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    ranges: dict[str, tuple[int, int]] = {}
    table: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for number in range(count):
        name = at.text(f"the name of tensor {number}")
        what = f"tensor {_shown(name)}"
        if name in ranges:
            raise _FaultError(f"damaged: {what} is there twice")
        dims = at.number("<I", what)
        if not 1 <= dims <= 4:
            raise _FaultError(f"damaged: {what} has {dims} dimensions")
        shape = [at.number("<Q", what) for _ in range(dims)]
        if not all(0 < length < 2**40 for length in shape):
            raise _FaultError(f"damaged: {what} has shape {shape}")
        kind, offset = at.number("<I", what), at.number("<Q", what)
        if kind not in sizes:
            raise _FaultError(f"{what} has the unknown type {kind}; a newer package gguf may know it")
        block, width = sizes[kind]
        if shape[0] % block:
            raise _FaultError(f"damaged: rows of {what} have {shape[0]} values, not a multiple of {block}")
        elements = 1
        for length in shape:
            elements *= length
        if offset % alignment:
            raise _FaultError(f"damaged: {what} does not begin at a multiple of {alignment} bytes")
        table[name] = kind, tuple(reversed(shape)), offset
        ranges[name] = (offset, offset + elements // block * width)
    start = at.position + -at.position % alignment
    last, (_, end) = max(ranges.items(), key=lambda entry: entry[1][1])
    if start + end > at.size:
        raise _FaultError(
            f"truncated: it lacks {start + end - at.size} bytes, which begin in or before tensor {_shown(last)}"
        )
    ordered = sorted(ranges.items(), key=lambda entry: entry[1])
    for (before, (_, stop)), (name, (offset, _)) in pairwise(ordered):
        if offset < stop:
            raise _FaultError(f"damaged: tensors {_shown(before)} and {_shown(name)} share bytes")
    return {name: (kind, shape, start + offset) for name, (kind, shape, offset) in table.items()}


def _shown(name: str) -> str:
    """A name from the file, short, and without control characters."""
    return ascii(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")

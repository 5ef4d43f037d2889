"""Find, load and describe the compiled kernels, without importing torch.

They are plain C behind ``ctypes``, so that one build serves every version of Python and torch. Without them (no
compiler when pliant was installed, an unknown processor) everything is computed with PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
import warnings
from importlib import metadata
from pathlib import Path

ABI = 3
_FILE = "native.so"
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "pliant_abi": (_I, []),
    "pliant_header": (ctypes.c_char_p, []),
    "pliant_message": (ctypes.c_char_p, []),
    "pliant_available": (ctypes.c_char_p, [_I]),
    "pliant_isa": (ctypes.c_char_p, []),
    "pliant_choose": (_I, [ctypes.c_char_p]),
    "pliant_allocate": (_P, [_L]),
    "pliant_free": (None, [_P]),
    "pliant_stream": (ctypes.c_uint64, [_P, _L, _I]),
    "pliant_pack": (_P, [_P, _L, _L, _I, _I, _L, _P, _I, ctypes.POINTER(_L)]),
    "pliant_pack_write": (None, [_P, _P, _I]),
    "pliant_pack_end": (None, [_P]),
    "pliant_verify": (_I, [_P, _L, _I]),
    "pliant_unpack": (_I, [_P, _L, _P, _I]),
    "pliant_cache_new": (_P, [_L, _L, _P]),
    "pliant_cache_copy": (_P, [_P]),
    "pliant_cache_end": (None, [_P]),
    "pliant_cache_length": (_L, [_P]),
    "pliant_cache_bytes": (_L, [_P]),
    "pliant_cache_crop": (None, [_P, _L]),
    "pliant_cache_append": (None, [_P, _P, _P, _L, _L]),
    "pliant_cache_settle": (None, [_P, _I]),
    "pliant_cache_read": (None, [_P, _P, _P]),
    "pliant_cache_attend": (None, [_P, _P, _L, _L, ctypes.c_double, _L, _P, _I]),
    "pliant_decoder_new": (_P, [_P]),
    "pliant_decoder_end": (None, [_P]),
    "pliant_decoder_add": (_I, [_P, _P]),
    "pliant_decoder_run": (_I, [_P, _P, _L, _P, _P, _L, _P, _I, _P]),
    "pliant_linear": (_I, [_P, _L, _L, _L, _P, _I, _L, _L, _P, _P, _I, _L, _I]),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None if they are not available, for the reason that :func:`state` gives."""
    return _load()[0]


def state() -> str:
    """The kernels in use, in words, or the reason why none are."""
    loaded, why = _load()
    return why if loaded is None else f"{isa()} of {', '.join(available())}"


def available() -> list[str]:
    """Instruction sets that can be chosen here, the best first. Those named ``emulated`` are for tests."""
    loaded = library()
    names: list[str] = []
    while loaded is not None and (name := loaded.pliant_available(len(names))) is not None:
        names.append(name.decode())
    return names


def isa() -> str:
    """The instruction set in use; ``torch`` without kernels."""
    loaded = library()
    return "torch" if loaded is None else loaded.pliant_isa().decode()


def bandwidth(threads: int, size: int = 3 << 25) -> float:
    """Bytes per second that this number of threads reads from memory, the best of five passes; 0 without kernels."""
    loaded = library()
    if loaded is None:
        return 0.0
    memory = loaded.pliant_allocate(size)
    try:
        ctypes.memset(memory, 1, size)
        rates = []
        for _ in range(5):
            began = time.perf_counter()
            loaded.pliant_stream(memory, size, threads)
            rates.append(size / (time.perf_counter() - began))
        return max(rates)
    finally:
        loaded.pliant_free(memory)


def choose(name: str) -> None:
    """Use another instruction set from now on, as the environment variable ``PLIANT_ISA`` does from the start.

    Raises:
        ValueError: this machine does not have the set.
    """
    loaded = library()
    if loaded is None:
        raise ValueError(f"instruction set {name!r} cannot be chosen: the kernels are not available; {state()}")
    if loaded.pliant_choose(name.encode()):
        raise ValueError(f"unknown instruction set {name!r} on this machine; choose from: {', '.join(available())}")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    asked = os.environ.get("PLIANT_LIBRARY")
    if asked == "":
        return None, "PyTorch's own: PLIANT_LIBRARY is empty"
    path = Path(asked) if asked else _find()
    if path is None:
        return None, "PyTorch's own: pliant was installed without its kernels (no C++ compiler was found)"
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"PyTorch's own: {error}"
    if loaded.pliant_abi() != ABI:
        return None, f"PyTorch's own: {path} belongs to another version of pliant; install pliant again"
    wanted = os.environ.get("PLIANT_ISA")
    if wanted and loaded.pliant_choose(wanted.encode()):
        warnings.warn(f"PLIANT_ISA names {wanted!r}, which this machine does not have; it is ignored", stacklevel=2)
    return loaded, ""


def _find() -> Path | None:
    installed = Path(__file__).with_name(_FILE)
    if installed.exists():
        return installed
    try:  # an editable install keeps the library elsewhere
        files = metadata.files("pliant") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == _FILE), None)

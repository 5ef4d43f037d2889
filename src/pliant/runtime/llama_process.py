"""Stock llama.cpp in a process of its own: it ends its process on a fault, and its memory is given back with it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pliant.errors import ArtefactError

INSTALL = "pip install 'pliant[llamacpp]'"
CONTEXT = 512
CACHE_TYPES = {"f32": 0, "f16": 1}  # of keys and values, as GGML numbers them


def why_no_llama_cpp() -> str:
    """The reason why llama.cpp cannot run here; empty if it can."""
    return "" if find_spec("llama_cpp") is not None else f"llama-cpp-python is not installed: {INSTALL}"


class LlamaProcess:
    """A GGUF file opened by llama.cpp on the CPU.

    Arguments:
        path: the file.
        context: tokens that fit the cache; default: as many as the model has positions for, at most 4096.
        cache: ``f32`` or ``f16``, for keys and values.
        threads: default: those of PyTorch.

    Attributes:
        vocabulary: tokens of the model.
        positions: tokens that the model was trained for.
        version: of llama-cpp-python.
        size: bytes of the weights.
        close: ends the process, which also happens when this object is gone.

    Raises:
        ArtefactError: llama.cpp is missing, or does not open the file; the message has its reason.
    """

    def __init__(self, path: str | Path, *, context: int | None = None, cache: str = "f16", threads: int):
        if why := why_no_llama_cpp():
            raise ArtefactError(why)
        self.path = Path(path)
        self._answers = tempfile.TemporaryDirectory(prefix="pliant-llama-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pliant.runtime.llama_worker", self._answers.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.close = weakref.finalize(self, _end, self._process, self._answers)
        try:
            found = self._ask("open", path=str(self.path), context=context, cache=CACHE_TYPES[cache], threads=threads)
        except ArtefactError:
            self.close()
            raise
        self.vocabulary, self.positions = found["vocabulary"], found["positions"]
        self.version, self.size = found["version"], found["size"]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after every token of a text, shape ``(tokens, vocabulary)``, float32."""
        return np.load(self._ask("logits", ids=list(ids))["file"])

    def seconds(self, ids: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds of one prefill, and of ``tokens`` greedy steps after it."""
        found = self._ask("seconds", ids=list(ids), tokens=tokens)
        return found["prefill"], found["decode"]

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text by llama.cpp's own tokenizer, with those that it adds.

        Arguments:
            special: special tokens in the text are recognised.
        """
        return self._ask("tokenize", text=text, special=special)["ids"]

    def text(self, ids: Sequence[int]) -> str:
        """The inverse of :meth:`tokenize`."""
        return self._ask("text", ids=list(ids))["text"]

    def __enter__(self) -> LlamaProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str, **given: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended; the missing answer says so
            self._process.stdin.write(json.dumps({"what": what, **given}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line.endswith("\n") else {"error": "it ended without an answer"}
        if "error" in answer:
            raise ArtefactError(f"llama.cpp cannot {what} {str(self.path)!r}: {answer['error']}")
        return answer


def _end(process: subprocess.Popen[str], answers: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # it may hold a request that was never read
                stream.close()
    answers.cleanup()


def quantize(source: Path, target: Path, file_type: int, threads: int) -> None:
    """Write a GGUF file of float weights in another type, with llama.cpp's own code.

    Arguments:
        file_type: the number of llama.cpp's ``LLAMA_FTYPE``.

    Raises:
        ArtefactError: llama.cpp is missing, or refuses.
    """
    if why := why_no_llama_cpp():
        raise ArtefactError(why)
    with tempfile.TemporaryDirectory(prefix="pliant-llama-") as place:
        request = {"what": "quantize", "source": str(source), "target": str(target)}
        request |= {"file_type": file_type, "threads": threads}
        done = subprocess.run(
            [sys.executable, "-m", "pliant.runtime.llama_worker", place],
            input=json.dumps(request) + "\n",
            capture_output=True,
            text=True,
            check=False,
        )
    answer = json.loads(done.stdout) if done.stdout.endswith("\n") else {"error": "it ended without an answer"}
    if "error" in answer:
        raise ArtefactError(f"llama.cpp cannot quantise {str(source)!r}: {answer['error']}")

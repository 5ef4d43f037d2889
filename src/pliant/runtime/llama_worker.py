"""The process that runs llama.cpp: reads requests as JSON lines, and answers each with one.

    python -m pliant.runtime.llama_worker FOLDER

Logits are left as files in FOLDER.
"""

from __future__ import annotations

import collections
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 512  # tokens in one pass
_LAST = 12  # lines of llama.cpp's log that are kept


class Worker:
    """One model, its context, and the requests on them."""

    def __init__(self, folder: Path):
        import llama_cpp  # pyright: ignore[reportMissingImports]  (an extra)

        self.api: Any = llama_cpp
        self.folder = folder
        self.log: collections.deque[str] = collections.deque(maxlen=_LAST)

        @llama_cpp.llama_log_callback
        def keep(level: int, text: bytes, _data: Any) -> None:  # noqa: ARG001
            self.log.append(text.decode("utf-8", "replace").strip())

        self._keep = keep  # llama.cpp calls it as long as this process lives
        llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def open(self, path: str, context: int | None, cache: int, threads: int) -> dict[str, Any]:
        api = self.api
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise RuntimeError(self.reason())
        self.vocab = api.llama_model_get_vocab(self.model)
        self.vocabulary = api.llama_vocab_n_tokens(self.vocab)
        positions = api.llama_model_n_ctx_train(self.model)
        of_context = api.llama_context_default_params()
        of_context.n_ctx = context or min(positions, 4096)
        of_context.n_batch = of_context.n_ubatch = min(BATCH, of_context.n_ctx)
        of_context.type_k = of_context.type_v = cache
        of_context.flash_attn_type = 0
        of_context.n_threads = of_context.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, of_context)
        if not self.context:
            raise RuntimeError(self.reason())
        self.batch = api.llama_batch_init(BATCH, 0, 1)
        return {
            "vocabulary": self.vocabulary,
            "positions": positions,
            "version": api.__version__,
            "size": api.llama_model_size(self.model),
        }

    def reason(self) -> str:
        """The last line of the log that names a fault."""
        faults = [line for line in self.log if "error" in line.lower() or "fail" in line.lower()]
        return faults[0] if faults else (self.log[-1] if self.log else "no reason is given")

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, ids: list[int], start: int, every: bool) -> None:
        """One pass over tokens from position ``start`` on; logits of all of them or of the last."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = every or place == len(ids) - 1
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError(self.reason())

    def row(self, place: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, place), (self.vocabulary,))

    def logits(self, ids: list[int]) -> dict[str, Any]:
        self.clear()
        found = np.empty((len(ids), self.vocabulary), np.float32)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            self.decode(part, start, every=True)
            for place in range(len(part)):
                found[start + place] = self.row(place)
        file = self.folder / "logits.npy"
        np.save(file, found)
        return {"file": str(file)}

    def seconds(self, ids: list[int], tokens: int) -> dict[str, Any]:
        self.clear()
        began, last = time.perf_counter(), 0
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            self.decode(part, start, every=False)
            last = len(part) - 1
        token = int(self.row(last).argmax())
        middle = time.perf_counter()
        for step in range(tokens):
            self.decode([token], len(ids) + step, every=False)
            token = int(self.row(0).argmax())
        return {"prefill": middle - began, "decode": time.perf_counter() - middle}

    def tokenize(self, text: str, special: bool) -> dict[str, Any]:
        data = text.encode()
        room = len(data) + 16
        ids = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocab, data, len(data), ids, room, True, special)
        if count < 0:
            raise RuntimeError(f"the text has more than {room} tokens")
        return {"ids": list(ids[:count])}

    def text(self, ids: list[int]) -> dict[str, Any]:
        pieces = b""
        room = ctypes.create_string_buffer(512)
        for token in ids:
            pieces += room.raw[: self.api.llama_token_to_piece(self.vocab, token, room, len(room), 0, True)]
        return {"text": pieces.decode("utf-8", "replace")}

    def quantize(self, source: str, target: str, file_type: int, threads: int) -> dict[str, Any]:
        settings = self.api.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = file_type, threads
        if self.api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)) != 0:
            raise RuntimeError(self.reason())
        return {}


def main() -> None:
    worker = Worker(Path(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("what"))(**request)
        except Exception as error:  # of any kind: the asking process shows it
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

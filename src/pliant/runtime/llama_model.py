"""A GGUF file that llama.cpp runs, with the part of a transformers model that measuring uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pliant.errors import ArtefactError
from pliant.runtime.llama_process import LlamaProcess


class LlamaModel(nn.Module):
    """A causal language model in llama.cpp. It predicts tokens, and times itself; it has no weights of its own here.

    Arguments:
        path: the GGUF file.
        context, cache: see :class:`pliant.runtime.llama_process.LlamaProcess`.
    """

    def __init__(self, path: str | Path, *, context: int | None = None, cache: str = "f16"):
        super().__init__()
        self.process = LlamaProcess(path, context=context, cache=cache, threads=torch.get_num_threads())
        self.name_or_path = str(path)
        self.runtime = f"llama.cpp ({self.process.version})"
        self.tokenizer = LlamaTokenizer(self.process)
        self.config = _Config(max_position_embeddings=self.process.positions, vocab_size=self.process.vocabulary)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.none = nn.Parameter(torch.empty(0), requires_grad=False)  # measuring asks parameters for their device

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The logits after every token, shape ``(batch, tokens, vocabulary)``."""
        if use_cache:
            raise ArtefactError("llama.cpp keeps its own cache; call this model with use_cache=False")
        rows = [torch.from_numpy(self.process.logits(row)) for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack(rows))

    def seconds(self, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
        """Seconds of one prefill and of ``tokens`` decoding steps after it, for one sequence."""
        if len(ids) > 1:
            raise ArtefactError("llama.cpp is timed with one sequence at a time; leave out batch")
        return self.process.seconds(ids[0].tolist(), tokens)

    def can_generate(self) -> bool:
        return True

    def get_decoder(self) -> LlamaModel:
        return self

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(num_embeddings=self.process.vocabulary)

    def generate(self, *_: Any, **__: Any) -> None:
        raise ArtefactError("open questions are answered in transformers only; leave out runtime, or these tasks")


class LlamaTokenizer:
    """llama.cpp's own tokenizer of a model."""

    eos_token_id = None  # none is appended
    chat_template = None

    def __init__(self, process: LlamaProcess):
        self._process = process

    def __call__(self, texts: str | Sequence[str], return_tensors: str | None = None, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            ids = self._process.tokenize(texts)
            return {"input_ids": ids if return_tensors is None else torch.tensor([ids])}
        return {"input_ids": [self._process.tokenize(text) for text in texts]}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return self._process.text(ids)


class _Config(SimpleNamespace):
    """The part of a config that measuring reads."""

    model_type = "llama.cpp"
    hidden_size = 0
    is_encoder_decoder = False

    def get_text_config(self, decoder: bool = False) -> _Config:  # noqa: ARG002
        return self

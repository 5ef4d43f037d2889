"""Open a GGUF file with llama.cpp, and compare its logits with those of the model it was written from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

from pliant.checkpoint.load import tokenizer_of
from pliant.errors import ArtefactError
from pliant.forward.windows import longest_of
from pliant.runtime.llama_process import LlamaProcess, why_no_llama_cpp

TOKENS = 256
EXACT = {"f32": 0.02, "f16": 0.05, "bf16": 0.05}
"""Type -> the largest difference of the logits, as a share of their norm. Half-precision models differ as much from
themselves in float32."""
ROUNDED = 0.7  # for other types; logits of another model differ by more than 1


@torch.inference_mode()
def prove(path: Path, model: Any, kind: str) -> str:
    """A sentence on the difference.

    Raises:
        ArtefactError: llama.cpp does not open the file, or computes something else.
    """
    if why := why_no_llama_cpp():
        return f"not proven here: {why}"
    rows = model.get_input_embeddings().weight.shape[0]
    ids, which = _tokens(model, rows, min(TOKENS, longest_of(model)))
    with LlamaProcess(path, context=TOKENS, cache="f32", threads=torch.get_num_threads()) as process:
        theirs = process.logits(ids[0].tolist())[:, :rows].astype(np.float64)
    ours = model(input_ids=ids.to(model.device), use_cache=False).logits[0].double().cpu().numpy()
    apart = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    same = float((theirs.argmax(-1) == ours.argmax(-1)).mean())
    limit = EXACT.get(kind, ROUNDED)
    if not apart <= limit:
        raise ArtefactError(
            f"llama.cpp {process.version} computes something else from this file: its logits differ by {apart:.2g} of "
            f"their norm, where {limit} is allowed; the file is not kept. Please report this model"
        )
    return (
        f"proven in llama.cpp (llama-cpp-python {process.version}): logits of {ids.shape[1]} {which} differ by "
        f"{apart:.1e} of their norm, {same:.1%} of the likeliest tokens are the same"
    )


def _tokens(model: Any, rows: int, count: int) -> tuple[torch.Tensor, str]:
    """Tokens of English text, shape ``(1, count)``; random ones for a model without a tokenizer."""
    with suppress(ArtefactError):
        ids = tokenizer_of(model)(topics["exceptions"], return_tensors="pt", verbose=False)["input_ids"][:, :count]
        return ids, "tokens of text"
    draw = torch.Generator().manual_seed(0)
    return torch.randint(rows, (1, count), generator=draw), "random tokens"

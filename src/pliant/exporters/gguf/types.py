"""Types of weights in a GGUF file, and which tensor gets which."""

from __future__ import annotations

from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from pliant.exporters.gguf.plan import Tensor

Q = GGMLQuantizationType


class FileType(NamedTuple):
    """One value of ``--type``.

    Attributes:
        number: ``general.file_type``, which readers show.
        weights: the type of matrices.
        ends: the type of the output head, or of the embedding if it is both.
    """

    number: int
    weights: GGMLQuantizationType
    ends: GGMLQuantizationType


TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, Q.F32, Q.F32),
    "f16": FileType(LlamaFileType.MOSTLY_F16, Q.F16, Q.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, Q.BF16, Q.BF16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Q.Q8_0, Q.Q8_0),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Q.Q4_0, Q.Q8_0),
    "q4_1": FileType(LlamaFileType.MOSTLY_Q4_1, Q.Q4_1, Q.Q8_0),
}
"""Types that are written here."""

BY_LLAMA_CPP = {
    name.lower(): int(LlamaFileType[f"MOSTLY_{name}"])
    for name in ("Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
}
"""Types that llama.cpp writes from a file of floats -> their number."""


def type_of(tensor: Tensor, kind: FileType, tied: bool) -> GGMLQuantizationType:
    """The type of one tensor: rows that are no multiple of a block become float16, as with llama.cpp's converter.

    Arguments:
        tied: the embedding is the output head, too.
    """
    if tensor.plain or len(tensor.shape) < 2 or not tensor.name.endswith("weight"):
        return Q.F32
    head = tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight")
    wanted = kind.ends if head else kind.weights
    block, _ = GGML_QUANT_SIZES[wanted]
    return Q.F16 if tensor.shape[-1] % block else wanted


def bytes_of(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    """The shape of a tensor in bytes: its last dimension is that of a row."""
    block, size = GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * size)

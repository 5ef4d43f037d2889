"""The packed form in plain PyTorch and numpy: used without kernels, and to test the kernels."""

from __future__ import annotations

import numpy as np
import torch

from pliant.runtime.packed_header import MAGIC, SIZE, VERSION, RawHeader
from pliant.runtime.rounding_grid import codes_of, scales_of

PANEL, STEP = 16, 64
INPUTS = (2, 4, 8)  # inputs per step, in bf16, int8, int4
MASK = (4, 8, 16)  # bytes of mask per step
SLACK = 64  # readable bytes after the values
BF16, INT8, INT4 = range(3)


def pack(weight: torch.Tensor, kind: int, sparse: bool, group: int, scales: torch.Tensor | None) -> torch.Tensor:
    """Pack a weight of shape ``(out, in)``, float32, into shape ``(bytes,)``."""
    rows, columns = weight.shape
    panels, steps, groups = -(-rows // PANEL), -(-columns // INPUTS[kind]), -(-columns // group)
    scale_bytes = b""
    if kind == BF16:
        elements = weight.to(torch.bfloat16).view(torch.int16).numpy()
        elements = np.where(elements == -32768, 0, elements).astype("<i2")  # minus zero is zero
    else:
        bits, width = (8, None) if kind == INT8 else (4, group)
        if scales is None:
            scales = scales_of(weight, bits, width)
        elements = codes_of(weight, scales.view(rows, -1), bits, width).to(torch.int8).numpy()
        padded = np.zeros((panels * PANEL, scales.numel() // rows), "<f4")
        padded[:rows] = scales.view(rows, -1).numpy()
        if kind == INT8:
            scale_bytes = padded.tobytes()
        else:
            by_group = torch.from_numpy(padded).to(torch.bfloat16).view(torch.int16).numpy()
            scale_bytes = by_group.reshape(panels, PANEL, groups).transpose(0, 2, 1).tobytes()
    stream = _stream(elements, kind, panels, steps)
    masks, values, offsets, stored = b"", stream.tobytes(), b"", rows * columns
    if sparse:
        masks, values, offsets, stored = _sparse(stream, kind, panels)
    places, at = [], SIZE
    for part in (scale_bytes, offsets, masks, values):
        places.append(at)
        at = _aligned(at + len(part))
    size = _aligned(places[3] + len(values) + SLACK)
    packed = np.zeros(size, np.uint8)
    for start, part in zip(places, (scale_bytes, offsets, masks, values), strict=True):
        packed[start : start + len(part)] = np.frombuffer(part, np.uint8)
    fields = (MAGIC, VERSION, kind, int(sparse), group if kind == INT4 else 0, rows, columns, stored, *places, size, 0)
    header = RawHeader._make(fields)
    packed[:SIZE] = np.frombuffer(header.to_bytes(), np.uint8)
    packed[:SIZE] = np.frombuffer(header._replace(checksum=checksum(packed)).to_bytes(), np.uint8)
    return torch.from_numpy(packed)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack a matrix of shape ``(bytes,)`` into shape ``(out, in)``, float32."""
    elements, scales = codes(packed)
    if scales is None:
        return elements.float()
    width = RawHeader.read(packed.numpy()[:SIZE].tobytes()).group or elements.shape[1]
    return elements.float() * scales.repeat_interleave(width, 1)[:, : elements.shape[1]]


def codes(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stored numbers of a matrix, and the scales that they are multiplied by.

    Returns:
        int8 of shape ``(out, in)``, and float32 of shape ``(out, groups)``; or bfloat16 and None.
    """
    data = packed.numpy()
    header = RawHeader.read(data[:SIZE].tobytes())
    kind, group, rows, columns = header.format, header.group, header.rows, header.columns
    panels, steps, groups = -(-rows // PANEL), -(-columns // INPUTS[kind]), -(-columns // (group or columns))
    if header.sparse:
        present = _bits(data[header.masks :][: panels * steps * MASK[kind]])
        ends = np.frombuffer(data[header.offsets :][: 8 * (panels + 1)].tobytes(), "<i8")
        values = data[header.values :][: int(ends[-1])]
        stream = np.zeros(present.shape, "<i2" if kind == BF16 else np.uint8)
        stream[present] = values.view("<i2") if kind == BF16 else values if kind == INT8 else _nibbles(values)
        if kind == INT4:
            stream = stream[0::2] | stream[1::2] << 4
    else:
        stream = data[header.values :][: panels * steps * STEP]
        stream = stream.view("<i2") if kind == BF16 else stream
    inputs = INPUTS[kind]
    if kind == INT4:
        halves = _nibbles(stream).reshape(panels, steps, PANEL, 4, 2).transpose(0, 1, 2, 4, 3)  # k, then 4 + k
        codes = (halves.astype(np.int8) ^ 8) - 8
    else:
        codes = stream.view(np.int8) if kind == INT8 else stream
    elements = codes.reshape(panels, steps, PANEL, inputs).transpose(0, 2, 1, 3).reshape(panels * PANEL, steps * inputs)
    elements = torch.from_numpy(np.ascontiguousarray(elements[:rows, :columns]))
    if kind == BF16:
        return elements.view(torch.bfloat16), None
    if kind == INT8:
        scales = data[header.scales :][: panels * PANEL * 4].view("<f4")[:rows]
        return elements, torch.from_numpy(scales.copy())[:, None]
    scales = data[header.scales :][: panels * groups * PANEL * 2].view("<i2").reshape(panels, groups, PANEL)
    scales = torch.from_numpy(scales.transpose(0, 2, 1).reshape(panels * PANEL, groups)[:rows].copy())
    return elements, scales.view(torch.bfloat16).float()


def verify(packed: torch.Tensor) -> str:
    """The fault of a packed matrix; an empty string if it has none."""
    data = packed.numpy()
    header = RawHeader.read(data[:SIZE].tobytes())
    kind = header.format
    if header.version != VERSION:
        return f"it has version {header.version}, this pliant reads version {VERSION}"
    if header.size != data.size or header.size % 8:
        return f"it has {data.size} bytes, but its header declares {header.size}"
    if checksum(data) != header.checksum:
        return "checksum mismatch: it is damaged"
    panels, steps = -(-header.rows // PANEL), -(-header.columns // INPUTS[kind])
    if not SIZE <= header.scales <= header.offsets <= header.masks <= header.values <= header.size:
        return "the parts that its header declares do not fit into it"
    if not header.sparse:
        return "" if header.values + panels * steps * STEP <= header.size else "its values do not fit into it"
    counts = _bits(data[header.masks :][: panels * steps * MASK[kind]]).reshape(panels, -1).sum(1)
    ends = np.frombuffer(data[header.offsets :][: 8 * (panels + 1)].tobytes(), "<i8")
    expected = np.cumsum([0, *(counts * 2 if kind == BF16 else counts if kind == INT8 else counts // 2)])
    return "" if (ends == expected).all() else "its masks do not match its values"


def checksum(data: np.ndarray) -> int:
    """The checksum of all 8-byte words and their positions, counting the word of the checksum itself as 0."""
    words = data.view("<u8").copy()
    words[11] = 0
    with np.errstate(over="ignore"):
        words ^= np.arange(words.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        words *= np.uint64(0xFF51AFD7ED558CCD)
        words ^= words >> np.uint64(32)
        words *= np.uint64(0xC4CEB9FE1A85EC53)
        return int(words.sum(dtype=np.uint64))


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _stream(elements: np.ndarray, kind: int, panels: int, steps: int) -> np.ndarray:
    """Elements of shape ``(out, in)`` in the order of the dense stream, flat."""
    inputs = INPUTS[kind]
    padded = np.zeros((panels * PANEL, steps * inputs), elements.dtype)
    padded[: elements.shape[0], : elements.shape[1]] = elements
    ordered = padded.reshape(panels, PANEL, steps, inputs).transpose(0, 2, 1, 3)
    if kind == INT4:
        codes = ordered.reshape(panels, steps, PANEL, 2, 4).view(np.uint8) & 15
        ordered = codes[..., 0, :] | codes[..., 1, :] << 4
    return np.ascontiguousarray(ordered).reshape(-1)


def _sparse(stream: np.ndarray, kind: int, panels: int) -> tuple[bytes, bytes, bytes, int]:
    """Masks, values, offsets of panels, and the number of stored elements."""
    elements = _nibbles(stream) if kind == INT4 else stream
    present = elements != 0
    if kind == INT4:  # an even number of every 16
        sixteens = present.reshape(-1, 16)
        odd = sixteens.sum(1) % 2 == 1
        sixteens[odd, (~sixteens[odd]).argmax(1)] = True
    masks = np.packbits(present, bitorder="little").tobytes()
    kept = elements[present]
    values = (kept[0::2] | kept[1::2] << 4).tobytes() if kind == INT4 else kept.tobytes()
    ends = np.cumsum([0, *present.reshape(panels, -1).sum(1)])
    in_bytes = ends * 2 if kind == BF16 else ends if kind == INT8 else ends // 2
    return masks, values, in_bytes.astype("<i8").tobytes(), len(kept)


def _bits(masks: np.ndarray) -> np.ndarray:
    return np.unpackbits(masks, bitorder="little").astype(bool)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """The two nibbles of every byte, the low one first."""
    data = data.view(np.uint8)
    return np.stack([data & 15, data >> 4], -1).reshape(-1)

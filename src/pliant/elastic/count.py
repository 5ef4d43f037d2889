"""The cost of a sub-network, counted from the anatomy alone: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

from pliant.anatomy import Anatomy, counted_once
from pliant.architecture import Part
from pliant.elastic.subnet import Subnet

SCAN_BYTES = 4  # of an element of a scan's state: transformers keeps it in float32, whatever the dtype of the model


def parameters(anatomy: Anatomy, subnet: Subnet = Subnet()) -> int:
    """Parameters of the model under ``subnet``, including embeddings and head, tied ones once."""
    return anatomy.rest + sum(
        block.parameters(subnet.kept(block)) if own else block.norm_parameters
        for block, own in counted_once(anatomy.alive(subnet.skip))
    )


def macs(anatomy: Anatomy, subnet: Subnet = Subnet(), *, tokens: int = 1, context: int | None = None) -> int:
    """Multiply-accumulates of one forward pass over ``tokens`` tokens: matrix products in the layers and the output
    head, depthwise convolutions, and scans.

    A scan counts as its recurrence: for every token, each element of the state decays, takes up the input, and is read
    (``h = a * h + b * x; y = c * h``). A delta rule also reads it before it writes. An implementation in chunks does
    other operations for the same result.

    Arguments:
        tokens: tokens in the pass.
        context: keys that every token attends to; default: ``tokens`` (a prefill, counted without the causal saving).
    """
    context = tokens if context is None else context
    total = anatomy.head
    for block in anatomy.alive(subnet.skip):
        kept = subnet.kept(block)
        multiplied = (weight for weight in block.weights if weight.reads is not None or weight.depthwise)
        total += sum(weight.uses * block.active(weight, kept) for weight in multiplied)
        if block.spec.scores:
            total += 2 * context * block.width(Part(block.spec.scores), kept)
        total += block.spec.scan_macs * block.scan_state(kept)
    return total * tokens


def weight_bytes(anatomy: Anatomy, subnet: Subnet = Subnet(), *, element: int) -> int:
    """Bytes of the parameters with ``element`` bytes each."""
    return parameters(anatomy, subnet) * element


def streamed_bytes(anatomy: Anatomy, subnet: Subnet = Subnet(), *, element: int, context: int = 0) -> int:
    """Bytes that one decoding step streams: every matrix of the blocks that a token uses, the output head once, the
    key-value cache, and the states of convolutions and scans, which it reads and writes.

    Arguments:
        context: tokens in the key-value cache.
    """
    total = anatomy.head
    for block in anatomy.alive(subnet.skip):
        kept = subnet.kept(block)
        total += block.norm_parameters + sum(
            block.active(weight, kept) for weight in block.weights if not weight.buffer
        )
    states = 2 * state_bytes(anatomy, subnet, element=element)
    return total * element + context * cache_bytes(anatomy, subnet, element=element) + states


def cache_bytes(anatomy: Anatomy, subnet: Subnet = Subnet(), *, element: int) -> int:
    """Bytes that one token adds to the key-value cache."""
    total = 0
    for block in anatomy.alive(subnet.skip):
        if block.spec.scores and block.spec.slot:
            leader = block.axes[block.axes[block.spec.scores].leader]
            kept = subnet.kept(block).get(leader.leader, leader.size)
            total += 2 * (block.cached or kept) * leader.unit
    return total * element


def state_bytes(anatomy: Anatomy, subnet: Subnet = Subnet(), *, element: int) -> int:
    """Bytes of the states that convolutions and scans keep for one sequence, however long it is.

    Arguments:
        element: bytes of an element of a convolution's state; a scan's state is float32.
    """
    alive = [(block, subnet.kept(block)) for block in anatomy.alive(subnet.skip)]
    return sum(element * block.conv_state(kept) + SCAN_BYTES * block.scan_state(kept) for block, kept in alive)


def ratio(anatomy: Anatomy, subnet: Subnet) -> float:
    """Share of the parameters that ``subnet`` removes, 0 for the dense model."""
    dense = parameters(anatomy)
    return 1 - parameters(anatomy, subnet) / dense

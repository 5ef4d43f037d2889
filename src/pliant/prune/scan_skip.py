"""The skip that remains of a scan whose state is removed: a multiple of its input."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from pliant.anatomy import Anatomy, Axis, Block, evaluating, layers_of
from pliant.compat.scan import watched_scans
from pliant.device import to_float64
from pliant.elastic import Subnet
from pliant.errors import StepError
from pliant.forward.windows import batches_of, tokens_at_once, within_memory
from pliant.record import Note
from pliant.step import Job

KEPT, IDENTITY, FITTED = SKIPS = ("kept", "identity", "fitted")
SKIP_HELP = (
    "A scan without its state returns its input x times a skip. kept: the model's own D; identity: 1, as in the paper; "
    "fitted: for every head (of Mamba-1, every channel) the multiple of x that is nearest to the scan's output on "
    "calibration text."
)


def scans_of(anatomy: Anatomy) -> list[Block]:
    """The blocks that have a scan which can be removed alone, and of which a skip remains."""
    return [block for block in anatomy.blocks.values() if (axis := scan_axis(block)) is not None and axis.fewest == 0]


def scan_axis(block: Block) -> Axis | None:
    """The axis of the state of a block's scan; None if the block has no scan, or its skip alone cannot remain."""
    axis = block.state_axis
    skipping = any(weight.skips == axis.leader for weight in block.weights) if axis else False
    return axis if axis and axis.size and skipping else None


def without_scan(anatomy: Anatomy, subnet: Subnet) -> list[Block]:
    """The remaining blocks whose scan ``subnet`` removes."""
    kept = dict(subnet.keep)
    scans = ((block, scan_axis(block)) for block in scans_of(anatomy) if block.name not in subnet.skip)
    return [block for block, axis in scans if axis and kept.get(axis.name) == 0]


def skip_note(anatomy: Anatomy, subnet: Subnet, skip: str) -> list[Note]:
    """A line of the report that says what remains of the removed scans."""
    without = len(without_scan(anatomy, subnet))
    scale = {KEPT: "its own D", IDENTITY: "1", FITTED: "the multiple that is nearest to the scan on calibration text"}
    return [Note(f"Scans removed: {without}. In their place x is multiplied by {scale[skip]}.")] if without else []


def with_skips(job: Job, anatomy: Anatomy, skip: str, windows: torch.Tensor | None = None) -> Anatomy:
    """The anatomy by which scans without a state have this skip. Sub-networks that are activated, scored and cut with
    it agree; scans that stay keep their D.

    Arguments:
        skip: kept, identity or fitted.
        windows: token ids for fitted, shape ``(windows, seqlen)``.

    Raises:
        StepError: the scan of a block does not run in a way that can be fitted.
    """
    if skip == KEPT or not (blocks := scans_of(anatomy)):
        return anatomy
    model, fitted = job.model, {}
    layers = layers_of(model, anatomy.source)
    if skip == FITTED:
        assert windows is not None
        with job.progress.stage("fit of the skips"):
            fitted = within_memory(
                model,
                lambda tokens: _fitted(model, anatomy, batches_of(model, windows, tokens)),
                max(tokens_at_once(model), windows.shape[1]),
            )

    def replaced(block: Block) -> Block:
        weights = []
        for weight in block.weights:
            if weight.skips is not None:
                own = weight.tensor(layers[block.layer]).detach()
                weight = replace(weight, alone=fitted[block.name].to(own) if fitted else torch.ones_like(own))
            weights.append(weight)
        return replace(block, weights=tuple(weights))

    changed = {block.name: replaced(block) for block in blocks}
    return replace(anatomy, blocks={**anatomy.blocks, **changed})


@torch.inference_mode()
def _fitted(model: Any, anatomy: Anatomy, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Block -> the multiple of its input by which the output of its scan is approximated best, shape ``(units,)``."""
    layers = layers_of(model, anatomy.source)
    products: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    running: list[str] = []

    def watch(x: torch.Tensor, y: torch.Tensor) -> None:
        for name in running:
            of_x = to_float64(x)
            products[name] = products.get(name, 0) + (of_x * to_float64(y)).sum((0, 1, 3))
            squares[name] = squares.get(name, 0) + of_x.square().sum((0, 1, 3))

    with ExitStack() as stack, evaluating(model), watched_scans(watch):
        for block in scans_of(anatomy):
            module = layers[block.layer].get_submodule(block.spec.module)
            stack.callback(module.register_forward_pre_hook(lambda *_, name=block.name: running.append(name)).remove)
            stack.callback(module.register_forward_hook(lambda *_: running.clear()).remove)
        for ids in batches:
            model.base_model(input_ids=ids, use_cache=False)
    for block in scans_of(anatomy):
        if block.name not in products:
            raise StepError(
                f"skip 'fitted' needs the scan of {block.name} to run in transformers' own code, which was not called; "
                "use skip 'kept' or 'identity'"
            )
    return {
        block.name: torch.where(
            squares[block.name] > 0,
            products[block.name] / squares[block.name].clamp(min=torch.finfo(torch.float64).tiny),
            next(to_float64(w.tensor(layers[block.layer])) for w in block.weights if w.skips is not None),
        )
        for block in scans_of(anatomy)
    }

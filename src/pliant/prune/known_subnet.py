"""Cut a model to a sub-network that is already known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from pliant.anatomy import Anatomy, agree, evaluating, output_of, probe
from pliant.checkpoint.fingerprint import check_finite
from pliant.criteria.importance import reads_text
from pliant.data import Text
from pliant.elastic import Elastic, Subnet, described, extract, ratio, validate
from pliant.errors import DataError, StepError, SubnetError
from pliant.forward.windows import seqlen_of, windows_for
from pliant.prune.imported_configs import config_in, is_shedders, parse_config
from pliant.prune.scan_skip import FITTED, IDENTITY, KEPT, SKIP_HELP, SKIPS, skip_note, with_skips, without_scan
from pliant.prune.unit_order import STORED, ordered
from pliant.registry import IMPORTANCE
from pliant.step import Job, Step
from pliant.step_setting import setting


class Cut(Step):
    """Cut to a given sub-network without a search: from an archive, a report, or another tool."""

    family: ClassVar[str] = "pruner"

    subnet: Subnet | Mapping[str, Any] = setting(
        "The sub-network to keep, the contents of a file for pliant.read_config, or the path of such a file."
    )

    order: str = setting(
        "How channels and heads were sorted when the sub-network was found: l1, activation or fisher (both need the "
        "same calibration text again), stored, or your own as module:function.",
        default="l1",
        choices=(STORED,),
        names=IMPORTANCE,
    )

    skip: str | None = setting(
        f"{SKIP_HELP} Default: identity for a configuration of the original Mamba-Shedder code, else kept.",
        default=None,
        choices=SKIPS,
    )

    samples: int = setting(
        "activation, fisher, fitted: rows of calibration text that the order and the skips were computed from.",
        default=128,
        at_least=1,
    )

    seqlen: int | None = setting(
        "activation, fisher, fitted: tokens in a calibration window. Default: the smaller of 2048 and the model's "
        "positions.",
        default=None,
        at_least=2,
    )

    seed: int = setting(
        "activation, fisher, fitted: seed that calibration rows are drawn with.",
        default=42,
        at_least=0,
        at_most=2**63 - 1,
    )

    def __post_init__(self) -> None:
        if isinstance(self.subnet, str | Path):
            object.__setattr__(self, "subnet", config_in(self.subnet))
        if not isinstance(self.subnet, Subnet | Mapping):
            raise StepError(f"subnet must be a Subnet, a mapping, or the path of a file; not {self.subnet!r}")
        super().__post_init__()

    def run(self, job: Job) -> None:
        check_finite(job.model)
        anatomy = described(job.model)
        if isinstance(self.subnet, Subnet):
            subnet = self.subnet
            validate(subnet, anatomy)
        else:
            subnet = parse_config(self.subnet, anatomy)
        narrowed = any(units for _, units in subnet.keep)
        order = self.order if narrowed else STORED
        skip = self.skip or (IDENTITY if is_shedders(self.subnet) else KEPT)
        fits = skip == FITTED and without_scan(anatomy, subnet)
        windows = self._windows(job) if fits or (order != STORED and reads_text(order)) else None
        with ordered(job, anatomy, order, windows):
            if without_scan(anatomy, subnet):
                anatomy = with_skips(job, anatomy, skip, windows)
            extract_and_verify(job.model, anatomy, subnet)
        job.show(*skip_note(anatomy, subnet, skip))
        job.record.update(ratio=ratio(anatomy, subnet), subnet=subnet.to_dict())

    def _windows(self, job: Job) -> torch.Tensor:
        if not isinstance(job.data, Text):
            raise DataError(
                f"order={self.order!r} and skip={self.skip!r} need the calibration text of the search: pass data="
            )
        return windows_for(
            job.model, job.tokenizer(), job.data.sample(self.samples, self.seed), seqlen_of(job.model, self.seqlen)
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "subnet": self.subnet.to_dict() if isinstance(self.subnet, Subnet) else dict(self.subnet),
        }


@torch.no_grad()
def extract_and_verify(model: Any, anatomy: Anatomy, subnet: Subnet) -> None:
    """Extract ``subnet`` in place and check on a few tokens that the cut model computes the same as the activated
    one."""
    with evaluating(model):
        elastic = Elastic(model, anatomy)
        inputs = probe(model, tokens=16)
        elastic.activate(subnet)
        try:
            expected = output_of(model, inputs)
        finally:
            elastic.activate(Subnet())
        extract(model, anatomy, subnet)
        actual = output_of(model, inputs)
    if not agree(actual, expected, next(model.parameters()).dtype):
        raise SubnetError("the cut model does not compute the same as the scored one; please report this model")

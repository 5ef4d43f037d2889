"""Cut a model to a sub-network that is already known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pliant.anatomy import Anatomy, anatomy_of, answer, evaluating, probe
from pliant.checkpoint.weights import check_finite
from pliant.elastic import Elastic, Subnet, extract, ratio, validate
from pliant.elastic import reorder as put_in_order
from pliant.errors import SubnetError
from pliant.importance import l1_orders
from pliant.step import Job, Step


@dataclass(frozen=True, kw_only=True)
class Cut(Step):
    """Cut to a given sub-network, without a search: one from an archive, a report, or another tool."""

    kind: ClassVar[str] = "cut"

    subnet: Subnet
    """What to keep."""

    reorder: bool = True
    """Sort channels and heads by their L1 norm first, as MultiPruner did when it found the sub-network."""

    def run(self, job: Job) -> None:
        check_finite(job.model)
        anatomy = anatomy_of(job.model)
        validate(self.subnet, anatomy)
        if self.reorder:
            put_in_order(job.model, anatomy, l1_orders(job.model, anatomy))
        cut_exactly(job.model, anatomy, self.subnet)
        job.record.update(ratio=ratio(anatomy, self.subnet), subnet=self.subnet.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.kind, "subnet": self.subnet.to_dict(), "reorder": self.reorder}


@torch.no_grad()
def cut_exactly(model: Any, anatomy: Anatomy, subnet: Subnet) -> None:
    """Extract ``subnet`` in place and check on a few tokens that the cut model computes what the activated one did."""
    with evaluating(model):
        elastic = Elastic(model, anatomy)
        inputs = probe(model, tokens=16)
        elastic.activate(subnet)
        try:
            expected = answer(model, inputs).float()
        finally:
            elastic.activate(Subnet())
        extract(model, anatomy, subnet)
        actual = answer(model, inputs).float()
    coarse = min(100.0, torch.finfo(next(model.parameters()).dtype).eps / torch.finfo(torch.float32).eps)
    bound = 1e-4 * coarse * max(1.0, expected.abs().max().item())
    if not (actual - expected).abs().max().item() <= bound:
        raise SubnetError("the cut model does not compute what the search scored; please report this model")

"""SparAMX: run a sparse model on a CPU, weights and key-value cache without their zeros.

"SparAMX: Accelerating Compressed LLMs Token Generation on AMX-powered CPUs", 2025 (arXiv 2502.12444). Linear layers keep a
bitmap and the values that are not zero; so do keys and values, of which the smallest are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pliant.step import Job, Step, StepError
from pliant.values.magnitude import Magnitude
from pliant.values.matrix import ValueStep
from pliant.values.pack import PackedLinear


@dataclass(frozen=True, kw_only=True)
class SparAMX(ValueStep):
    """Pack a model that is sparse, or is made so by magnitude, in the formats of the paper: bf16 or int8.

    Where leaving zeros out is slower on this machine, a layer is packed dense; ``PackedLinear`` has more settings.
    """

    kind: ClassVar[str] = "sparamx"

    packs: ClassVar[bool] = True

    sparsity: float | None = None
    """Share of the weights to zero by magnitude first; none for a model that is sparse already."""

    format: str = "bf16"
    """bf16 or int8."""

    key_sparsity: float = 0.3
    """Share of the keys in the cache that is zeroed."""

    value_sparsity: float = 0.5
    """The same of values."""

    sparse: str = "auto"
    """Whether zeros are left out of weights: always, never, or auto: where that is faster on this machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in ("bf16", "int8"):
            raise StepError(f"format is bf16 or int8, not {self.format!r}; PackedLinear has int4")
        self._steps()

    def _steps(self) -> list[Step]:
        layers: dict[str, Any] = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        packed = PackedLinear(
            **layers,
            format=self.format,
            head="dense",
            sparse=self.sparse,
            key_sparsity=self.key_sparsity,
            value_sparsity=self.value_sparsity,
        )
        return [packed] if self.sparsity is None else [Magnitude(**layers, sparsity=self.sparsity), packed]

    def run(self, job: Job) -> None:
        for step in self._steps():
            step.run(job)

"""SparAMX: run a sparse model on a CPU, with weights and key-value cache stored without their zeros.

"SparAMX: Accelerating Compressed LLMs Token Generation on AMX-powered CPUs", 2025 (arXiv 2502.12444). Linear layers
keep a bitmap and the values that are not zero; so do keys and values, of which the smallest are dropped.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pliant.step import Job, Step
from pliant.step_setting import setting
from pliant.values.magnitude import Magnitude
from pliant.values.matrix import ValueStep
from pliant.values.pack import SPARSE, PackedLinear


class SparAMX(ValueStep):
    """Pack a sparse model, or one pruned by magnitude first, in the formats of the paper: bf16 or int8.

    A layer is packed dense if the sparse form is slower on this machine; ``PackedLinear`` has more settings.
    """

    packs: ClassVar[bool] = True

    sparsity: float | None = setting(
        "Share of the weights to set to zero by magnitude first; none for a model that is sparse already.",
        default=None,
        at_least=0,
        at_most=1,
    )

    format: str = setting("bf16 or int8.", default="bf16", choices=("bf16", "int8"))

    key_sparsity: float = setting("Share of the cached keys to set to zero.", default=0.3, at_least=0, below=1)

    value_sparsity: float = setting("Share of the cached values to set to zero.", default=0.5, at_least=0, below=1)

    sparse: str = setting(
        "Whether weights are stored without their zeros: always, never, or auto (if that is faster on this machine).",
        default="auto",
        choices=SPARSE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps()

    def _steps(self) -> tuple[list[Step], PackedLinear]:
        layers: dict[str, Any] = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        packed = PackedLinear(
            **layers,
            format=self.format,
            head="dense",
            sparse=self.sparse,
            key_sparsity=self.key_sparsity,
            value_sparsity=self.value_sparsity,
        )
        return [] if self.sparsity is None else [Magnitude(**layers, sparsity=self.sparsity)], packed

    def run(self, job: Job) -> None:
        first, packed = self._steps()
        packed.select(job.model)  # refuses a model that cannot be packed before its weights are changed
        for step in first:
            step.run(job)
        try:
            packed.run(job)
        except BaseException as error:
            if first:
                error.add_note("the smallest weights have been set to zero already; load the model again")
            raise

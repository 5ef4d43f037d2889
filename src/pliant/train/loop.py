"""The training loop.

Every random draw of an optimizer step depends on the seed and the number of that step alone, so a training that was
interrupted and resumed computes the same as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pliant.data.tokenize_examples import IGNORED, Encoded
from pliant.errors import DivergedError, PliantError
from pliant.formatting import duration, human_bytes
from pliant.progress import Progress, peak_memory
from pliant.train.loss import Distillation, backward, held_out_loss
from pliant.train.seeds import seed_of, seeded
from pliant.train.state import StateFile
from pliant.train.trunk_and_head import Halves

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Share of the highest learning rate, by the share of the training done after the warm-up; both fall to 0."""

KEPT = ("step", "best", "curve", "since", "tokens", "seconds", "training_seconds")
"""Attributes of a training that are part of its state on disk, besides the tensors."""

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How to train.

    The fields are those settings of :class:`pliant.train.recover.Recover`, with their defaults filled in. With
    infinitely many ``steps`` the ``minutes`` end the training.
    """

    steps: float
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_ratio: float
    lr_scheduler_type: str
    weight_decay: float
    max_grad_norm: float
    eval_steps: int
    seed: int
    minutes: float | None

    def share(self, step: int, seconds: float) -> float:
        """The share of the training done in the middle of a step: of the steps or of the minutes, whichever is
        larger."""
        of_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max((step + 0.5) / self.steps, of_time))

    def rate(self, share: float) -> float:
        """The learning rate at a share of the training: it rises linearly, then falls by the schedule."""
        if share < self.warmup_ratio:
            return self.learning_rate * share / self.warmup_ratio
        done = (share - self.warmup_ratio) / (1 - self.warmup_ratio)
        return self.learning_rate * SCHEDULES[self.lr_scheduler_type](done)

    def over(self, step: int, seconds: float) -> str | None:
        """The reason to stop before a step: ``steps`` or ``minutes``; None to go on."""
        if step >= self.steps:
            return "steps"
        return "minutes" if self.minutes is not None and seconds >= 60 * self.minutes else None


class Training:
    """Trains some parameters of a model on sequences, and resumes an interrupted training.

    Arguments:
        model: the model, in training mode.
        parameters: the trained parameters, by name.
        data: sequences to train on.
        held_out: sequences to choose the best state by; if empty, the last state is taken.
        state: the file in which the state is kept.

    Attributes:
        step: number of optimizer steps done.
        seconds: duration of the training, including the time before an interruption.
        curve: one row for each evaluation: ``step``, mean training ``loss`` since the last evaluation, ``held_out``
            loss (both in nats per token), ``seconds``.
        best: the step whose parameters have the lowest held-out loss.
    """

    def __init__(
        self,
        model: Any,
        halves: Halves,
        parameters: dict[str, nn.Parameter],
        data: Encoded,
        held_out: Encoded,
        plan: Plan,
        distillation: Distillation | None,
        state: StateFile,
        progress: Progress,
    ):
        self.plan, self.step, self.best = plan, 0, 0
        self.curve: list[dict[str, Any]] = []
        self.seconds = self.training_seconds = 0.0
        self.tokens = 0  # read in training so far
        self._model, self._halves, self._parameters = model, halves, parameters
        self._data, self._distillation, self._state, self._progress = data, distillation, state, progress
        self._device = next(iter(parameters.values())).device
        self._held_out = [
            self._on_device(held_out, rows)
            for rows in _by_length(held_out, range(len(held_out)), plan.micro_batch_size)
        ]
        self._order: tuple[int, list[int]] = (-1, [])
        self._best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.since = [0.0, 0]  # loss and learned tokens since the last evaluation
        self._whole = True  # False while the state is only partly updated
        matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
        others = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            fused=True,
        )

    def run(self) -> str:
        """Train until the steps or the minutes are over, and leave the best state in the parameters.

        Returns:
            The limit that was reached: ``steps`` or ``minutes``.

        Raises:
            DivergedError: the loss or a gradient is not finite.
        """
        self._resume()
        begun, first, start = time.monotonic() - self.seconds, self.step, self._share()
        saved = first
        try:
            while True:
                self.seconds = time.monotonic() - begun
                over = self.plan.over(self.step, self.seconds)
                if (over or self.step % self.plan.eval_steps == 0) and (
                    not self.curve or self.curve[-1]["step"] != self.step
                ):
                    self._evaluate()
                    self._save()
                    saved = self.step
                if over:
                    break
                tick = time.monotonic()
                loss = self._train()
                self.training_seconds += time.monotonic() - tick
                if self.step == first + 1:
                    self._show_cost(time.monotonic() - tick)
                self.seconds = time.monotonic() - begun
                self._progress.step((self._share() - start) / max(1e-9, 1 - start), self._line(loss))
        except BaseException as error:
            self.seconds = time.monotonic() - begun
            if self._whole and self.step > saved and not isinstance(error, PliantError):
                self._save()
            raise
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])
        return over

    def _train(self) -> float:
        """Do one optimizer step and return its mean loss in nats per token."""
        rows = self._rows(self.step)
        learned = sum(int((self._data.labels[row][1:] != IGNORED).sum()) for row in rows)
        total = 0.0
        self._optimizer.zero_grad(set_to_none=True)
        with seeded(self._device, seed_of("step", self.plan.seed, self.step)):
            for part in _by_length(self._data, rows, self.plan.micro_batch_size):
                total += backward(self._halves, self._on_device(self._data, part), self._distillation).item()
        loss = total / learned
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(learned)
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self.plan.max_grad_norm)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            raise DivergedError(
                f"the training diverged: the loss of step {self.step + 1} is {loss}, the norm of its gradient "
                f"{norm.item()}. The model is unchanged; try a learning_rate below {self.plan.learning_rate}, or a "
                "larger warmup_ratio"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self.plan.rate(self.plan.share(self.step, self.seconds))
        self._whole = False
        self._optimizer.step()
        self.step += 1
        self.tokens += sum(len(self._data.ids[row]) for row in rows)
        self.since[0] += total
        self.since[1] += learned
        self._whole = True
        return loss

    def _evaluate(self) -> None:
        """Measure the held-out loss, and keep the state if it is the best so far."""
        loss = None
        if self._held_out:
            self._model.eval()
            loss = held_out_loss(self._halves, self._held_out)
            self._model.train()
        known = [row["held_out"] for row in self.curve]
        self._whole = False
        if loss is None or not known or loss < min(known):
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    self._best[name].copy_(parameter)
            self.best = self.step
        mean = self.since[0] / self.since[1] if self.since[1] else None
        self.since = [0.0, 0]
        self.curve.append({"step": self.step, "loss": mean, "held_out": loss, "seconds": self.seconds})
        self._whole = True

    def _rows(self, step: int) -> list[int]:
        """The sequences of a step. Every pass over the data has its own order."""
        rows = []
        for place in range(step * self.plan.batch_size, (step + 1) * self.plan.batch_size):
            number, within = divmod(place, len(self._data))
            if self._order[0] != number:
                generator = torch.Generator().manual_seed(seed_of("order", self.plan.seed, number))
                self._order = number, torch.randperm(len(self._data), generator=generator).tolist()
            rows.append(self._order[1][within])
        return rows

    def _on_device(self, data: Encoded, rows: list[int]) -> Batch:
        ids, labels, mask = data.batch(rows)
        return ids.to(self._device), labels.to(self._device), mask.to(self._device)

    def _share(self) -> float:
        return self.plan.share(self.step, self.seconds) if self.step else 0.0

    def _line(self, loss: float) -> str:
        last = self.curve[-1]["held_out"]
        seen = "" if last is None else f", held-out {last:.3f}, best at step {self.best}"
        of = "" if math.isinf(self.plan.steps) else f" of {self.plan.steps}"
        return f"step {self.step}{of}, loss {loss:.3f}{seen}"

    def _show_cost(self, seconds: float) -> None:
        steps = self.plan.steps - self.step + 1
        budget = math.inf if self.plan.minutes is None else 60 * self.plan.minutes - self.seconds
        parts = [f"  a step takes {duration(seconds)}"]
        if math.isfinite(steps):
            parts.append(f"{steps} steps take about {duration(steps * seconds)}")
        if steps * seconds > budget:
            parts.append(f"the time is enough for about {max(1, round(budget / seconds))} steps")
        self._progress.note("; ".join([*parts, f"peak memory so far {human_bytes(memory_peak(self._device))}"]))

    def _save(self) -> None:
        tensors = {f"now.{name}": parameter for name, parameter in self._parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        self._state.write(tensors, {name: getattr(self, name) for name in KEPT})

    def _resume(self) -> None:
        """Resume from the state on disk, if there is one."""
        found = self._state.read()
        if found is None:
            return
        tensors, plain = found
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"now.{name}"])
                self._best[name].copy_(tensors[f"best.{name}"])
                moments = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                self._optimizer.state[parameter] = {
                    key: value.to(self._device) for key, value in moments.items() if value is not None
                }
        for name in KEPT:
            setattr(self, name, plain[name])
        self._progress.note(f"  resuming after step {self.step}")


def memory_peak(device: torch.device) -> int:
    """Peak memory in bytes: of the device, or of this process if the device is the CPU."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # current memory: mps records no peak
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _by_length(data: Encoded, rows: list[int] | range, count: int) -> list[list[int]]:
    """Rows in batches of ``count`` of similar length, so that there is little padding."""
    ordered = sorted(rows, key=lambda row: (-len(data.ids[row]), row))
    return [ordered[start : start + count] for start in range(0, len(ordered), count)]

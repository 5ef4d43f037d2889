"""Recovery: a short training after a cut, which makes up for the removed parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from pliant.anatomy import Anatomy
from pliant.checkpoint.fingerprint import check_finite, fingerprint
from pliant.checkpoint.load import load
from pliant.data import Examples, Text, examples
from pliant.data.tokenize_examples import Encoded
from pliant.elastic import described
from pliant.errors import DataError, StepError
from pliant.formatting import human_bytes
from pliant.forward.windows import check_ids, seqlen_of
from pliant.record import Curve, Note, Section
from pliant.step import Job, Step
from pliant.step_setting import setting
from pliant.train.loop import SCHEDULES, Plan, Training, memory_peak
from pliant.train.loss import Distillation
from pliant.train.memory_estimate import memory_needed
from pliant.train.seeds import seed_of
from pliant.train.state import StateFile
from pliant.train.trainable import Full, Lora, linear_layers, training_mode
from pliant.train.trunk_and_head import Halves

STEPS = 200
USUAL = 256  # default number of tokens in a sequence, if the model has as many positions
RATES = {"lora": 3e-4, "full": 5e-5}


def training_sections(recovery: Mapping[str, Any]) -> list[Section]:
    """The held-out loss during the training, and its cost."""
    looks = [(row["step"], row["held_out"]) for row in recovery["curve"] if row["held_out"] is not None]
    curve = Curve(
        title="held-out loss against steps",
        xs=[float(step) for step, _ in looks],
        ys=[loss for _, loss in looks],
        labels=[f"step {step:.0f}: {loss:.3f}" for step, loss in looks],
        x_format=".0f",
        caption="Held-out loss in nats per token against optimizer steps.",
    )
    return [
        *([curve] if looks else []),
        Note(
            f"{recovery['steps']} steps, {recovery['tokens']:,} tokens at {recovery['tokens_per_second']:,.0f} "
            f"tokens/s; the state of step {recovery['best_step']} was kept."
        ),
    ]


class Recover(Step):
    """Train the model on text or examples. The result is an ordinary model of the same shapes and dtype."""

    family: ClassVar[str] = "training"
    needs: ClassVar[frozenset[str]] = frozenset({"examples"})
    trains: ClassVar[bool] = True

    method: str = setting(
        "lora trains low-rank adapters and merges them at the end (needs the train extra); full trains every weight.",
        default="lora",
        choices=tuple(RATES),
    )

    steps: int | None = setting(
        "Optimizer steps. Default: 200; with minutes, as many as fit into them.", default=None, at_least=1
    )

    minutes: float | None = setting(
        "Stop at the first optimizer step after this many minutes. The learning rate falls to 0 by then.",
        default=None,
        above=0,
    )

    batch_size: int = setting("Sequences in an optimizer step.", default=8, at_least=1, formerly="batch")

    micro_batch_size: int | None = setting(
        "Sequences in memory at a time. Default: as many as have 512 tokens on a CPU, 4096 on a GPU.",
        default=None,
        at_least=1,
        formerly="micro_batch",
    )

    seqlen: int | None = setting(
        "Tokens in a sequence. Longer examples are truncated; plain text is packed into windows of this length. "
        "Default: the smaller of 256 and the model's positions.",
        default=None,
        at_least=2,
    )

    learning_rate: float | None = setting(
        "Highest learning rate. Default: 3e-4 for lora, 5e-5 for full.", default=None, above=0, formerly="lr"
    )

    warmup_ratio: float = setting(
        "Share of the training in which the learning rate rises.",
        default=0.05,
        at_least=0,
        at_most=0.9,
        formerly="warmup",
    )

    lr_scheduler_type: str = setting(
        "How the learning rate falls to 0 after that: cosine or linear.",
        default="cosine",
        choices=tuple(SCHEDULES),
        formerly="schedule",
    )

    weight_decay: float = setting("Weight decay of the matrices in AdamW.", default=0.0, at_least=0, at_most=1)

    max_grad_norm: float = setting("Gradients are clipped to this norm.", default=1.0, above=0, formerly="clip")

    rank: int = setting("lora: rank of the adapters.", default=16, at_least=1)

    alpha: float = setting("lora: adapters are scaled by alpha / rank.", default=32, above=0)

    dropout: float = setting(
        "lora: dropout of the inputs of the adapters. 0.05 is usual; any dropout slows down a CPU.",
        default=0.0,
        at_least=0,
        at_most=0.9,
    )

    target_modules: str | Sequence[str] | None = setting(
        "lora: names of the linear layers with adapters, such as q_proj,v_proj. Default: all linear layers in the "
        "blocks that can have one.",
        default=None,
        formerly="targets",
    )

    distillation_weight: float = setting(
        "Weight of the distillation from the dense model: 0 learns from the text alone, 1 from the dense model's "
        "next-token distributions alone.",
        default=0.0,
        at_least=0,
        at_most=1,
        formerly="distil",
    )

    temperature: float = setting("Temperature of both distributions in the distillation.", default=1.0, above=0)

    teacher: str | None = setting(
        "Folder or hub id of the dense model to learn from. Default: the one that this model was loaded from.",
        default=None,
        path=True,
    )

    data: str | None = setting(
        "Training data: a file, a folder or a hub id, as for pliant.examples. Default: the data of the run.",
        default=None,
        path=True,
    )

    held_out: int = setting(
        "Sequences held out of the training, at most a tenth of all, to choose the best state by. 0 takes the last "
        "state.",
        default=32,
        at_least=0,
    )

    eval_steps: int = setting(
        "Optimizer steps between two evaluations on the held-out sequences. The state is saved after each.",
        default=25,
        at_least=1,
        formerly="every",
    )

    gradient_checkpointing: bool = setting(
        "Recompute activations instead of keeping them: slower, with less memory.", default=False
    )

    seed: int = setting(
        "Seed of the order of the sequences, of dropout, and of the initial values of the adapters.",
        default=42,
        at_least=0,
        at_most=2**63 - 1,
    )

    def __post_init__(self) -> None:
        for name in ("data", "teacher"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        super().__post_init__()
        object.__setattr__(self, "target_modules", _names(self.target_modules))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        memory = {"fast": False, "small": True}.get(raw.get("memory", ""))  # the setting of version 0.1
        if memory is None:
            return super().from_dict(raw)
        kept = {name: value for name, value in raw.items() if name != "memory"}
        return super().from_dict({**kept, "gradient_checkpointing": memory})

    def estimate(self, blocks: int, row: float) -> tuple[float, bool]:  # noqa: ARG002
        steps = self.steps or STEPS
        passes = 3 + bool(self.distillation_weight)
        return float(passes * steps * self.batch_size * (self.seqlen or USUAL)), self.method == "full"

    def run(self, job: Job) -> None:
        model = job.model
        check_finite(model)
        Halves(model)  # refuses a model that does not predict next tokens, before any work
        tokenizer = job.tokenizer()
        anatomy = described(model)
        if self.method == "lora":
            linear_layers(model, anatomy, self.target_modules or ())  # refuses unknown layers, before any work
        given = self._examples(job)
        seqlen = seqlen_of(model, self.seqlen, USUAL)
        train, held_out = self._sequences(given, model, tokenizer, seqlen)
        teacher = self._teacher(job)
        belongs_to = {
            "model": fingerprint(model),
            "data": given.digest,
            "tokens": train.digest,
            "dense": None if teacher is None else fingerprint(teacher),
            **{name: of for name, of in self.to_dict().items() if name not in ("step", "version", "data", "teacher")},
            "seqlen": seqlen,
        }
        if teacher is not None and belongs_to["dense"] == belongs_to["model"]:
            raise StepError(
                "the dense model has the same weights as the model to recover, so there is nothing to learn from it; "
                "give the model from before the cut with teacher= (or pliant.apply(..., dense=model))"
            )
        state = StateFile(job.file("state.safetensors"), belongs_to)
        state.read()  # refuses the state of another training, before any work
        job.progress.note(
            f"{given.source}: {len(train)} sequences of at most {seqlen} tokens, {train.tokens:,} in all; "
            f"{len(held_out)} held out; {self._length(len(train))}"
        )
        was_training = teacher is not None and teacher.training
        try:
            self._train(job, anatomy, train, held_out, seqlen, teacher, state)
        finally:
            if teacher is not None:
                teacher.train(was_training)

    def _train(
        self,
        job: Job,
        anatomy: Anatomy,
        train: Encoded,
        held_out: Encoded,
        seqlen: int,
        teacher: Any,
        state: StateFile,
    ) -> None:
        model = job.model
        micro = self.micro_batch_size or max(1, (512 if model.device.type == "cpu" else 4096) // seqlen)
        settings = {name: getattr(self, name) for name in Plan.__dataclass_fields__}
        settings["steps"] = self._most_steps()
        settings["micro_batch_size"] = min(micro, self.batch_size)
        settings["learning_rate"] = self.learning_rate or RATES[self.method]
        plan, distillation = Plan(**settings), None
        if teacher is not None:
            distillation = Distillation(Halves(teacher.eval()), self.distillation_weight, self.temperature)
        linears = linear_layers(model, anatomy)
        with training_mode(model, recompute=self.gradient_checkpointing):
            trained = self._trained(model, anatomy)
            for name, reason in trained.without.items():
                job.progress.note(f"  no adapter on {name}: {reason}")
            try:
                needs = memory_needed(
                    model,
                    linears,
                    trained.parameters,
                    plan.micro_batch_size * seqlen,
                    copies=2 if self.method == "full" else 1,
                    teacher=teacher,
                    recompute=self.gradient_checkpointing,
                )
                parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in needs.items())
                job.progress.note(f"  needs about {human_bytes(sum(needs.values()))} of memory: {parts}")
                training = Training(
                    model, Halves(model), trained.parameters, train, held_out, plan, distillation, state, job.progress
                )
                with job.progress.stage(f"recovery ({self.method})"):
                    ended = training.run()
                trained.finish()
                check_finite(model)
            except BaseException:  # Ctrl-C, too
                trained.abandon()
                raise
        job.record["recovery"] = {
            "ended_by": ended,
            "steps": training.step,
            "best_step": training.best,
            "curve": training.curve,
            "sequences": len(train),
            "seqlen": seqlen,
            "held_out": len(held_out),
            "dropped_rows": train.dropped,
            "tokens": training.tokens,
            "tokens_per_second": training.tokens / max(1e-9, training.training_seconds),
            "seconds": training.seconds,
            "trained_parameters": sum(p.numel() for p in trained.parameters.values()),
            "memory_estimate": sum(needs.values()),
            "peak_memory": memory_peak(model.device),
        }
        job.show(*training_sections(job.record["recovery"]))

    def _most_steps(self) -> float:
        return self.steps or (STEPS if self.minutes is None else math.inf)

    def _length(self, sequences: int) -> str:
        """The length of the training, in words."""
        steps = self._most_steps()
        if math.isinf(steps):
            return f"steps of {self.batch_size}, {self.minutes:g} minutes"
        return f"{steps} steps of {self.batch_size}, {steps * self.batch_size / sequences:.1f} epochs"

    def _trained(self, model: Any, anatomy: Anatomy) -> Full | Lora:
        if self.method == "full":
            return Full(model)
        return Lora(
            model,
            anatomy,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.target_modules or (),
            seed=seed_of("adapters", self.seed),
        )

    def _examples(self, job: Job) -> Examples:
        if self.data is not None:
            return examples(self.data)
        if isinstance(job.data, Text):
            return examples(job.data)
        if isinstance(job.data, Examples):
            return job.data
        raise DataError(
            "recover needs data to train on; give data=pliant.examples('some.jsonl') or data=pliant.text('some.txt')"
        )

    def _sequences(self, given: Examples, model: Any, tokenizer: Any, seqlen: int) -> tuple[Encoded, Encoded]:
        """The sequences to train on, and those held out."""
        encoded = given.encode(tokenizer, seqlen)
        check_ids(model, torch.cat(list(encoded.ids)))
        count = min(self.held_out, max(1, len(encoded) // 10))
        if count >= len(encoded):
            raise DataError(
                f"{given.source} gives only one sequence of {seqlen} tokens, so none can be held out; give more data "
                "or a smaller seqlen, or set held_out=0"
            )
        return encoded.split(count)

    def _teacher(self, job: Job) -> Any:
        """The dense model to learn from, or None."""
        if self.distillation_weight == 0:
            return None
        dense = load(self.teacher) if self.teacher is not None else job.dense()
        dense = dense.to(job.model.device)
        ours, theirs = (one.get_output_embeddings().weight.shape[0] for one in (job.model, dense))
        if ours != theirs:
            raise StepError(
                f"the dense model has a vocabulary of {theirs}, this model one of {ours}; distillation needs the same "
                "vocabulary in both"
            )
        return dense


def _names(given: Any) -> tuple[str, ...] | None:
    """Names of layers, given as a list, or as text with commas between (on the command line, and in recipes of version
    0.1)."""
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise StepError(f"target_modules must be a list of names, such as ['q_proj', 'v_proj'], or none; not {given!r}")
    return tuple(name for name in names or () if name) or None

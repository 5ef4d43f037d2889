"""The main job, end to end: load, measure, apply, measure again, write the artefact."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pliant.anatomy import Anatomy
from pliant.checkpoint.fingerprint import fingerprint
from pliant.checkpoint.load import check_folder, load, tokenizer_of
from pliant.checkpoint.packed_config import held_bytes, packed_bytes, unpacked_bytes
from pliant.compat.native import cached_bytes
from pliant.data import Text, text
from pliant.device import called
from pliant.elastic import Subnet, cache_bytes, described, macs, parameters, streamed_bytes, weight_bytes
from pliant.errors import BusyError, PliantError
from pliant.forward.windows import check_model, longest_of, predicts
from pliant.machine import machine
from pliant.measure.memory import disk_bytes, run_memory
from pliant.measure.quality.evaluate import evaluate
from pliant.measure.quality.replies import check_prompts, replies
from pliant.measure.speed.bench import bench
from pliant.pages import pages_of
from pliant.progress import Console, Progress
from pliant.run.apply import apply_step, check_trainable, check_unpacked
from pliant.run.card import versions
from pliant.run.save import check_savable, save
from pliant.run.stages import (
    RESULTS,
    Results,
    Stage,
    forget_model,
    has_model,
    keep_model,
    kept_model,
    key_of,
    path_digest,
)
from pliant.run.target import LOCK, check_target, files_in, work_folder
from pliant.step import Step, paths_of, recipe_of

_PROMPT = 256  # tokens of context in which speed is predicted and measured


@dataclass(frozen=True)
class Measuring:
    """What to measure before and after.

    Attributes:
        perplexity: held-out texts; when empty, rows of the calibration text that the step does not see.
        tasks: question files.
        seqlen, windows, limit: as in :func:`pliant.evaluate`.
        speed: time prefill and decode of both models, in turn, and measure their disk space and memory.
        prompts: both models reply to these; the report shows the replies side by side.
    """

    perplexity: Sequence[str | Path | Text] = ()
    tasks: Sequence[str | Path] = ()
    seqlen: int = 512
    windows: int | None = 32
    limit: int | None = 200
    speed: bool = True
    prompts: Sequence[str] = ()


def compress(
    source: str | Path,
    step: Step | Sequence[Step],
    data: Text | str | Path | None,
    out: str | Path,
    *,
    measuring: Measuring = Measuring(),
    overwrite: bool = False,
    dtype: Any = "auto",
    device: Any = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a model into the folder ``out`` and return the report.

    The run is a plan of stages (see :class:`Compression`). What they give is kept in ``out`` + ``.work``, each under a key of all
    that it depends on: after a crash or Ctrl-C the same call skips what is there. Afterwards archives of searches are part of the
    artefact: a run with ``overwrite`` that differs only in settings on which no score depends (such as the ratio) starts from
    them, and an identical run finds its work done.

    Arguments:
        data: calibration text; None for a step that needs none.
        measuring: what to measure before and after.
        overwrite: replace what is in ``out``.
        dtype, device: as in :func:`pliant.load`.
        memory: what the process may take beside what it has, as for :func:`pliant.load`; speed is then not measured.

    Raises:
        BusyError: another run is writing to ``out``.
        StepError: before any work: ``step`` is not a step, or a step comes after one that packs.
        DataError: before any work: a prompt is empty.
    """
    progress = progress or Console()
    steps = recipe_of(step)
    check_prompts(measuring.prompts)
    out = check_target(out, overwrite, source=source)
    calibration = text(data) if isinstance(data, str | Path) else data
    held_out = [one if isinstance(one, Text) else text(one) for one in measuring.perplexity]
    inputs = {
        "data": None if calibration is None else described_text(calibration),
        "measuring": described_measuring(measuring, held_out),
        "dtype": str(dtype).removeprefix("torch."),
        "read": {path: path_digest(path) for one in steps for path in paths_of(one) if Path(path).is_file()},
    }
    if not held_out and calibration is not None:
        calibration, rest = calibration.split(0.1)
        held_out = [rest]
    if memory is not None:
        measuring = replace(measuring, speed=False)  # two models at once, partly in files: timings would mean nothing
    work = work_folder(out)
    try:
        lock = FileLock(work / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"another run is writing to {str(out)!r}; wait for it, or name another folder") from None
    try:
        made = Compression(
            source,
            steps,
            calibration,
            held_out,
            out,
            work,
            measuring,
            overwrite,
            dtype,
            device,
            memory,
            progress,
            inputs,
        )
        report = made.run()
    except BaseException as error:
        if not _worth_keeping(work, refused=isinstance(error, PliantError)):
            shutil.rmtree(work, ignore_errors=True)
        lock.release()
        raise
    shutil.rmtree(work, ignore_errors=True)  # while it is still ours: after the release another run may start in it
    lock.release()
    return report


def _worth_keeping(work: Path, *, refused: bool) -> bool:
    """Whether a run that ended early can go on from its work folder; a refused one only from what its steps have kept."""
    of_steps = any(files_in(folder) for folder in work.iterdir() if folder.is_dir() and re.match(r"\d+-", folder.name))
    return of_steps or (not refused and (work / RESULTS).exists())


def described_text(of: Text) -> dict[str, Any]:
    """Where a text is and what it holds, for a recipe."""
    column = {} if of.column == "text" else {"column": of.column}
    return {"path": of.path, "source": of.source, **column, "rows": len(of.rows), "hash": of.digest}


def described_measuring(measuring: Measuring, held_out: Sequence[Text]) -> dict[str, Any]:
    """What was measured and on what, for a recipe."""
    tasks = [
        {"path": str(Path(task).expanduser().resolve()), "hash": path_digest(str(task))} for task in measuring.tasks
    ]
    return {
        "perplexity": [described_text(of) for of in held_out],
        "tasks": tasks,
        "seqlen": measuring.seqlen,
        "windows": measuring.windows,
        "limit": measuring.limit,
        "speed": measuring.speed,
        "prompts": list(measuring.prompts),
    }


@dataclass
class Compression:
    """One run, as a plan of stages. Each stage finds what it needs in what the stages before it have left here."""

    source: str | Path
    steps: list[Step]
    calibration: Text | None
    held_out: list[Text]
    out: Path
    work: Path
    measuring: Measuring
    overwrite: bool
    dtype: Any
    device: Any
    memory: int | str | None
    progress: Progress
    inputs: dict[str, Any]

    model: Any = field(init=False, default=None)
    dense: Any = field(init=False, default=None)
    tokenizer: Any = field(init=False, default=None)
    keys: list[str | None] = field(init=False, default_factory=list)
    job: str | None = field(init=False, default=None)
    before: dict[str, Any] = field(init=False, default_factory=dict)
    after: dict[str, Any] = field(init=False, default_factory=dict)
    timed: dict[str, Any] = field(init=False, default_factory=dict)
    report: dict[str, Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.results = Results(self.work, self.out)

    def stages(self) -> list[Stage]:
        """The plan, in order."""
        return [
            Stage("load", self.load),
            Stage("measure before", lambda: self.measure("dense", self.before)),
            *(Stage(folder, partial(self.step, number)) for number, folder in enumerate(self.folders())),
            Stage("measure after", lambda: self.measure("cut", self.after)),
            Stage("time", self.time),
            Stage("write", self.write),
        ]

    def folders(self) -> list[str]:
        """Name of the folder of every step."""
        return [f"{number}-{step.kind}" for number, step in enumerate(self.steps, 1)]

    def run(self) -> dict[str, Any]:
        """Do every stage whose result is not there yet."""
        for stage in self.stages():
            stage.run()
            if self.report is not None:
                break
        assert self.report is not None
        return self.report

    def load(self) -> None:
        """Load the model and check that the run can be done and its result be saved; find out what earlier runs have left."""
        with self.progress.stage(f"loading {self.source}"):
            self.model = model = load(
                self.source, dtype=self.dtype, device=self.device, memory=self.memory, scratch=self.work
            )
        check_unpacked(model)
        check_trainable(model, self.steps)
        if self.measuring.prompts:
            check_model(model)
        if self.calibration is not None or self.held_out or self.measuring.tasks or self.measuring.prompts:
            self.tokenizer = tokenizer_of(model)
        if self.measuring.speed and not predicts(model):
            self.progress.note("speed is measured of causal language models only")
            self.measuring = replace(self.measuring, speed=False)
        check_target(
            self.out, self.overwrite, sum(p.numel() * p.element_size() for p in model.parameters()), self.source
        )
        check_savable(model)
        self.keys = self._keys()
        if self.keys[-1] is not None:
            asked = [self.measuring.speed, list(self.measuring.prompts)]
            self.job = key_of(self.keys[-1], self._quality_key(), asked)
        if (done := self._written()) is not None:
            self.progress.note(f"{self.out} holds this result already; remove it to have it made anew")
            self.report = done

    def measure(self, name: str, costs: dict[str, Any]) -> None:
        """Count what the model costs, and measure its quality and its replies."""
        costs.update(_costs(self.model), quality={"perplexity": {}, "tasks": {}})
        if self.held_out or self.measuring.tasks:
            costs["quality"] = self.results.of(self._quality_key(), lambda: self._quality(name))
        replied: list[str] = []
        if prompts := list(self.measuring.prompts):
            with self.progress.stage(f"replies of the {name} model"):
                key = key_of("replies", fingerprint(self.model), prompts, self._where())
                replied = self.results.of(key, lambda: replies(self.model, self.tokenizer, prompts))
        costs["replies"] = replied

    def step(self, number: int) -> None:
        """Do one step, or go on from the result that a later one or itself has left."""
        name, key = self.folders()[number], self.keys[number + 1]
        if number == 0 and self.measuring.speed:
            self.dense = copy.deepcopy(self.model)
        kept = [later for later in range(number, len(self.steps)) if self._kept(later)]
        if len(getattr(self.model, "pliant_history", [])) > number:
            return  # the model is that of a later step
        if kept and (found := kept_model(self.work / self.folders()[kept[-1]], self.model)) is not None:
            self.progress.note(f"going on from {self.folders()[kept[-1]]}, which an earlier run has finished")
            self.model = found
            return
        apply_step(
            self.model,
            self.steps[number],
            self.calibration,
            tokenizer=self.tokenizer,
            dense=self.dense,
            folder=self.work / name,
            progress=self.progress,
            earlier=self.out / name,
        )
        seconds = self.model.pliant_history[-1]["seconds"]
        if key is not None and keep_model(self.model, self.work / name, key, seconds):
            for earlier in self.folders()[:number]:
                forget_model(self.work / earlier)

    def time(self) -> None:
        """Time both models in turn."""
        if not self.measuring.speed:
            return
        with self.progress.stage("timing both models in turn"):
            self.timed = bench(self.model, self.dense, tokens=min(32, longest_of(self.model) // 4))

    def write(self) -> None:
        """Write the artefact."""
        before, after, model = self.before, self.after, self.model
        report = {
            "schema": 2,
            "job": self.job,
            "model": str(self.source),
            "ratio": 1 - after["parameters"] / before["parameters"],
            "before": before,
            "after": after,
            "layers": _shares(before.pop("units"), after.pop("units")),
            "replies": [
                {"prompt": prompt, "before": old, "after": new}
                for prompt, old, new in zip(
                    self.measuring.prompts, before.pop("replies"), after.pop("replies"), strict=True
                )
            ],
            "steps": model.pliant_history,
            "machine": machine(),
            "device": called(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            **versions(),
        }
        if self.timed:
            report["speed"] = self.timed
            report["predicted"] = {
                "prefill": before["macs_per_token"] / after["macs_per_token"],
                "decode": before["streamed_bytes"] / after["streamed_bytes"],
            }
        if (pages := pages_of(model)) is not None:
            report["memory"] = {"limit": pages.limit, "peak": pages.peak}

        def weigh(written: Path) -> None:
            """Measure bytes on disk and memory to run, of the source model and of the model just written."""
            if self.measuring.speed:
                with self.progress.stage("running both models in separate processes to measure their memory"):
                    for costs, where in ((before, self.source), (after, written)):
                        costs["disk_bytes"] = disk_bytes(where)
                        costs["run_memory"] = run_memory(where, self.dtype)

        kept = [
            Path(RESULTS),
            *(Path(f, name) for f, s in zip(self.folders(), self.steps, strict=True) for name in s.keeps),
        ]
        extra = {str(name): self.work / name for name in kept if (self.work / name).exists()}
        with self.progress.stage(f"writing {self.out}"):
            save(
                model,
                self.out,
                report=report,
                inputs=self.inputs,
                extra=extra,
                overwrite=self.overwrite,
                weigh=weigh,
            )
        self.report = report

    def _kept(self, number: int) -> bool:
        return has_model(self.work / self.folders()[number], self.keys[number + 1])

    def _where(self) -> list[Any]:
        """What results depend on besides their inputs."""
        device = [str(self.model.device)] if self.model.device.type != "cpu" else []
        return [str(self.model.dtype), *device, machine()["cpu"], versions()]

    def _keys(self) -> list[str | None]:
        """The key of the loaded model, and of what each step makes of it; None where a step reads what has no digest."""
        text_ = None
        if self.calibration is not None:
            text_ = (self.calibration.digest, self.calibration.token_digest(self.tokenizer))
        keys: list[str | None] = [key_of(fingerprint(self.model), text_, self._where())]
        for step in self.steps:
            digests = [path_digest(path) for path in paths_of(step)]
            unknown = keys[-1] is None or None in digests
            keys.append(None if unknown else key_of(keys[-1], step.to_dict(), digests))
        return keys

    def _quality_key(self) -> str:
        """What the quality of the model depends on, as a hash."""
        of = self.measuring
        tasks = [(str(task), path_digest(str(task))) for task in of.tasks]
        texts = [(source.source, source.digest, source.token_digest(self.tokenizer)) for source in self.held_out]
        return key_of("quality", fingerprint(self.model), texts, of.seqlen, of.windows, of.limit, tasks)

    def _quality(self, name: str) -> dict[str, Any]:
        with self.progress.stage(f"measuring the {name} model"):
            return evaluate(
                self.model,
                perplexity=self.held_out,
                tasks=self.measuring.tasks,
                tokenizer=self.tokenizer,
                seqlen=self.measuring.seqlen,
                windows=self.measuring.windows,
                limit=self.measuring.limit,
            )

    def _written(self) -> dict[str, Any] | None:
        """The report in ``out`` if it is that of this very run, and the model beside it is whole."""
        try:
            report = json.loads((self.out / "report.json").read_text("utf-8"))
            check_folder(self.out)
        except (OSError, ValueError):
            return None
        same = self.job is not None and isinstance(report, dict) and report.get("job") == self.job
        return report if same else None


def _costs(model: Any) -> dict[str, Any]:
    anatomy = described(model)
    element = next(model.parameters()).element_size()
    weights = weight_bytes(anatomy, element=element)
    cached = cache_bytes(anatomy, element=element)
    streamed = streamed_bytes(anatomy, element=element, context=_PROMPT)
    if packed := packed_bytes(model):
        weights = held_bytes(model)
        cached = cached_bytes(model) or cached
        others = streamed_bytes(anatomy, element=element) - unpacked_bytes(model, element)
        streamed = packed + max(0, others) + _PROMPT * cached
    return {
        "parameters": parameters(anatomy),
        "macs_per_token": macs(anatomy, Subnet(), tokens=1, context=_PROMPT),
        "weight_bytes": weights,
        "streamed_bytes": streamed,
        "cache_bytes_per_token": cached,
        "units": _units(anatomy),
    }


def _units(anatomy: Anatomy) -> dict[str, int]:
    """Units of every axis by its name, and 1 by the name of a block that can only go whole."""
    whole = {block.name: 1 for block in anatomy.blocks.values() if not block.leaders}
    return {axis.name: axis.size for axis in anatomy.axes.values()} | whole


def _shares(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Share kept of each: 0 where its block is gone."""
    return {name: after.get(name, 0) / size for name, size in before.items()}

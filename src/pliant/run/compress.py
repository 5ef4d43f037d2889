"""The main job, end to end: load, measure, apply the steps, measure again, time, write the artefact."""

from __future__ import annotations

import copy
import json
import platform
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pliant.checkpoint.fingerprint import fingerprint
from pliant.checkpoint.load import check_folder, load, tokenizer_of
from pliant.data import Text, text
from pliant.device import device_name
from pliant.digest import json_digest, path_digest
from pliant.errors import BusyError, PliantError
from pliant.forward.windows import check_model, longest_of, predicts
from pliant.machine import machine
from pliant.measure.memory import disk_bytes, run_memory
from pliant.measure.quality.evaluate import evaluate
from pliant.measure.quality.replies import replies
from pliant.measure.speed.bench import bench
from pliant.pages import pages_of
from pliant.progress import Console, Progress
from pliant.run.apply import apply_step, check_trainable, check_unpacked, folder_name
from pliant.run.card import versions
from pliant.run.model_costs import model_costs, shares_kept
from pliant.run.recipe import Measuring, Recipe, read_recipe
from pliant.run.save import check_savable, save
from pliant.run.stages import RESULTS, Estimate, Results, Stage, forget_model, has_model, keep_model, kept_model
from pliant.run.target import LOCK, check_target, clear_leftovers, files_in, work_folder
from pliant.step import Step, paths_of, recipe_of

TIMED = 12 * 300  # tokens in a timing of two models


def compress(
    source: str | Path,
    step: Step | Sequence[Step],
    data: Text | str | Path | None,
    out: str | Path,
    *,
    measuring: Measuring = Measuring(),
    dtype: Any = "auto",
    overwrite: bool = False,
    device: Any = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a model into the folder ``out`` and return the report.

    The run is a list of stages (see :func:`stages`). Their results are kept in ``out`` + ``.work``, each under a key of
    all that it depends on: after a crash or Ctrl-C the same call skips the stages that have one. Archives of searches
    become part of the artefact: a run with ``overwrite`` that differs only in settings on which no score depends (such
    as the ratio) starts from them, and an identical run finds its result.

    Arguments:
        data: calibration text; None for a step that needs none.
        measuring: the measurements before and after.
        dtype, device: as in :func:`pliant.load`.
        overwrite: replace an earlier result in ``out``.
        memory: memory that the process may take beside what it has, as for :func:`pliant.load`; speed is then not
            measured.

    Raises:
        BusyError: another run is writing to ``out``.
        StepError: before any work: ``step`` is not a step, or a step comes after one that packs.
    """
    calibration = text(data) if isinstance(data, str | Path) else data
    recipe = Recipe(str(source), recipe_of(step), calibration, measuring, str(dtype).removeprefix("torch."))
    return Run(recipe, out, overwrite=overwrite, device=device, memory=memory, progress=progress).finish()


def run_recipe(
    recipe: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    device: Any = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Repeat a recipe into the folder ``out``, and return the report.

    Arguments:
        recipe: a ``recipe.yaml``, or the folder of an artefact.
        model, data: as for :func:`pliant.run.recipe.read_recipe`.
        overwrite, device, memory, progress: as for ``pliant compress``.
    """
    read = read_recipe(recipe, model=model, data=data)
    return Run(read, out, overwrite=overwrite, device=device, memory=memory, progress=progress).finish()


def stages(recipe: Recipe) -> list[Stage]:
    """The stages of a run, in order."""
    quality = recipe.measured_tokens()
    timed, models = (TIMED, 2) if recipe.measuring.speed else (0, 1)  # the dense model stays in memory for the timing

    def of_step(step: Step, blocks: int, row: float) -> Estimate:
        tokens, gradients = step.estimate(blocks, row)
        return Estimate(tokens, models + (4 if gradients else 0), disk=1)

    return [
        Stage("load", Run.load, lambda *_: Estimate()),
        Stage("measure before", partial(Run.measure, name="dense"), lambda *_: Estimate(quality)),
        *(
            Stage(folder_name(number, step), partial(Run.step, number=number), partial(of_step, step))
            for number, step in enumerate(recipe.steps, 1)
        ),
        Stage("measure after", partial(Run.measure, name="cut"), lambda *_: Estimate(quality, models)),
        Stage("time", Run.time, lambda *_: Estimate(timed, models)),
        Stage("write", Run.write, lambda *_: Estimate(0, models, disk=1)),
    ]


class Run:
    """One run of a recipe. Each stage leaves its result here for the later ones.

    The model stays where it was loaded from, so ``load`` keeps no result. The result of ``write`` is the artefact; its
    report has the key of the whole run.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        overwrite: bool,
        device: Any,
        memory: int | str | None,
        progress: Progress | None,
    ):
        self.recipe, self.measuring = recipe, recipe.measuring
        self.out = check_target(out, overwrite, source=recipe.model)
        self.overwrite, self.device, self.memory = overwrite, device, memory
        self.progress = progress or Console()
        self.inputs = recipe.to_dict()
        self.calibration, self.held_out = recipe.texts()
        self.timing = self.measuring.speed and memory is None  # two models, partly in files: timings would mean nothing
        self.work = work_folder(self.out)
        self.folders = [folder_name(number, step) for number, step in enumerate(recipe.steps, 1)]
        self.model: Any = None
        self.dense: Any = None
        self.tokenizer: Any = None
        self.keys: list[str | None] = []  # of the loaded model, and of the result of every step
        self.job: str | None = None
        self.measured: dict[str, dict[str, Any]] = {}  # of the dense and of the cut model
        self.speed: dict[str, Any] | None = None
        self.report: dict[str, Any] = {}

    def finish(self) -> dict[str, Any]:
        """Do the stages that have no result yet, and return the report.

        Raises:
            BusyError: another run is writing to the same folder.
        """
        try:
            lock = FileLock(self.work / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"another run is writing to {str(self.out)!r}; wait until it is done, or give another folder"
            ) from None
        try:
            clear_leftovers(self.out)
            self.results = Results(self.work, self.out)
            for stage in stages(self.recipe):
                stage.run(self)
                if self.report:
                    break
        except BaseException as error:
            if not self._resumes(refused=isinstance(error, PliantError)):
                shutil.rmtree(self.work, ignore_errors=True)
            raise
        else:
            shutil.rmtree(self.work, ignore_errors=True)  # while it is locked: after the release another run may use it
        finally:
            lock.release()
        return self.report

    def _resumes(self, *, refused: bool) -> bool:
        """Whether a run that ended early can resume from its work folder; a refused one only from files of its
        steps."""
        kept = [folder for folder in self.work.iterdir() if folder.is_dir() and re.match(r"\d+-", folder.name)]
        return any(map(files_in, kept)) or (not refused and (self.work / RESULTS).exists())

    def load(self) -> None:
        """Load the model, check that every later stage can be done, and look for an identical result in ``out``."""
        recipe, progress = self.recipe, self.progress
        with progress.stage(f"loading {recipe.model}"):
            self.model = model = load(
                recipe.model, dtype=recipe.dtype, device=self.device, memory=self.memory, scratch=self.work
            )
        check_unpacked(model)
        check_trainable(model, recipe.steps)
        if self.measuring.prompts:
            check_model(model)
        if self.calibration is not None or self.held_out or self.measuring.tasks or self.measuring.prompts:
            self.tokenizer = tokenizer_of(model)
        if self.timing and not predicts(model):
            progress.note("speed is measured for causal language models only")
            self.timing = False
        need = sum(p.numel() * p.element_size() for p in model.parameters())
        check_target(self.out, self.overwrite, need, recipe.model)
        check_savable(model)
        self.keys = self._keys()
        if self.keys[-1] is not None:
            self.job = json_digest([self.keys[-1], self._quality_key(), self.timing, list(self.measuring.prompts)])
        self.report = self._written()
        if self.report:
            progress.note(f"{self.out} holds this result already; to run again, remove it first")

    def measure(self, name: str) -> None:
        """Measure costs, quality and replies of the dense model, or of the one that the steps have made of it."""
        quality: dict[str, Any] = {"perplexity": {}, "tasks": {}}
        if self.held_out or self.measuring.tasks:
            quality = self.results.of(self._quality_key(), lambda: self._quality(name))
        replied: list[str] = []
        if prompts := list(self.measuring.prompts):
            with self.progress.stage(f"replies of the {name} model"):
                key = json_digest(["replies", fingerprint(self.model), prompts, self._where()])
                replied = self.results.of(key, lambda: replies(self.model, self.tokenizer, prompts))
        self.measured[name] = {**model_costs(self.model), "quality": quality, "replies": replied}

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

    def step(self, number: int) -> None:
        """Apply a step, or take its result or that of a later step from an earlier run."""
        name, key = self.folders[number - 1], self.keys[number]
        if number == 1 and self.timing:
            self.dense = copy.deepcopy(self.model)
        if len(getattr(self.model, "pliant_history", [])) >= number:
            return  # the model is the result of a later step
        if (found := self._kept_model(number)) is not None:
            self.model = found
            return
        apply_step(
            self.model,
            self.recipe.steps[number - 1],
            self.calibration,
            tokenizer=self.tokenizer,
            dense=self.dense,
            folder=self.work / name,
            progress=self.progress,
            earlier=self.out / name,
        )
        seconds = self.model.pliant_history[-1]["seconds"]
        if key is not None and keep_model(self.model, self.work / name, key, seconds):
            for earlier in self.folders[: number - 1]:
                forget_model(self.work / earlier)

    def _kept_model(self, number: int) -> Any:
        """The result that an earlier run has kept of this step or the latest after it, or None."""
        for name, key in reversed(list(zip(self.folders, self.keys[1:], strict=True))[number - 1 :]):
            if has_model(self.work / name, key):
                model = kept_model(self.work / name, self.model)
                if model is not None:
                    self.progress.note(f"resuming from {name}, which an earlier run has finished")
                return model
        return None

    def time(self) -> None:
        """Time both models, alternately. Its key has the model, the steps, the machine and the number of threads."""
        if not self.timing:
            return

        def timed() -> dict[str, Any]:
            with self.progress.stage("timing both models alternately"):
                return bench(self.model, self.dense, tokens=min(32, longest_of(self.model) // 4))

        made = self.keys[-1]
        key = json_digest(["time", made, machine(), platform.node()])
        self.speed = timed() if made is None else self.results.of(key, timed)

    def write(self) -> None:
        """Write the artefact."""
        before, after = self.measured["dense"], self.measured["cut"]
        layers = shares_kept(before.pop("units"), after.pop("units"))
        replied = zip(self.measuring.prompts, before.pop("replies"), after.pop("replies"), strict=True)
        report = {
            "schema": 2,
            "job": self.job,
            "model": self.recipe.model,
            "ratio": 1 - after["parameters"] / before["parameters"],
            "before": before,
            "after": after,
            "layers": layers,
            "replies": [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in replied],
            "steps": self.model.pliant_history,
            "machine": machine(),
            "device": device_name(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **versions(),
        }
        if self.speed is not None:
            report["speed"] = self.speed
            report["predicted"] = {
                "prefill": before["macs_per_token"] / after["macs_per_token"],
                "decode": before["streamed_bytes"] / after["streamed_bytes"],
            }
        if (pages := pages_of(self.model)) is not None:
            report["memory"] = {"limit": pages.limit, "peak": pages.peak}
        with self.progress.stage(f"writing {self.out}"):
            save(
                self.model,
                self.out,
                report=report,
                inputs=self.inputs,
                extra=self._kept_files(),
                overwrite=self.overwrite,
                weigh=self._weigh if self.timing else None,
            )
        self.report = report

    def _weigh(self, written: Path) -> None:
        """Measure bytes on disk and memory to run, of the dense model and of the model just written."""
        with self.progress.stage("running both models in separate processes to measure their memory"):
            for name, where in (("dense", self.recipe.model), ("cut", written)):
                self.measured[name] |= {
                    "disk_bytes": disk_bytes(where),
                    "run_memory": run_memory(where, self.recipe.dtype),
                }

    def _kept_files(self) -> dict[str, Path]:
        """Name in the artefact -> file in the work folder: results of stages, and the files that steps keep."""
        names = [RESULTS]
        for folder, step in zip(self.folders, self.recipe.steps, strict=True):
            names += [f"{folder}/{name}" for name in step.keeps]
        return {name: self.work / name for name in names if (self.work / name).exists()}

    def _where(self) -> list[Any]:
        """The dtype, device, processor and versions that results depend on."""
        device = [str(self.model.device)] if self.model.device.type != "cpu" else []
        return [str(self.model.dtype), *device, machine()["cpu"], versions()]

    def _keys(self) -> list[str | None]:
        """The key of the loaded model, and of the result of each step; None from a step on that reads data without a
        digest."""
        of = self.calibration
        rows = None if of is None else (of.digest, of.token_digest(self.tokenizer))
        keys: list[str | None] = [json_digest([fingerprint(self.model), rows, self._where()])]
        for step in self.recipe.steps:
            digests = [path_digest(path) for path in paths_of(step)]
            unknown = keys[-1] is None or None in digests
            keys.append(None if unknown else json_digest([keys[-1], step.to_dict(), digests]))
        return keys

    def _quality_key(self) -> str:
        """The key of the quality of the model as it is now."""
        of = self.measuring
        tasks = [(str(task), path_digest(str(task))) for task in of.tasks]
        texts = [(source.source, source.digest, source.token_digest(self.tokenizer)) for source in self.held_out]
        return json_digest(["quality", fingerprint(self.model), texts, of.seqlen, of.windows, of.limit, tasks])

    def _written(self) -> dict[str, Any]:
        """The report in ``out`` if it is that of this very run, and the model beside it is complete; otherwise
        nothing."""
        try:
            report = json.loads((self.out / "report.json").read_text("utf-8"))
            check_folder(self.out)
        except (OSError, ValueError):
            return {}
        same = self.job is not None and isinstance(report, dict) and report.get("job") == self.job
        return report if same else {}

"""The main job, end to end: load, measure, apply, measure again, write the artefact."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from filecmp import cmp
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
from pliant.digest import digest, json_digest
from pliant.elastic import Subnet, cache_bytes, described, macs, parameters, streamed_bytes, weight_bytes
from pliant.errors import BusyError, PliantError
from pliant.files import write_json
from pliant.forward.windows import check_model, longest_of, predicts
from pliant.machine import machine
from pliant.measure.memory import disk_bytes, run_memory
from pliant.measure.quality.evaluate import evaluate
from pliant.measure.quality.replies import check_prompts, replies
from pliant.measure.speed.bench import bench
from pliant.pages import pages_of
from pliant.progress import Console, Progress
from pliant.run.apply import apply, check_unpacked
from pliant.run.card import versions
from pliant.run.save import check_savable, save
from pliant.run.target import LOCK, check_target, work_folder
from pliant.searches import ArchiveError
from pliant.step import Step, recipe_of

ARCHIVES = "search*.jsonl"  # one for each step that searched
MEASURED = "measured.json"
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

    While it runs, evaluations are kept in ``out`` + ``.work``: after a crash or Ctrl-C the same call resumes from them. Afterwards
    the archive is part of the artefact: a run with ``overwrite`` that differs only in settings on which no score depends (such as
    the ratio) starts from it, and an identical run finds its work done.

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

    def run() -> dict[str, Any]:
        for made in [*(out.glob(ARCHIVES) if earlier else ()), out / MEASURED]:
            if made.exists() and not (work / made.name).exists():
                shutil.copyfile(made, work / made.name)
        with progress.stage(f"loading {source}"):
            model = load(source, dtype=dtype, device=device, memory=memory, scratch=work)
        return _compress(source, model, steps, calibration, held_out, out, work, measuring, overwrite, dtype, progress)

    try:
        # archives of what is about to be overwritten: a start, or of no use if they came from other settings
        earlier = all((out / made.name).exists() and cmp(made, out / made.name) for made in work.glob(ARCHIVES))
        try:
            report = run()
        except ArchiveError:
            if not (earlier and any(work.glob(ARCHIVES))):
                raise
            report = None
        if report is None:  # outside the handler, which would keep the first model in memory
            earlier = False
            for made in work.glob(ARCHIVES):
                made.unlink()
            report = run()
    except BaseException as error:
        refused = isinstance(error, PliantError)  # then there is nothing to go on from
        trained = any(work.glob("*/state.safetensors"))
        if not any(work.glob(ARCHIVES)) and not trained and (refused or not (work / MEASURED).exists()):
            shutil.rmtree(work, ignore_errors=True)
        lock.release()
        raise
    shutil.rmtree(work, ignore_errors=True)  # while it is still ours: after the release another run may start in it
    lock.release()
    return report


def _compress(
    source: str | Path,
    model: Any,
    steps: list[Step],
    calibration: Text | None,
    held_out: list[Text],
    out: Path,
    work: Path,
    measuring: Measuring,
    overwrite: bool,
    dtype: Any,
    progress: Progress,
) -> dict[str, Any]:
    check_unpacked(model)
    if measuring.prompts:
        check_model(model)
    reads = calibration is not None or held_out or measuring.tasks or measuring.prompts
    tokenizer = tokenizer_of(model) if reads else None
    if measuring.speed and not predicts(model):
        progress.note("speed is measured of causal language models only")
        measuring = replace(measuring, speed=False)
    check_target(out, overwrite, sum(p.numel() * p.element_size() for p in model.parameters()), source)
    check_savable(model)
    job = _job(model, tokenizer, steps, calibration, held_out, measuring)
    if (done := _finished(out, job)) is not None:
        progress.note(f"{out} holds this result already; remove it to have it made anew")
        return done

    def quality(of: Any, name: str) -> dict[str, Any]:
        if not held_out and not measuring.tasks:
            return {"perplexity": {}, "tasks": {}}
        return _remembered(
            work / MEASURED,
            _key(of, tokenizer, held_out, measuring),
            lambda: _measure(of, name, held_out, tokenizer, measuring, progress),
        )

    def replied(name: str) -> list[str]:
        with progress.stage(f"replies of the {name} model"):
            return replies(model, tokenizer, measuring.prompts) if measuring.prompts else []

    before = {**_costs(model), "quality": quality(model, "dense")}
    replies_before = replied("dense")
    dense = copy.deepcopy(model) if measuring.speed else None
    apply(model, steps, calibration, tokenizer=tokenizer, dense=dense, work=work, progress=progress)
    after = {**_costs(model), "quality": quality(model, "cut")}
    report = {
        "schema": 1,
        "job": job,
        "model": str(source),
        "ratio": 1 - after["parameters"] / before["parameters"],
        "before": before,
        "after": after,
        "layers": _shares(before.pop("units"), after.pop("units")),
        "replies": [
            {"prompt": prompt, "before": old, "after": new}
            for prompt, old, new in zip(measuring.prompts, replies_before, replied("cut"), strict=True)
        ],
        "steps": model.pliant_history,
        "machine": machine(),
        "device": called(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        **versions(),
    }
    if dense is not None:
        with progress.stage("timing both models in turn"):
            report["speed"] = bench(model, dense, tokens=min(32, longest_of(model) // 4))
        report["predicted"] = {
            "prefill": before["macs_per_token"] / after["macs_per_token"],
            "decode": before["streamed_bytes"] / after["streamed_bytes"],
        }
    if (pages := pages_of(model)) is not None:
        report["memory"] = {"limit": pages.limit, "peak": pages.peak}

    def weigh(written: Path) -> None:
        """Measure bytes on disk and memory to run, of the source model and of the model just written."""
        if measuring.speed:
            with progress.stage("running both models in separate processes to measure their memory"):
                for costs, where in ((before, source), (after, written)):
                    costs["disk_bytes"] = disk_bytes(where)
                    costs["run_memory"] = run_memory(where, dtype)

    archive = {made.name: made for made in [*sorted(work.glob(ARCHIVES)), work / MEASURED] if made.exists()}
    with progress.stage(f"writing {out}"):
        save(model, out, report=report, extra=archive, overwrite=overwrite, weigh=weigh)
    return report


def _measure(
    model: Any, name: str, held_out: list[Text], tokenizer: Any, measuring: Measuring, progress: Progress
) -> dict[str, Any]:
    with progress.stage(f"measuring the {name} model"):
        return evaluate(
            model,
            perplexity=held_out,
            tasks=measuring.tasks,
            tokenizer=tokenizer,
            seqlen=measuring.seqlen,
            windows=measuring.windows,
            limit=measuring.limit,
        )


def _key(model: Any, tokenizer: Any, held_out: list[Text], measuring: Measuring) -> str:
    """What a quality depends on, as a hash."""
    tasks = [digest([Path(task).read_bytes()], size=64) if Path(task).is_file() else "" for task in measuring.tasks]
    settings = (measuring.seqlen, measuring.windows, measuring.limit, [str(task) for task in measuring.tasks], tasks)
    texts = [(source.source, source.digest, source.token_digest(tokenizer)) for source in held_out]
    return json_digest([fingerprint(model), texts, settings])


def _job(
    model: Any,
    tokenizer: Any,
    steps: list[Step],
    calibration: Text | None,
    held_out: list[Text],
    measuring: Measuring,
) -> str | None:
    """What a whole run depends on, as a hash; None where a step reads files of its own, which may have changed."""
    if any(getattr(one, name, None) for one in steps for name in ("data", "teacher")):
        return None
    text_ = None if calibration is None else (calibration.digest, calibration.token_digest(tokenizer))
    settings = [
        [one.to_dict() for one in steps],
        text_,
        measuring.speed,
        list(measuring.prompts),
        str(model.dtype),
        *([str(model.device)] if model.device.type != "cpu" else []),
        machine()["cpu"],
        versions(),
    ]
    return json_digest([_key(model, tokenizer, held_out, measuring), settings])


def _finished(out: Path, job: str | None) -> dict[str, Any] | None:
    """The report in ``out`` if it is that of this very run, and the model beside it is whole."""
    try:
        report = json.loads((out / "report.json").read_text("utf-8"))
        check_folder(out)
    except (OSError, ValueError):
        return None
    return report if job is not None and isinstance(report, dict) and report.get("job") == job else None


def _remembered(path: Path, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured under ``key`` before, or is measured now and kept in ``path``."""
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or key not in known:
        known = {**(known if isinstance(known, dict) else {}), key: measure()}
        write_json(path, known)
    return known[key]


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

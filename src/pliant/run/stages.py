"""The stages of a run, and what finished stages have given, by key: a resumed run skips a stage whose key it finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pliant.checkpoint.fingerprint import fingerprint
from pliant.checkpoint.load import load
from pliant.compat.hub_revision import copy_revision
from pliant.errors import PliantError
from pliant.files import replacing, write_json
from pliant.pages import pages_of
from pliant.run.save import save_model

RESULTS = "stages.json"
MODEL = "result"
"""Folder of the model that a step has given, in the folder of the step."""
DISK = 200e6  # bytes a second: a model that is made faster than it is written is not kept
SHARD = 5 * 10**9


@dataclass(frozen=True)
class Estimate:
    """A rough guess of what a stage takes.

    Attributes:
        tokens: that go through the model.
        memory, disk: multiples of the bytes of the dense model's weights, in memory and left on the disk.
    """

    tokens: float = 0.0
    memory: float = 1.0
    disk: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One part of a run. ``estimate`` takes the number of blocks and the tokens in a row of text, as that of a step
    does."""

    name: str
    run: Callable[[Any], None]
    estimate: Callable[[int, float], Estimate]


class Results:
    """Plain results by key.

    Arguments:
        work: the work folder.
        earlier: folder of the result that is about to be overwritten; the results of its stages are used, too.
    """

    def __init__(self, work: Path, earlier: Path):
        self.path = work / RESULTS
        self._known = {**_read(earlier / RESULTS), **_read(self.path)}
        self._used: dict[str, Any] = {}

    def of(self, key: str, make: Callable[[], Any]) -> Any:
        """The result with this key: that of an earlier run, or a new one, which is on the disk when this returns."""
        self._used[key] = self._known[key] = self._known[key] if key in self._known else make()
        write_json(self.path, self._used)
        return self._used[key]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def keep_model(model: Any, folder: Path, key: str, seconds: float) -> bool:
    """Keep the result of a step in its folder, unless writing takes longer than the step did or the disk has too little
    space.

    Returns:
        Whether it was kept.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    folder.mkdir(parents=True, exist_ok=True)
    fits = shutil.disk_usage(folder).free > 2.5 * size  # the artefact is written while this is there
    if pages_of(model) is not None or seconds < size / DISK or not fits:
        return False
    try:
        with replacing(folder / MODEL) as place:
            place.mkdir()
            save_model(model, place, SHARD)
            made = {"key": key, "fingerprint": fingerprint(model), "history": model.pliant_history}
            (place / RESULTS).write_text(json.dumps(made), "utf-8")
            forget_model(folder)
    except (OSError, SafetensorError):  # it only saves time; the artefact has its own errors
        return False
    return True


def forget_model(folder: Path) -> None:
    """Delete what :func:`keep_model` has kept."""
    shutil.rmtree(folder / MODEL, ignore_errors=True)


def has_model(folder: Path, key: str | None) -> bool:
    """Whether the folder of a step holds its result under this key."""
    return key is not None and _read(folder / MODEL / RESULTS).get("key") == key


def kept_model(folder: Path, source: Any) -> Any:
    """The model that :func:`keep_model` has kept, or None if it cannot be read as it was written.

    Arguments:
        source: the model that it was made from, to take its name and device from.
    """
    made = _read(folder / MODEL / RESULTS)
    try:
        model = load(folder / MODEL, device=str(source.device))
    except PliantError:
        return None
    if fingerprint(model) != made.get("fingerprint"):
        return None
    model.name_or_path = source.name_or_path
    model.config.name_or_path = source.config.name_or_path
    copy_revision(source, model)
    model.pliant_history = made["history"]
    return model

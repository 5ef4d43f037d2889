"""Report the progress of long work: lines with an ETA and the peak memory, a live line on a terminal."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pliant.formatting import duration, human_bytes


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """Receives the progress of long work. The base class is silent.

    The finished share of a stage goes from 0 to 1; the ETA extrapolates the time so far.
    """

    def __init__(self) -> None:
        self._name, self._start, self._done = "", 0.0, 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Report a named stage of the work, its duration and the peak memory."""
        self._name, self._start, self._done = name, time.monotonic(), 0.0
        self.note(name)
        try:
            yield self
        except BaseException:
            self.emit("failed", name=name, seconds=time.monotonic() - self._start)
            raise
        self.emit("stage", name=name, seconds=time.monotonic() - self._start, peak_memory=peak_memory())

    def step(self, done: float, text: str) -> None:
        """Report that the share ``done`` of the stage is finished."""
        self._done = max(self._done, min(1.0, done))
        elapsed = time.monotonic() - self._start
        eta = elapsed * (1 - self._done) / self._done if self._done > 0.02 else None
        self.emit("step", name=self._name, done=self._done, seconds=elapsed, eta=eta, text=text)

    def note(self, text: str) -> None:
        """Report one line of text."""
        self.emit("note", text=text)

    def emit(self, event: str, **fields: Any) -> None:
        """Show one event; the base class ignores it."""


class Events(Progress):
    """Progress for programs: one JSON object per line."""

    def __init__(self, write: Callable[[str], Any] | None = None):
        super().__init__()
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201

    def emit(self, event: str, **fields: Any) -> None:
        self._write(json.dumps({"event": event, **fields}))


class Console(Progress):
    """Progress for people: a live line on a terminal, elsewhere a plain line now and then."""

    def __init__(self, every: float = 15.0):
        super().__init__()
        from rich.console import Console as Rich

        self._rich = Rich(stderr=True, highlight=False, emoji=False, markup=False)
        self._every, self._last = every, 0.0
        self._live = None

    def emit(self, event: str, **fields: Any) -> None:
        if event == "step":
            eta = "" if fields["eta"] is None else f", about {duration(fields['eta'])} left"
            line = (
                f"{fields['name']} {fields['done']:4.0%} | {fields['text']} | {duration(fields['seconds'])}{eta}"
                f" | peak {human_bytes(peak_memory())}"
            )
            if self._rich.is_terminal:
                from rich.text import Text

                if self._live is None:
                    self._live = self._rich.status(Text(line))
                    self._live.start()
                self._live.update(Text(line))
            elif time.monotonic() - self._last >= self._every:
                self._last = time.monotonic()
                self._rich.print(line, soft_wrap=True)
            return
        if self._live is not None:
            self._live.stop()
            self._live = None
        if event == "note":
            self._rich.print(fields["text"], soft_wrap=True)
        elif event == "stage":
            peak = human_bytes(fields["peak_memory"])
            self._rich.print(f"{fields['name']}: {duration(fields['seconds'])}, peak {peak}", soft_wrap=True)

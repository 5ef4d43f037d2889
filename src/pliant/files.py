"""Replace files and folders as a whole: write beside them, flush to disk, rename. A crash leaves the old or the new
one."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text in UTF-8. Its folder is created if it is missing."""
    with replacing(path) as aside:
        aside.write_text(text, "utf-8")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replace a file by plain data as JSON. Its folder is created if it is missing."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` if the block succeeds and is deleted if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    _remove(aside)  # left by a process that was killed
    try:
        yield aside
        settle(aside)
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        _remove(aside)
        raise


def settle(written: Path) -> None:
    """Flush a file, or a folder and everything in it, to disk, and give it the permissions of new files.

    Without this, temporary folders and the files that safetensors writes can be read only by their owner.
    """
    mode = _mode_of_new(written)
    for path in (*written.rglob("*"), written):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        sync(path)


def sync(path: Path) -> None:
    """Flush one file, or the list of names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mode_of_new(written: Path) -> int:
    """The permissions of a new folder beside ``written``, read from one: the parent folder can have its own rules."""
    probe = written.with_name(written.name + ".mode")
    probe.mkdir(exist_ok=True)
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.rmdir()

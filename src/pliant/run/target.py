"""Check the folder that a result is written to, and replace an earlier result in it.

An earlier result lists its files in ``recipe.yaml``. Only a folder that holds these and nothing else is ever replaced.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from pliant.errors import ArtefactError
from pliant.files import settle, sync

RECIPE = "recipe.yaml"
RECIPE_VERSION = 2
LOCK = "lock"
_SHOWN = 5  # names in a message
_MARK = ".pliant-"  # in the name of a temporary folder, so that no folder of the user's has such a name
_PREFIX = 40  # characters of the name of a result in that of a temporary folder


def local(model: str | Path) -> str:
    """The absolute path of a model on this machine; the id of a model on a hub as it is."""
    place = Path(model).expanduser()
    return str(place.resolve()) if place.exists() else str(model)


def check_target(folder: str | Path, overwrite: bool, need: int = 0, source: Any = None) -> Path:
    """Check that ``folder`` can be written; also called before hours of work.

    Arguments:
        need: bytes to be written.
        source: folder of the original model, which must not be replaced.

    Returns:
        The folder with links resolved.

    Raises:
        ArtefactError: it cannot be written; the message says why.
    """
    target = Path(folder).expanduser().resolve()
    here = Path.cwd()
    if target == here or target in here.parents:
        where = "the current folder" if target == here else "a parent of the current folder"
        raise ArtefactError(f"{str(target)!r} is {where}; name a new folder")
    if source and _is_same(target, Path(str(source)).expanduser()):
        raise ArtefactError(f"{str(target)!r} is the model itself; name another folder for the result")
    try:
        is_file = target.exists() and not target.is_dir()
    except OSError as error:  # a name that is too long
        raise ArtefactError(f"cannot write {str(target)!r}: {error.strerror}") from error
    if is_file:
        raise ArtefactError(f"{str(target)!r} is a file; give a folder")
    if target.is_dir():
        if os.path.ismount(target):
            raise ArtefactError(f"{str(target)!r} is a mount point and cannot be replaced; name a folder inside it")
        if any(target.iterdir()):
            if not overwrite:
                raise ArtefactError(
                    f"{str(target)!r} exists and is not empty; pass overwrite (--overwrite) or name another folder"
                )
            check_replaceable(target)
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _beside(target):
            pass
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ArtefactError(f"cannot write into {str(parent)!r}: {error.strerror or error}") from error
    if free < need * 1.05:
        raise ArtefactError(f"{str(parent)!r} has {free / 1e9:.2f} GB free, but the model needs {need / 1e9:.2f} GB")
    return target


def _is_same(target: Path, source: Path) -> bool:
    """Whether ``source`` is the same folder as ``target``, or a file in it."""
    try:
        return target.samefile(source) or (source.is_file() and target.samefile(source.parent))
    except OSError:  # one of them does not exist, or is the id of a model on a hub
        return False


def check_replaceable(target: Path) -> None:
    """Check that a folder holds an earlier result and nothing else.

    Raises:
        ArtefactError: the folder is not a result, or holds other files.
    """
    found = files_in(target)
    own = _listed(target)
    if own is None:
        raise ArtefactError(
            f"{str(target)!r} is not an earlier result, so it is not replaced: it has no {RECIPE} that lists its "
            f"files, and holds {_some(found)}; name another folder, or remove this one yourself"
        )
    if foreign := found - own:
        raise ArtefactError(
            f"{str(target)!r} holds files that are not part of the earlier result and would be lost: "
            f"{_some(foreign)}; move them away, or name another folder"
        )


def files_in(folder: Path) -> set[str]:
    """Relative names of all files, links and empty folders below a folder."""
    found: set[str] = set()
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found |= {Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)}
        if not folders and not files and Path(place) != folder:
            found.add(Path(place).relative_to(folder).as_posix())
    return found


def _listed(target: Path) -> set[str] | None:
    """The files that a result's recipe lists; None if the folder is not a result."""
    try:
        recipe = yaml.safe_load((target / RECIPE).read_text("utf-8"))
        return {str(name) for name in recipe["files"]}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _some(names: set[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def clear_leftovers(target: Path) -> None:
    """Delete the folders that a killed run has left beside ``target``, and restore the result that it had set aside.

    The caller holds the lock of ``target``, so that none of them is in use.
    """
    if len(target.name) > _PREFIX:  # other results may have the same beginning
        return
    for folder in target.parent.glob(f".{glob.escape(target.name + _MARK)}*"):
        if folder.suffix != ".old":
            shutil.rmtree(folder, ignore_errors=True)
        elif not target.exists():  # otherwise either may be the complete one, and both stay
            os.replace(folder, target)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new temporary folder beside ``target``, deleted at the end unless it was moved."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name[:_PREFIX]}{_MARK}", dir=target.parent))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that replaces it if the block succeeds, and is deleted if it fails."""
    copied = done = False
    old = None
    try:
        with _beside(target) as aside:
            old = aside.with_name(aside.name + ".old")
            yield aside
            settle(aside)
            if target.exists() and not any(target.iterdir()):
                target.rmdir()
            if target.exists():
                check_replaceable(target)  # again: files may have been added during the run
                copied = _set_aside(target, old)
                shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
            done = True
            sync(target.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, ArtefactError):
            raise
        number = getattr(error, "errno", None)
        reason = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise ArtefactError(f"cannot write {str(target)!r}: {reason}; nothing was written") from error
    finally:
        if old is not None and old.exists():
            if not done and (copied or not target.exists()):
                shutil.rmtree(target, ignore_errors=True)
                os.replace(old, target)
            shutil.rmtree(old, ignore_errors=True)


def _set_aside(target: Path, old: Path) -> bool:
    """Move a folder, or copy it if it cannot be moved: a folder from the image of a container, for example.

    Returns:
        Whether it was copied.
    """
    try:
        os.replace(target, old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(target, old, symlinks=True)
        return True
    return False


def work_folder(target: Path) -> Path:
    """Create the folder beside ``target`` in which a run keeps its results.

    Raises:
        ArtefactError: the folder cannot be created, or holds files that no run has written.
    """
    work = target.with_name(target.name + ".work")
    try:
        work.mkdir(parents=True, exist_ok=True)
        found = files_in(work)
    except OSError as error:
        raise ArtefactError(f"cannot write into {str(work)!r}: {error.strerror or error}") from error
    if found and LOCK not in found:
        raise ArtefactError(
            f"{str(work)!r} is the work folder of a run into {target.name!r}, but holds files that no run has written: "
            f"{_some(found)}; move them away, or name another folder"
        )
    return work

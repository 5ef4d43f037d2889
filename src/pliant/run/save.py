"""Write the whole artefact: weights, tokenizer, recipe, report and card. It appears complete, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from pliant.checkpoint.load import sync, tokenizer_of
from pliant.checkpoint.paged import save_paged
from pliant.checkpoint.quantized import is_packed
from pliant.checkpoint.schema import write
from pliant.errors import ArtefactError
from pliant.figures import to_json
from pliant.pages import pages_of
from pliant.run.card import card, versions
from pliant.run.report import page

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",  # in the place of a tokenizer: how images are scaled
)


def save(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    report: dict[str, Any] | None = None,
    extra: dict[str, Path] | None = None,
    overwrite: bool = False,
    weigh: Callable[[Path], None] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save a model with everything that belongs to it.

    Arguments:
        folder: must not exist yet, unless ``overwrite``.
        tokenizer: written beside the model; when left out, the files of the source folder are copied unchanged.
        report: what ``pliant compress`` measured; written as ``report.json`` and ``report.html``.
        extra: files to put in, by name.
        weigh: called with the folder that the model and its tokenizer are in, before the report is written.
        max_shard_size: as in transformers; within a memory limit an eighth of it.

    Raises:
        ArtefactError: the folder exists, cannot be written, or the disk is full. Nothing is left behind then.
    """
    target = Path(folder).resolve()
    check_target(target, overwrite, need=sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    if not is_packed(model):  # packing comes last: its shapes were written before
        write(model)
    history = getattr(model, "pliant_history", [])
    with written_aside(target) as aside:
        if (pages := pages_of(model)) is None:
            model.save_pretrained(aside, max_shard_size=max_shard_size)
        else:
            save_paged(model, pages, aside, shard=pages.limit // 8)
        _save_tokenizer(model, tokenizer, aside)
        if weigh is not None:
            weigh(aside)
        recipe = {
            "recipe": 1,
            "base_model": model.name_or_path,
            "steps": [_short(step) for step in history],
            **versions(),
        }
        (aside / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
        (aside / "README.md").write_text(card(model, history, report), "utf-8")
        if report is not None:
            (aside / "report.json").write_text(to_json(report) + "\n", "utf-8")
            (aside / "report.html").write_text(page(report), "utf-8")
        for name, path in (extra or {}).items():
            shutil.copyfile(path, aside / name)
    return target


def check_target(target: Path, overwrite: bool, need: int = 0) -> None:
    """Can ``target`` be written? Asked before hours of work, too.

    Raises:
        ArtefactError: saying why not.
    """
    if target.resolve() == Path.cwd():
        raise ArtefactError(f"{str(target)!r} is the folder you are in; name one that can be made anew")
    if target.exists() and not target.is_dir():
        raise ArtefactError(f"{str(target)!r} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ArtefactError(
            f"{str(target)!r} exists and is not empty; pass overwrite (--overwrite) or name another folder"
        )
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ArtefactError(f"cannot write into {str(parent)!r}: {error.strerror or error}") from error
    free = shutil.disk_usage(parent).free
    if free < need * 1.05:
        raise ArtefactError(f"{str(parent)!r} has {free / 1e9:.2f} GB free, the model needs {need / 1e9:.2f} GB")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends well and vanishes when it does not."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    old = aside.with_name(aside.name + ".old")
    try:
        aside.chmod(0o755)
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
        sync(target.absolute().parent)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        reason = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise ArtefactError(f"cannot write {str(target)!r}: {reason}; nothing was written") from error
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _save_tokenizer(model: Any, tokenizer: Any, aside: Path) -> None:
    source = Path(str(model.name_or_path))
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    elif not model.name_or_path:
        return  # made here, not loaded from anywhere
    elif source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, aside / name)
    elif model.main_input_name != "pixel_values":
        tokenizer_of(model).save_pretrained(aside)
    else:
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        except (ImportError, OSError, ValueError):  # it has none, or one that needs packages which are not here
            return
        processor.save_pretrained(aside)


def _short(step: dict[str, Any]) -> dict[str, Any]:
    """What a recipe needs of a step's record: enough to repeat it, and what came out."""
    keys = ("settings", "data", "parameters_before", "parameters_after", "ratio")
    return {key: step[key] for key in keys if key in step}

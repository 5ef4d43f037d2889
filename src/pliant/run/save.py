"""Write the whole artefact: weights, tokenizer, recipe, report and card. The folder appears complete, or not at all."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from pliant.checkpoint.folder import companions, skipped_of_a_hub
from pliant.checkpoint.load import tokenizer_of
from pliant.checkpoint.packed_bytes import is_packed
from pliant.checkpoint.paged import save_paged
from pliant.checkpoint.per_layer_config import write
from pliant.compat.hub_revision import revision_of
from pliant.errors import ArchitectureError, ArtefactError, MemoryLimitError, PliantError
from pliant.formatting import parse_bytes
from pliant.pages import pages_of
from pliant.run.card import card, versions
from pliant.run.report import page
from pliant.run.target import RECIPE, RECIPE_VERSION, check_target, files_in, local, written_aside
from pliant.strict_json import to_json

_REPEATED = ("settings", "data", "parameters_before", "parameters_after", "ratio")
"""The part of a step's record that a recipe keeps: enough to repeat the step, and its result."""


def save(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    report: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
    extra: dict[str, Path] | None = None,
    overwrite: bool = False,
    weigh: Callable[[Path], None] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save a model with everything that belongs to it.

    Arguments:
        folder: must not exist yet, unless ``overwrite``.
        tokenizer: written beside the model. By default all files of the source folder but the weights are copied
            unchanged.
        report: the report of ``pliant compress``; written as ``report.json`` and ``report.html``.
        inputs: data and measurements of the run, for the recipe.
        extra: files to add: name -> path to copy from.
        weigh: called with the temporary folder of the written model and tokenizer, before the report is written.
        overwrite: replace an earlier result. A folder that holds anything else is refused.
        max_shard_size: as in transformers; within a memory limit at most an eighth of it.

    Raises:
        ArtefactError: the folder exists or cannot be written, the disk is full, or the model cannot be saved. Nothing
            is left behind.
    """
    if not hasattr(model, "save_pretrained"):
        raise ArtefactError(
            f"pliant.save writes transformers models, not a {type(model).__name__}; save its weights with "
            "torch.save(module.state_dict(), path)"
        )
    need = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    target = check_target(folder, overwrite, need, source=model.name_or_path)
    try:
        shard = parse_bytes(str(max_shard_size))
    except MemoryLimitError as error:
        raise ArtefactError(f"max_shard_size: {error}") from None
    check_savable(model, tokenizer)
    if not is_packed(model):  # packing comes last: its shapes were written before
        _describe(model)
    history = getattr(model, "pliant_history", [])
    with written_aside(target) as aside:
        save_model(model, aside, shard)
        _save_beside(model, tokenizer, aside)
        if weigh is not None:
            weigh(aside)
        (aside / "README.md").write_text(card(model, history, report), "utf-8")
        if report is not None:
            (aside / "report.json").write_text(to_json(report) + "\n", "utf-8")
            (aside / "report.html").write_text(page(report), "utf-8")
        for name, path in (extra or {}).items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, aside / name)
        recipe = {
            "recipe": RECIPE_VERSION,
            "base_model": local(model.name_or_path) if model.name_or_path else "",
            "steps": [{key: step[key] for key in _REPEATED if key in step} for step in history],
            **(inputs or {}),
            **versions(),
            "files": sorted({*files_in(aside), RECIPE}),
        }
        (aside / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
    return target


def _describe(model: Any) -> None:
    """Write the shapes of a cut model into its config. Only a model that was cut needs an architecture file."""
    try:
        write(model)
    except ArchitectureError:
        with torch.device("meta"):
            whole = type(model)(copy.deepcopy(model.config))
        if _shapes_of(model) != _shapes_of(whole):
            raise


def _shapes_of(model: Any) -> dict[str, Any]:
    """Tensor name -> shape, for all tensors of a model."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_savable(model: Any, tokenizer: Any = None) -> None:
    """Check before hours of work that a model can be saved: write everything but its weights into a temporary folder.

    Raises:
        ArtefactError: the model cannot be saved; the message says why.
    """
    if getattr(model, "peft_config", None):
        raise ArtefactError(
            "this model has a peft adapter, and transformers would save the adapter alone; call merge_and_unload() "
            "first"
        )
    try:
        with tempfile.TemporaryDirectory() as place:
            _save_settings(model, Path(place))
            _save_beside(model, tokenizer, Path(place))
    except PliantError:
        raise
    except OSError as error:
        raise ArtefactError(f"cannot save this model: {error}") from error


def save_model(model: Any, aside: Path, shard: int) -> None:
    """Write weights and settings of a model into a folder, in files of at most ``shard`` bytes."""
    if (pages := pages_of(model)) is None:
        with _generation_config_kept(model, aside), _refused():
            model.save_pretrained(aside, max_shard_size=shard)
    else:
        _save_settings(model, aside)
        save_paged(model, pages, aside, shard=min(shard, pages.limit // 8))


def _save_settings(model: Any, aside: Path) -> None:
    """Write the files that ``save_pretrained`` writes besides the weights."""
    with _generation_config_kept(model, aside), _refused():
        model.save_pretrained(aside, state_dict={})


@contextmanager
def _refused() -> Iterator[None]:
    """While inside, errors of transformers about a model that it cannot save become ArtefactError."""
    try:
        yield
    except OSError:
        raise  # a disk error, not the model's
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtefactError(f"transformers cannot save this model: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def _generation_config_kept(model: Any, aside: Path) -> Iterator[None]:
    """While inside, ``save_pretrained`` writes a default generation config; afterwards the model's own replaces it
    unchanged.

    Many models have one that transformers loads but refuses to save, for example with a temperature and
    ``do_sample=false``.
    """
    own = getattr(model, "generation_config", None)
    if own is None or not model.can_generate():
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    own.to_json_file(aside / "generation_config.json", keys_to_pop=["compile_config"])


def _save_beside(model: Any, tokenizer: Any, aside: Path) -> None:
    """Write the tokenizer or processor, and the other files of a model besides its weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
        return
    if not model.name_or_path:
        return  # not loaded from a folder or hub
    source = Path(str(model.name_or_path))
    if source.is_dir():
        _copy(source, aside)
        return
    if model.main_input_name != "pixel_values":
        tokenizer_of(model).save_pretrained(aside)
    else:
        from transformers import AutoImageProcessor

        # a model may have no image processor, or one that needs packages which are not installed
        with suppress(ImportError, OSError, ValueError):
            AutoImageProcessor.from_pretrained(model.name_or_path).save_pretrained(aside)
    if not source.is_file():
        # not cached, and no hub: the files that transformers reads are written already
        with suppress(OSError, ValueError):
            _copy(_of_a_hub(model), aside)


def _of_a_hub(model: Any) -> Path:
    """A local folder with the files of a model's hub repository except its weights."""
    from huggingface_hub import snapshot_download

    place = {"repo_id": model.name_or_path, "revision": revision_of(model)}
    try:
        return Path(snapshot_download(**place, ignore_patterns=skipped_of_a_hub()))
    except (OSError, ValueError):  # the hub does not answer
        return Path(snapshot_download(**place, local_files_only=True))


def _copy(source: Path, aside: Path) -> None:
    """Copy the companion files of a model's weights unchanged; links are followed."""
    for name in companions(source):
        if not (aside / name).exists():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, aside / name)

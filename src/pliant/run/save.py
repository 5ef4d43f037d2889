"""Write the whole artefact: weights, tokenizer, recipe, report and card. It appears complete, or not at all."""

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
from pliant.checkpoint.paged import save_paged
from pliant.checkpoint.quantized import is_packed
from pliant.checkpoint.schema import write
from pliant.errors import ArchitectureError, ArtefactError, MemoryLimitError, PliantError
from pliant.figures import to_json
from pliant.pages import pages_of
from pliant.progress import bytes_of
from pliant.run.card import card, versions
from pliant.run.report import page
from pliant.run.target import RECIPE, check_target, files_in, written_aside


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
        tokenizer: written beside the model; when left out, what the source folder holds beside weights is copied unchanged.
        report: what ``pliant compress`` measured; written as ``report.json`` and ``report.html``.
        extra: files to put in, by name.
        weigh: called with the folder that the model and its tokenizer are in, before the report is written.
        overwrite: replace an earlier result. A folder that holds anything else is refused.
        max_shard_size: as in transformers; within a memory limit at most an eighth of it.

    Raises:
        ArtefactError: the folder exists, cannot be written, or the disk is full; or the model cannot be saved. Nothing is left
            behind then.
    """
    need = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    target = check_target(folder, overwrite, need, source=model.name_or_path)
    shard = _bytes(max_shard_size)
    check_savable(model, tokenizer)
    if not is_packed(model):  # packing comes last: its shapes were written before
        _describe(model)
    history = getattr(model, "pliant_history", [])
    with written_aside(target) as aside:
        _save_model(model, aside, shard)
        _save_beside(model, tokenizer, aside)
        if weigh is not None:
            weigh(aside)
        (aside / "README.md").write_text(card(model, history, report), "utf-8")
        if report is not None:
            (aside / "report.json").write_text(to_json(report) + "\n", "utf-8")
            (aside / "report.html").write_text(page(report), "utf-8")
        for name, path in (extra or {}).items():
            shutil.copyfile(path, aside / name)
        recipe = {
            "recipe": 1,
            "base_model": model.name_or_path,
            "steps": [_short(step) for step in history],
            **versions(),
            "files": sorted({*files_in(aside), RECIPE}),
        }
        (aside / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
    return target


def _bytes(max_shard_size: int | str) -> int:
    """Raises:
    ArtefactError: it is no amount.
    """
    try:
        return bytes_of(str(max_shard_size))
    except MemoryLimitError as error:
        raise ArtefactError(f"max_shard_size: {error}") from None


def _describe(model: Any) -> None:
    """Make a model's config say what its tensors are, as it does already where nothing was cut.

    Raises:
        ArchitectureError: something was, and no architecture file says what.
    """
    try:
        write(model)
    except ArchitectureError:
        with torch.device("meta"):
            whole = type(model)(copy.deepcopy(model.config))
        if _shapes_of(model) != _shapes_of(whole):
            raise


def _shapes_of(model: Any) -> dict[str, Any]:
    """Shape of every tensor of a model, by its name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_savable(model: Any, tokenizer: Any = None) -> None:
    """Can a model be saved? Asked before hours of work: all but its weights is written into a folder that goes again.

    Raises:
        ArtefactError: saying why not.
    """
    if getattr(model, "peft_config", None):
        raise ArtefactError(
            "this model has a peft adapter, of which alone transformers would save the weights; call merge_and_unload() first"
        )
    try:
        with tempfile.TemporaryDirectory() as place:
            _save_settings(model, Path(place))
            _save_beside(model, tokenizer, Path(place))
    except PliantError:
        raise
    except OSError as error:
        raise ArtefactError(f"cannot save this model: {error}") from error


def _save_model(model: Any, aside: Path, shard: int) -> None:
    if (pages := pages_of(model)) is None:
        with _generation_config_kept(model, aside), _refused():
            model.save_pretrained(aside, max_shard_size=shard)
    else:
        _save_settings(model, aside)
        save_paged(model, pages, aside, shard=min(shard, pages.limit // 8))


def _save_settings(model: Any, aside: Path) -> None:
    """What ``save_pretrained`` writes beside weights."""
    with _generation_config_kept(model, aside), _refused():
        model.save_pretrained(aside, state_dict={})


@contextmanager
def _refused() -> Iterator[None]:
    """What transformers has to say about a model that it does not save, as an error of ours."""
    try:
        yield
    except OSError:
        raise  # of the disk
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtefactError(f"transformers cannot save this model: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def _generation_config_kept(model: Any, aside: Path) -> Iterator[None]:
    """While inside, ``save_pretrained`` writes a generation config of defaults; then the model's own is written over it, as it is.

    Many models come with one that transformers loads and refuses to save, such as a temperature beside ``do_sample=false``.
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
    """The tokenizer or processor, and whatever else belongs to a model beside its weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
        return
    if not model.name_or_path:
        return  # made here, not loaded from anywhere
    source = Path(str(model.name_or_path))
    if source.is_dir():
        _copy(source, aside)
        return
    if model.main_input_name != "pixel_values":
        tokenizer_of(model).save_pretrained(aside)
    else:
        from transformers import AutoImageProcessor

        # without those that it has none of, or that need packages which are not here
        with suppress(ImportError, OSError, ValueError):
            AutoImageProcessor.from_pretrained(model.name_or_path).save_pretrained(aside)
    if not source.is_file():
        with suppress(OSError, ValueError):  # nothing of it is here: what transformers reads has been written
            _copy(_of_a_hub(model), aside)


def _of_a_hub(model: Any) -> Path:
    """A folder with the files of a model's repository, without its weights."""
    from huggingface_hub import snapshot_download

    place = {"repo_id": model.name_or_path, "revision": getattr(model.config, "_commit_hash", None)}
    try:
        return Path(snapshot_download(**place, ignore_patterns=skipped_of_a_hub()))
    except (OSError, ValueError):  # a hub that does not answer
        return Path(snapshot_download(**place, local_files_only=True))


def _copy(source: Path, aside: Path) -> None:
    """The companions of a model's weights, as they are; links become what they point to."""
    for name in companions(source):
        if not (aside / name).exists():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, aside / name)


def _short(step: dict[str, Any]) -> dict[str, Any]:
    """What a recipe needs of a step's record: enough to repeat it, and what came out."""
    keys = ("settings", "data", "parameters_before", "parameters_after", "ratio")
    return {key: step[key] for key in keys if key in step}

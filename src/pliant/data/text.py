"""Text for calibration and perplexity: rows of a file, tokenised once and cut into windows."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from pliant.digest import digest, json_digest
from pliant.errors import DataError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Text:
    """Rows of text and where they came from. Made by :func:`text`.

    Attributes:
        source: the name of the file, for messages and reports.
        path: the file; None for a list.
        column: the key of the text in JSON rows.
    """

    rows: tuple[str, ...]
    source: str
    path: str | None = field(default=None, compare=False)
    column: str = field(default="text", compare=False)

    @property
    def digest(self) -> str:
        """Hash of the rows, for recipes."""
        return digest(["\0".join(self.rows)])

    def token_digest(self, tokenizer: Any) -> str:
        """Hash of the first rows as token ids, which differs if another tokenizer splits them differently."""
        ids = [list(tokenizer(row, verbose=False)["input_ids"]) for row in self.rows[:32]]
        return json_digest(ids)

    def sample(self, count: int, seed: int) -> Text:
        """``count`` rows drawn without replacement, or all of them in random order if there are fewer."""
        drawn = random.Random(seed).sample(range(len(self.rows)), min(count, len(self.rows)))
        return Text(tuple(self.rows[i] for i in drawn), self.source)

    def split(self, share: float) -> tuple[Text, Text]:
        """Split into remaining and held-out rows: every n-th row is held out, so that both have the same mix."""
        rest, held_out = set_apart(self.rows, share, self.source)
        return Text(rest, self.source), Text(held_out, f"{self.source} (held out)")

    def windows(self, tokenizer: Any, seqlen: int, limit: int | None = None) -> torch.Tensor:
        """Join the rows by empty lines, tokenise once, and cut into windows that do not overlap; the tail is dropped.

        Arguments:
            tokenizer: a transformers tokenizer; it adds its special tokens once, at the start.
            seqlen: tokens in a window.
            limit: maximum number of windows.

        Returns:
            Token ids, shape ``(windows, seqlen)``.

        Raises:
            DataError: the text is shorter than one window.
        """
        if seqlen < 2:
            raise DataError(f"a window must have at least 2 tokens; not {seqlen}")
        if limit is not None and limit < 1:
            raise DataError(f"the limit of windows must be at least 1; not {limit}")
        joined = "\n\n".join(self.rows)
        ids = tokenizer(joined, return_tensors="pt", verbose=False)["input_ids"][0]
        count = len(ids) // seqlen
        if limit is not None:
            count = min(count, limit)
        if count == 0:
            raise DataError(
                f"{self.source}: {len(self.rows)} row(s) give {len(ids)} tokens, one window needs {seqlen}; give more "
                "text or a smaller seqlen"
            )
        return ids[: count * seqlen].view(count, seqlen)


def text(source: str | Path | Iterable[str], *, column: str = "text") -> Text:
    """Text from a file or a list.

    Arguments:
        source: a ``.txt`` file (rows are paragraphs, separated by empty lines), a ``.jsonl`` or ``.json`` file (rows
            are objects), each optionally gzipped (``.gz``), or an iterable of strings.
        column: for JSON rows, the key of the text; ``instruction``, ``input`` and ``output`` of a row without it are
            joined.

    Raises:
        DataError: missing file, wrong form, or no text in it.
    """
    if not isinstance(source, str | Path):
        rows, name, file = list(source), "a list", None
    else:
        path = Path(source).expanduser()
        name, file = path.name, str(path.resolve())
        raw = read(path)
        is_json = unpacked(path).suffix.lower() in (".json", ".jsonl")
        rows = _json_rows(raw, path, column) if is_json else re.split(r"\n\s*\n", raw)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, str):
            raise DataError(f"{name}, row {number}: every row must be a string, not {type(row).__name__}")
        check_unicode(row, f"{name}, row {number}")
    rows = tuple(stripped for row in rows if (stripped := row.strip()))
    if not rows:
        raise DataError(f"{name} holds no text")
    return Text(rows, name, file, column)


def set_apart(rows: tuple[Row, ...], share: float, source: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows without every n-th of them, and those that are held out.

    Raises:
        DataError: a share outside 0 to 0.5, or too few rows.
    """
    if not 0 < share <= 0.5:
        raise DataError(f"the share to hold out must be above 0 and at most 0.5; not {share}")
    every = round(1 / share)
    if len(rows) < every:
        raise DataError(f"{source} has {len(rows)} row(s): too few to hold {share:.0%} of them out")
    return tuple(row for i, row in enumerate(rows) if i % every), rows[::every]


def unpacked(path: Path) -> Path:
    """The path without ``.gz``; the remaining suffix says what the file holds."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def read(path: Path) -> str:
    """Read a text file, gzipped if its name ends in ``.gz``.

    Raises:
        DataError: the file is missing, a folder, not UTF-8, or not a complete gzip file.
    """
    try:
        with (open if unpacked(path) == path else gzip.open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"no file at {str(path)!r}; give a .txt, .jsonl or .json file") from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a folder; give a .txt, .jsonl or .json file in it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is not a complete gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)[:80]!r}: {error.strerror or error}") from None


def check_unicode(text: str, where: str) -> None:
    """Refuse lone surrogates, which JSON can express and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(
            f"{where}: {half} is half of a character (a lone surrogate); repair or remove the row"
        ) from None


def json_objects(raw: str, path: Path) -> list[dict[str, Any]]:
    """The objects of a ``.jsonl`` file (one a line) or a ``.json`` file (a list)."""
    objects: list[Any] = []
    if unpacked(path).suffix.lower() == ".json":
        try:
            whole = json.loads(raw)
        except json.JSONDecodeError as error:
            raise DataError(f"{str(path)!r} is not JSON: {error}") from None
        objects = whole if isinstance(whole, list) else [whole]
    else:
        for number, line in enumerate(raw.split("\n"), 1):  # not splitlines: U+2028 is legal inside a JSON string
            if line.strip():
                try:
                    objects.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{str(path)!r}, line {number}: not JSON: {error.msg}") from None
    escaped = "\\ud" in raw.lower()  # lone surrogates come in no other way
    for number, item in enumerate(objects, 1):
        if not isinstance(item, dict):
            raise DataError(f"{str(path)!r}, row {number}: an object is expected, not {type(item).__name__}")
        if escaped:
            check_unicode(json.dumps(item, ensure_ascii=False), f"{str(path)!r}, row {number}")
    if not objects:
        raise DataError(f"{str(path)!r} holds no rows")
    return objects


def _json_rows(raw: str, path: Path, column: str) -> list[str]:
    rows = []
    for number, item in enumerate(json_objects(raw, path), 1):
        if column in item:
            rows.append(item[column])
        elif "instruction" in item and "output" in item:
            parts = [item["instruction"], item.get("input") or "", item["output"]]
            strings = all(isinstance(part, str) for part in parts)
            rows.append("\n".join(part for part in parts if part) if strings else parts)
        else:
            raise DataError(
                f"{str(path)!r}, row {number}: no key {column!r}; it has {', '.join(item)}. Name the key of the text "
                "with column="
            )
    return rows

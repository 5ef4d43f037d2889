"""Text for calibration and perplexity: rows from a file, tokenised once, cut into windows."""

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
        source: the name of the file, for people.
        path: the file, None for a list.
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
        """Hash of the first rows as token ids: tells tokenizers apart where it matters."""
        ids = [list(tokenizer(row, verbose=False)["input_ids"]) for row in self.rows[:32]]
        return json_digest(ids)

    def sample(self, count: int, seed: int) -> Text:
        """``count`` rows drawn without replacement, or all of them in a drawn order when there are fewer."""
        drawn = random.Random(seed).sample(range(len(self.rows)), min(count, len(self.rows)))
        return Text(tuple(self.rows[i] for i in drawn), self.source)

    def split(self, share: float) -> tuple[Text, Text]:
        """These rows and a share of them held out: every n-th row, so that both have the same mix."""
        kept, apart = set_apart(self.rows, share, self.source)
        return Text(kept, self.source), Text(apart, f"{self.source} (held out)")

    def windows(self, tokenizer: Any, seqlen: int, limit: int | None = None) -> torch.Tensor:
        """The rows joined by an empty line, tokenised once, cut into windows that do not overlap; the tail is dropped.

        Arguments:
            tokenizer: a transformers tokenizer; it adds its special tokens once, at the start.
            seqlen: tokens in a window.
            limit: windows at most.

        Returns:
            Token ids, shape ``(windows, seqlen)``.

        Raises:
            DataError: when the text is shorter than one window.
        """
        if seqlen < 2:
            raise DataError(f"a window needs at least 2 tokens to predict one from another, not {seqlen}")
        if limit is not None and limit < 1:
            raise DataError(f"a limit of {limit} windows leaves nothing to measure; it must be at least 1")
        joined = "\n\n".join(self.rows)
        ids = tokenizer(joined, return_tensors="pt", verbose=False)["input_ids"][0]
        count = len(ids) // seqlen
        if limit is not None:
            count = min(count, limit)
        if count == 0:
            raise DataError(
                f"{self.source}: {len(self.rows)} row(s) give {len(ids)} tokens, one window needs {seqlen}; give more text "
                "or a smaller seqlen"
            )
        return ids[: count * seqlen].view(count, seqlen)


def text(source: str | Path | Iterable[str], *, column: str = "text") -> Text:
    """Text from a file or a list.

    Arguments:
        source: a ``.txt`` file (rows are paragraphs, separated by empty lines), a ``.jsonl`` or ``.json`` file (rows are
            objects), any of them with ``.gz`` behind it, or an iterable of strings.
        column: for JSON rows, the key that holds the text; rows of ``instruction``/``input``/``output`` are joined.

    Raises:
        DataError: missing file, wrong form, or no text in it.
    """
    if not isinstance(source, str | Path):
        rows, name, file = list(source), "a list", None
    else:
        path = Path(source)
        name, file = path.name, str(path.resolve())
        raw = read(path)
        is_json = unpacked(path).suffix.lower() in (".json", ".jsonl")
        rows = _json_rows(raw, path, column) if is_json else re.split(r"\n\s*\n", raw)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, str):
            raise DataError(f"{name}, row {number}: every row must be a string, not {type(row).__name__}")
        check_unicode(row, f"{name}, row {number}")
    rows = [row.strip() for row in rows]
    kept = tuple(row for row in rows if row)
    if not kept:
        raise DataError(f"{name} holds no text")
    return Text(kept, name, file, column)


def set_apart(rows: tuple[Row, ...], share: float, source: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows without every n-th of them, and those.

    Raises:
        DataError: a share outside 0 to 0.5, or too few rows.
    """
    if not 0 < share <= 0.5:
        raise DataError(f"the share held out must be above 0 and at most 0.5, it is {share}")
    every = round(1 / share)
    if len(rows) < every:
        raise DataError(f"{source} has {len(rows)} row(s): too few to hold {share:.0%} of them out")
    return tuple(row for i, row in enumerate(rows) if i % every), rows[::every]


def unpacked(path: Path) -> Path:
    """What the file would be called without its ``.gz``; the other ending says what is in it."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def read(path: Path) -> str:
    """A text file, gzipped when its name ends in ``.gz``, as a string, with the usual faults named."""
    try:
        with (open if unpacked(path) == path else gzip.open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}") from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a folder; give a .txt, .jsonl or .json file in it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)[:80]!r}: {error.strerror or error}") from None


def check_unicode(text: str, where: str) -> None:
    """Refuse half characters, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(f"{where}: {half} is half of a character; whatever wrote it cut one in two") from None


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
    escaped = "\\ud" in raw.lower()  # half characters come in no other way
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
                f"{str(path)!r}, row {number}: no key {column!r}; it has {', '.join(item)}. Name the right one with column="
            )
    return rows

"""Training examples: plain text, prompts with completions, or conversations, from files, a hub or a list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.data.text import Text, check_unicode, json_objects, read, set_apart
from pliant.data.tokenize_examples import Encoded, encode
from pliant.digest import digest
from pliant.errors import DataError

_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_MORE = ", paired with an input that provides further context"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a name, or owner/name
_FORMS = "text; prompt and completion; instruction, input and output; messages"


@dataclass(frozen=True)
class Example:
    """One row in one of three forms; the attributes of the other forms are None.

    Attributes:
        text: plain text, of which every token is trained on; such rows are packed into windows.
        prompt: text before the completion, not trained on.
        completion: text after the prompt, trained on.
        messages: a conversation as ``{"role", "content"}`` objects; the assistant's turns are trained on.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Examples:
    """Rows to train on and where they came from. Made by :func:`examples`."""

    rows: tuple[Example, ...]
    source: str

    @property
    def digest(self) -> str:
        """Hash of the rows, for recipes."""
        return digest(json.dumps([row.text, row.prompt, row.completion, row.messages]) for row in self.rows)

    def split(self, share: float) -> tuple[Examples, Examples]:
        """Split into remaining and held-out rows: every n-th row is held out, so that both have the same mix.

        Raises:
            DataError: a share outside 0 to 0.5, or too few rows.
        """
        rest, held_out = set_apart(self.rows, share, self.source)
        return Examples(rest, self.source), Examples(held_out, f"{self.source} (held out)")

    def encode(self, tokenizer: Any, seqlen: int) -> Encoded:
        """Token ids and labels. Plain text is packed into windows of ``seqlen`` tokens; any other row is a sequence of
        its own, cut off after ``seqlen`` tokens.

        Arguments:
            tokenizer: a fast transformers tokenizer; conversations need its chat template.

        Raises:
            DataError: too little text for one window, no token to train on, or a conversation that cannot be rendered.
        """
        return encode(self.rows, self.source, tokenizer, seqlen)


def examples(
    source: str | Path | Text | Iterable[str | Mapping[str, Any]],
    *,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Examples:
    """Examples from a file, a data set on a hub, or a list.

    A row is a string or an object with the keys of one of these forms, the first that fits: ``messages``, put into the
    chat template of the tokenizer; ``instruction``, ``output`` and optionally ``input``, put into the Alpaca template;
    ``prompt`` and ``completion`` (or ``response``); ``text``. Completions, outputs and the assistant's turns are
    trained on, the rest is not.

    Arguments:
        source: a ``.txt`` (rows are paragraphs), ``.jsonl`` or ``.json`` file, optionally gzipped (``.gz``); a folder
            in the layout of a hub or the id of a data set on one (owner/name; both need the ``train`` extra);
            ``pliant.text(…)``; or an iterable of rows.
        column: the key of plain text, which takes precedence over every form. Default: ``text``, if no other form fits.
        split: the part to read of a data set on a hub; ``train[:1000]`` reads its first rows.
        limit: maximum number of rows.

    Raises:
        DataError: missing file, wrong form, or no rows in it.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit of rows must be at least 1; not {limit}")
    if isinstance(source, Text):
        name, raw = source.source, list(source.rows)
    elif isinstance(source, str | Path):
        name, raw = Path(source).name, _raw_rows(source, split)
    else:
        name, raw = "a list", list(source)
    rows = [_example(row, column, f"{name}, row {number}") for number, row in enumerate(raw[:limit], 1)]
    filled = tuple(row for row in rows if row.text is None or row.text.strip())
    if not filled:
        raise DataError(f"{name} holds no rows")
    return Examples(filled, name)


def _raw_rows(source: str | Path, split: str) -> list[Any]:
    """The rows of a file, a folder or a hub id, as strings and objects."""
    path = Path(source).expanduser()
    plain = Path(str(path).removesuffix(".gz"))
    kind = plain.suffix.lower()
    if kind in (".json", ".jsonl"):
        return json_objects(read(path), plain)
    if kind == ".txt":
        return re.split(r"\n\s*\n", read(path))
    if path.is_dir() or (not path.exists() and _HUB_ID.fullmatch(str(source))):
        return _from_hub(str(source), split)
    raise DataError(
        f"{str(source)!r} is not training data; give a .txt, .jsonl or .json file (also .gz), a folder in hub layout, "
        "or the id of a data set on a hub (owner/name)"
    )


def _from_hub(source: str, split: str) -> list[Any]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"loading the data set {source!r} needs datasets: pip install 'pliant[train]'") from None
    try:
        return list(datasets.load_dataset(source, split=split))
    except Exception as error:  # it raises many kinds, its own and those of the file formats
        raise DataError(f"cannot load {source!r}, split {split!r}: {str(error).splitlines()[0]}") from error


def _example(row: Any, column: str | None, where: str) -> Example:
    if isinstance(row, str):
        check_unicode(row, where)
        return Example(text=row.strip())
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a string or an object is expected, not {type(row).__name__}")
    if column is not None and row.get(column) is not None:
        return Example(text=_string(row, column, where).strip())
    if row.get("messages") is not None:
        return Example(messages=_messages(row["messages"], where))
    if "instruction" in row and "output" in row:
        context = _string(row, "input", where) if row.get("input") else ""
        prompt = _ALPACA.format(
            more=_MORE if context else "",
            instruction=_string(row, "instruction", where),
            input=f"### Input:\n{context}\n\n" if context else "",
        )
        return Example(prompt=prompt, completion=_string(row, "output", where))
    answer = "completion" if "completion" in row else "response"
    if "prompt" in row and answer in row:
        return Example(prompt=_string(row, "prompt", where), completion=_string(row, answer, where))
    if row.get("text") is not None:
        return Example(text=_string(row, "text", where).strip())
    raise DataError(
        f"{where} has the keys {', '.join(map(str, row))}; expected are {_FORMS}. Name another key of plain text with "
        "column="
    )


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{where}: {key} must be a string, not {type(row[key]).__name__}")
    check_unicode(row[key], where)
    return row[key]


def _messages(raw: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(raw, list | tuple) or any(not isinstance(m, Mapping) or "role" not in m for m in raw):
        raise DataError(f'{where}: messages must be a list of objects {{"role": ..., "content": ...}}')
    if not any(message["role"] == "assistant" for message in raw):
        raise DataError(f"{where}: the conversation has no turn of the assistant to train on")
    return tuple(dict(message) for message in raw)

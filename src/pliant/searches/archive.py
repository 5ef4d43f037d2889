"""Every evaluation of a search, written to disk as it is made. A resumed search asks the archive first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pliant.elastic import Subnet
from pliant.errors import ArtefactError, PliantError
from pliant.formatting import differences

VERSION = 1  # raise it when the meaning of a score changes, so that older scores are not mixed in


class ArchiveError(PliantError, ValueError):
    """An archive was made for another search."""


class Archive:
    """Scores by (pool, sub-network), appended to a JSONL file; without a path, kept in memory only.

    The first line says what the scores belong to. A line cut short by a crash is dropped, with everything after it.

    Arguments:
        path: the file; created if missing.
        belongs_to: model, data and settings that the scores depend on, JSON-ready.

    Attributes:
        tokens: number of tokens per forward pass of the last score, on which the rounding of sums depends; None if
            unknown.

    Raises:
        ArchiveError: the file belongs to another search; the message names the differences.
    """

    def __init__(self, path: Path | None, belongs_to: dict[str, Any]):
        self.path = path
        self._header = {"archive": VERSION, **belongs_to}
        self._scores: dict[tuple[str, Subnet], float] = {}
        self.tokens: int | None = None
        self._good = 0  # bytes of the file that are whole lines
        if path is not None and path.exists():
            try:
                self._good = self._read(path)
            except OSError as error:
                raise ArtefactError(f"cannot read the search archive {str(path)!r}: {error}") from error

    def get(self, pool: str, subnet: Subnet) -> float | None:
        """The score, or None if it is not known yet."""
        return self._scores.get((pool, subnet))

    def put(self, pool: str, subnet: Subnet, score: float, seconds: float, tokens: int | None = None) -> None:
        """Store a score and append it to the file."""
        self._scores[pool, subnet] = score
        batch = {} if tokens is None else {"tokens": tokens}
        self.tokens = tokens
        self._line({"pool": pool, "score": score, "seconds": round(seconds, 3), **batch, **subnet.to_dict()})

    def __len__(self) -> int:
        return len(self._scores)

    def _line(self, content: dict[str, Any]) -> None:
        if self.path is None:
            return
        lines = [content] if self._good else [self._header, content]
        written = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._good)
                file.write(written)
        except OSError as error:
            raise ArtefactError(f"cannot write the search archive {str(self.path)!r}: {error}") from error
        self._good += len(written)

    def _read(self, path: Path) -> int:
        """Load the file; returns the number of bytes in its valid lines."""
        good = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            try:
                content = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(content, dict):
                    break
            except ValueError:
                break
            if number == 0:
                if differing := differences(content, self._header):
                    raise ArchiveError(
                        f"{str(path)!r} belongs to another search ({differing}). Delete it, or write to another folder"
                    )
            elif not self._take(content):
                break
            good += len(line)
        return good

    def _take(self, content: dict[str, Any]) -> bool:
        """Store the score of a line; False if it holds none."""
        pool, score = content.get("pool"), content.get("score")
        if not isinstance(pool, str) or isinstance(score, bool) or not isinstance(score, int | float):
            return False
        try:
            subnet = Subnet.from_dict({"skip": content["skip"], "keep": content["keep"]})
        except (KeyError, TypeError, ValueError):
            return False
        self._scores[pool, subnet] = float(score)
        tokens = content.get("tokens")
        self.tokens = tokens if isinstance(tokens, int) and tokens > 0 else None
        return True

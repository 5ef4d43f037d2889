"""Every evaluation of a search, on disk as it is made. Resuming is asking the archive first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pliant.elastic import Subnet
from pliant.errors import ArtefactError, PliantError

VERSION = 1  # raise it when a score comes to mean something else, so that no older one is mixed in


class ArchiveError(PliantError, ValueError):
    """An archive was made for another search."""


class Archive:
    """Scores by (pool, sub-network), appended to a JSONL file; without a path, kept in memory only.

    The first line says what the scores belong to. A line cut short by a crash is dropped, with whatever follows it.

    Arguments:
        path: the file; made when missing.
        belongs_to: model, data and settings that the scores depend on, JSON-ready.

    Attributes:
        tokens: number of tokens per forward pass of the last score, on which the rounding of sums depends; None if unknown.

    Raises:
        ArchiveError: when the file belongs to something else; the message names what differs.
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
        """The score, or None when it is not known yet."""
        return self._scores.get((pool, subnet))

    def put(self, pool: str, subnet: Subnet, score: float, seconds: float, tokens: int | None = None) -> None:
        """Remember a score; it is on its way to the disk when this returns."""
        self._scores[pool, subnet] = score
        made = {} if tokens is None else {"tokens": tokens}
        self.tokens = tokens
        self._line({"pool": pool, "score": score, "seconds": round(seconds, 3), **made, **subnet.to_dict()})

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
        """Load what is on disk; returns how many bytes of it are whole lines."""
        good = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            try:
                content = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(content, dict):
                    break
            except ValueError:
                break
            if number == 0:
                differing = sorted(k for k in {*self._header, *content} if self._header.get(k) != content.get(k))
                if differing:
                    there, now = content, self._header
                    told = "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in differing[:4])
                    raise ArchiveError(
                        f"{str(path)!r} belongs to another search ({told}). Delete it, or write to another folder"
                    )
            elif not self._take(content):
                break
            good += len(line)
        return good

    def _take(self, content: dict[str, Any]) -> bool:
        """Remember what a line says; False when it is no score."""
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

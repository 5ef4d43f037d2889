"""How a step shows what it did: notes, tables and curves that the report, the card and the command line draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """Whole sentences. The card and the command line show them, too."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text below a heading.

    Attributes:
        columns: headings; the first column is set on the left.
        title: what a folded table shows while it is closed; a heading otherwise.
        folded: closed until it is clicked on.
    """

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Curve:
    """A line with a dot for every point. It is drawn if it has two points or more and runs to the right of 0.

    Attributes:
        title: what is drawn against what.
        labels: for every dot, what it says when it is pointed at.
        marks: number of a point, as text -> a word written beside it.
        x_format: Python format of the values on the horizontal axis.
        caption: sentences below it.
    """

    title: str
    xs: list[float]
    ys: list[float]
    labels: list[str]
    marks: dict[str, str] = field(default_factory=dict)
    x_format: str = ".4g"
    caption: str = ""


Section = Note | Table | Curve
_KINDS: dict[str, type[Section]] = {"note": Note, "table": Table, "curve": Curve}


def to_dict(section: Section) -> dict[str, Any]:
    """A section as plain data, for ``report.json``."""
    return {"section": type(section).__name__.lower(), **asdict(section)}


def sections_of(record: Mapping[str, Any]) -> list[Section]:
    """The sections in the record of a step; none in those of pliant 0.1."""
    return [
        _KINDS[raw["section"]](**{name: value for name, value in raw.items() if name != "section"})
        for raw in record.get("sections", [])
    ]


def notes_of(record: Mapping[str, Any]) -> str:
    """All notes in the record of a step, as one paragraph."""
    return " ".join(section.text for section in sections_of(record) if isinstance(section, Note))

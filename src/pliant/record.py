"""Notes, tables and curves that show what a step did; the report, the card and the command line draw them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """Complete sentences. The card and the command line show them, too."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text below a heading.

    Attributes:
        columns: headings; the first column is left-aligned.
        title: a heading, or the line that a folded table shows while it is closed.
        folded: closed until someone clicks on it.
    """

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Curve:
    """A line with a dot for every point. It is drawn if it has two points or more and runs to the right of 0.

    Attributes:
        title: names the quantities on both axes.
        labels: the tooltip of every dot.
        marks: index of a point, as text -> a word written beside it.
        x_format: Python format of the values on the horizontal axis.
        caption: sentences below the curve.
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
    """The sections in the record of a step; records of pliant 0.1 have none."""
    return [
        _KINDS[raw["section"]](**{name: value for name, value in raw.items() if name != "section"})
        for raw in record.get("sections", [])
    ]


def notes_of(record: Mapping[str, Any]) -> str:
    """All notes in the record of a step, as one paragraph."""
    return " ".join(section.text for section in sections_of(record) if isinstance(section, Note))

"""Sections of the report on a pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.formatting import duration
from pliant.record import Curve, Note, Section, Table


def removals(points: Sequence[Mapping[str, Any]], counters: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """The score against the ratio, the work of every stage, and all removals.

    Arguments:
        points: after each removal ``stage``, ``unit``, ``ratio``, ``score`` (None if it was not scored) and its
            ``label``.
        counters: stage -> its steps, evaluations and seconds.
    """
    if not points:
        return []
    score = points[0]["label"]
    values = [point["score"] for point in points]
    shown: list[Section] = []
    if None not in values:
        stages = [point["stage"] for point in points]
        shown.append(
            Curve(
                title=f"{score} against ratio removed",
                xs=[point["ratio"] for point in points],
                ys=values,
                labels=[f"{p['unit']}: {y:.2f} at {p['ratio']:.2%}" for p, y in zip(points, values, strict=True)],
                marks={str(i): stage for i, stage in enumerate(stages) if i == 0 or stages[i - 1] != stage},
                x_format=".1%",
                caption=f"{score} against the share of parameters removed. Each stage scores on its own sample.",
            )
        )
    if counters:
        shown.append(
            Table(
                ["stage", "removals", "evaluations", "from the archive", "block forwards", "time"],
                [
                    [
                        name,
                        str(c["steps"]),
                        str(c["evaluations"]),
                        str(c["replayed"]),
                        f"{c['block_forwards']:,.0f}",
                        duration(c["seconds"]),
                    ]
                    for name, c in counters.items()
                ],
            )
        )
    rows = [
        [f"{i}. {point['unit']}", f"{point['ratio']:.2%}", "not scored" if value is None else f"{value:.3f}"]
        for i, (point, value) in enumerate(zip(points, values, strict=True), 1)
    ]
    shown.append(Table(["removed", "ratio", score], rows, f"All {len(points)} removals", folded=True))
    return shown


def refits(fits: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The effect of refitting the last matrices of the blocks.

    Arguments:
        fits: for every block its ``distance`` ``before`` and ``after``, or None if it was not refitted.
    """
    refitted = [fit["distance"] for fit in fits if fit["distance"] is not None]
    if not fits:
        return []
    others = len(fits) - len(refitted)
    skipped = f" {others} block(s) do not end in a single matrix and were not refitted." if others else ""
    if not refitted:
        return [Note(f"Repair:{skipped}")]
    last = refitted[-1]
    return [
        Note(
            f"Repair: {len(refitted)} blocks refitted. Relative mean square distance of the residual stream from that "
            f"of the dense model, behind the last of them: {last['before']:.3g} before it was refitted, "
            f"{last['after']:.3g} after.{skipped}"
        )
    ]

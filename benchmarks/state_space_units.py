"""What state_space.py removes: kinds of units of a state-space model, and the baselines that need no search."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pliant.anatomy import Anatomy
from pliant.elastic import Subnet
from pliant.elastic import ratio as ratio_of
from pliant.prune import axis_moves, block_moves, pooled, scan_moves
from pliant.prune.moves import Moves, exhausted
from pliant.prune.scan_skip import scan_axis
from pliant.searches.greedy import Move

RATIOS = (0.05, 0.10, 0.15)
SHARES = (0.3, 0.6, 0.9)  # of what can be removed, where that is less than the ratios above
MILLISECONDS = "milliseconds"  # blocks and scans by the measured time of a decoding step, a share of which is removed
TIMES = (0.10, 0.17, 0.25)
CHANNELS, TOGETHER, ONE_SHOT = "channels", "together", "one-shot"


class Kind(NamedTuple):
    """One kind of unit: the targets of MambaShedder, and the same moves for the other methods."""

    target: str
    moves: Moves
    ratios: tuple[float, ...]


def kinds_of(anatomy: Anatomy, settings: dict[str, int]) -> dict[str, Kind]:
    """The kinds that a model has.

    Arguments:
        settings: units of the state and MLP channels in a group.
    """
    groups: dict[str, dict[str, int]] = {"heads": {}, "state": {}, CHANNELS: {}}
    blocks = anatomy.blocks.values()
    for block in blocks:
        state = scan_axis(block)
        for axis in block.leaders:
            if block.role == "scan":
                own = ("state", settings["state_group"]) if axis == state else ("heads", axis.groups)
            else:
                own = (CHANNELS, settings["mlp_group"]) if block.role == "mlp" else ("", 0)
            if own[0]:
                groups[own[0]][axis.name] = own[1]
    roles = [role for role in ("scan", "attention", "mlp") if any(b.role == role for b in blocks)]
    whole = "+".join("block" if role == "scan" else role for role in roles)
    moves = {"blocks": (whole, block_moves(anatomy)), "scans": ("ssm", scan_moves(anatomy))}
    grouping = [axis for block in blocks for axis in block.leaders if axis.grouping and axis.name in groups["heads"]]
    grouped = any(axis.size > 1 for axis in grouping)
    targets = {"heads": "heads+groups"} if grouped else {}
    moves |= {kind: (targets.get(kind, kind), axis_moves(anatomy, of)) for kind, of in groups.items()}
    moves = {kind: pair for kind, pair in moves.items() if pair[1](Subnet())}
    joined = "+".join(target for target, _ in moves.values())
    found = {}
    for kind, (target, free) in {**moves, TOGETHER: (joined, pooled(*(free for _, free in moves.values())))}.items():
        most = ratio_of(anatomy, exhausted([free])[0])
        ratios = RATIOS if most > RATIOS[-1] else tuple(math.floor(most * share * 1e4) / 1e4 for share in SHARES)
        found[kind] = Kind(target, free, ratios)
    return {**found, MILLISECONDS: Kind(f"{whole}+ssm", pooled(moves["blocks"][1], moves["scans"][1]), TIMES)}


def in_random_order(anatomy: Anatomy, moves: Moves, asked: float, seed: str) -> Subnet:
    """Random moves until the ratio is reached; a larger ratio goes on from a smaller one."""
    return _taken(anatomy, moves, asked, random.Random(seed).choice)


def in_one_shot(anatomy: Anatomy, moves: Moves, asked: float, first: Mapping[str, Any]) -> Subnet:
    """The moves with the smallest loss increase per parameter in the dense model, until the ratio is reached.

    Arguments:
        first: unit -> ``loss`` increase and ``parameters`` of its first move. A further group of the same axis is taken
            to cost as much more each time.
    """
    times: dict[str, int] = {}

    def rank(move: Move) -> float:
        unit = first[move.unit]
        return unit["loss"] / unit["parameters"] * (times.get(move.unit, 0) + 1)

    def lowest(offered: list[Move]) -> Move:
        move = min(offered, key=rank)
        times[move.unit] = times.get(move.unit, 0) + 1
        return move

    return _taken(anatomy, moves, asked, lowest)


def _taken(anatomy: Anatomy, moves: Moves, asked: float, choose: Callable[[list[Move]], Move]) -> Subnet:
    subnet = Subnet()
    while ratio_of(anatomy, subnet) < asked and (offered := list(moves(subnet))):
        subnet = choose(offered).subnet
    return subnet

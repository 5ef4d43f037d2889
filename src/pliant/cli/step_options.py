"""Settings of a step from the command line: name=value, converted by the type of the field."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pliant.errors import StepError
from pliant.step import Step, present_names, settings_of, step_class
from pliant.step_setting import kinds_of

NEEDED = "a search needs --ratio and --data; to cut without a search, give --subnet"


def help_of(cls: type[Step]) -> dict[str, str]:
    """name -> help text with the default, of every setting of a step. Some texts explain their default themselves."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    texts = {}
    for name, of in settings_of(cls).items():
        shown = "none" if defaults[name] is None else defaults[name]
        explained = defaults[name] is dataclasses.MISSING or "Default:" in of.help
        texts[name] = of.help if explained else f"{of.help} Default: {shown}."
    return texts


def recipe(systems: Sequence[str], given: Mapping[str, object], pairs: Sequence[str]) -> list[Step]:
    """Steps, one after the other, from ``name=value`` or ``system.name=value`` pairs.

    A name alone sets it in every step that has it; a system that comes twice has the same settings both times.

    Arguments:
        given: settings that have an option of their own, not as text; a step without them is left alone, but one of the
            steps must take each.

    Raises:
        StepError: a name that none of the steps has, a value of the wrong type, an option that no step takes, or a
            search without a ratio.
    """
    classes = {system: step_class(system) for system in systems}
    values = _values(classes, given, pairs)
    for name, value in given.items():
        taking = [system for system, cls in classes.items() if name in settings_of(cls)]
        if not taking:
            raise StepError(f"--{name} {value} has no effect on {' and '.join(classes)}; leave --{name} out")
        others = [values[system][name] for system in taking]
        if value not in others:
            raise StepError(f"--{name} {value} and --set {name}={others[0]} contradict each other; give one of them")
    if any("ratio" in cls.needs and "ratio" not in values[system] for system, cls in classes.items()):
        raise StepError(NEEDED)
    return [classes[system].of(values[system]) for system in systems]


def known_subnet(path: Path, systems: Sequence[str], pairs: Sequence[str]) -> list[Step]:
    """:func:`recipe` without its searches: the model is cut to the sub-network in a file, then the other steps follow.

    Units are sorted by the importance that the pruner among ``systems`` uses, on as many rows, unless a pair sets
    another.

    Raises:
        StepError: as :func:`recipe`, or ``systems`` has several pruners.
    """
    from pliant.prune.imported_configs import config_in

    cut, given = step_class("cut"), {name: step_class(name) for name in systems if name != "cut"}
    pruners = [name for name in systems if name in given and given[name].family == "pruner"]
    if len(pruners) > 1:
        raise StepError(
            f"--subnet cuts the model once, without a search; {' and '.join(pruners)} are {len(pruners)} pruners. "
            "Give the one that found the sub-network"
        )
    pruner: Any = given[pruners[0]] if pruners else cut
    rows = getattr(pruner, "width_samples", getattr(pruner, "samples", None)) or vars(cut)["samples"]
    others = [name for name in systems if name in given and name not in pruners]
    classes = {"cut": cut, **{name: given[name] for name in others}}
    values = _values(classes, {"order": getattr(pruner, "order", "l1"), "samples": rows}, pairs)
    values["cut"]["subnet"] = config_in(path)
    return [classes[name].of(values[name]) for name in ("cut", *others)]


def _values(
    classes: Mapping[str, type[Step]], given: Mapping[str, object], pairs: Sequence[str]
) -> dict[str, dict[str, object]]:
    """Settings of each step: those in ``given``, and over them the pairs, converted by the type of the field."""
    known = {
        system: {name for setting, of in settings_of(cls).items() for name in (setting, of.formerly) if name}
        for system, cls in classes.items()
    }
    said: dict[str, str] = {}
    texts: dict[str, dict[str, str]] = {system: {} for system in classes}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise StepError(f"--set takes name=value, not {pair!r}")
        where, dot, name = name.rpartition(".")
        name = name.replace("-", "_")
        takers = [system for system in classes if name in known[system] and where in ("", system)]
        if not takers or (dot and where not in classes):
            listed = "\n".join(
                f"  {setting:14} {help_}" for cls in classes.values() for setting, help_ in help_of(cls).items()
            )
            raise StepError(f"{where or ' and '.join(classes)} has no setting {name!r}; it has\n{listed}")
        setting = f"{where}{dot}{name}"
        if said.setdefault(setting, value) != value:
            raise StepError(f"--set {setting} is {said[setting]!r} and then {value!r}; give one of them")
        for system in takers:
            texts[system][name] = value
    found = {}
    for system, cls in classes.items():
        kinds = typing.get_type_hints(cls)
        found[system] = {name: value for name, value in given.items() if name in settings_of(cls)}
        for name, value in present_names(cls, texts[system]).items():
            found[system][name] = _convert(name, value, kinds[name])
    return found


def _convert(name: str, value: str, kind: typing.Any) -> object:
    if any(typing.get_origin(one) is Mapping for one in (kind, *typing.get_args(kind))):
        return value  # the step reads it
    kinds = kinds_of(kind)
    if type(None) in kinds and value.lower() in ("none", ""):
        return None
    plain = [of for of in (bool, int, float, str) if of in kinds]
    if not plain:
        raise StepError(f"{name} cannot be given with --set; give it in Python, or in a recipe")
    for of in plain:
        if of is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if of is not bool:
            with contextlib.suppress(ValueError):
                return of(value)
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    raise StepError(f"{name} is {' or '.join(wanted[of] for of in plain)}, not {value!r}")

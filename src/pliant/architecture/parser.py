"""The parser of architecture files; the format is described in ``format.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pliant.architecture.axis_faults import axis_faults
from pliant.architecture.format import (
    MEASURES,
    ROLES,
    STATES,
    WEIGHT_ROLES,
    WHOLE,
    Architecture,
    AxisSpec,
    BlockSpec,
    NativeSpec,
    Part,
    factors,
)
from pliant.errors import ArchitectureError

_NATIVE = tuple(NativeSpec.__dataclass_fields__)
_LAYOUT = {"module", "norms", "output", "residual", "scores", "scan_state", "cached", "attributes", "weights"}
_LAYOUT |= {"scan_macs", "transposed", "elementwise", "uncalled", "rescale", "skip", "roles"}
_KEYS = {
    "file": {"models", "layers", "output", "fixed", "axes", "blocks", "native"},
    "native": set(_NATIVE),
    "axis": set(AxisSpec.__dataclass_fields__),
    "block": _LAYOUT
    | {"guard", "slot", "role", "state", "when", "needs", "either", "tied", "counts", "inside", "passes"},
    "variant": _LAYOUT,
}
_LATER = {  # keys that other families need and that are not supported yet; ignoring one would misread the file
    "own": "per-layer sizes of the family are not read yet; set cut: false for these axes",
    "scale": "a parameter that multiplies the stream is not supported yet",
    "stays": "parameters outside every block are not supported yet",
    "parts": "models with several lists of layers are not supported yet",
    "part": "only the config of the text decoder is read yet",
    "record": "only traced models record shapes instead of per_layer_config yet",
    "has": "list the layouts under 'either', or the layer types under 'when'",
    "buffers": "list a buffer under 'weights', like a parameter",
}


def parse(name: str, raw: Any) -> Architecture:
    """Build an ``Architecture`` from the content of a YAML file; every fault is reported at once.

    Raises:
        ArchitectureError: the content has faults; the message numbers them.
    """
    return _Parser().file(name, raw)


class _Parser:
    """Reads one file and collects its faults in ``faults``."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.axes: dict[str, AxisSpec] = {}
        self.fixed: dict[str, Any] = {}

    def file(self, name: str, raw: Any) -> Architecture:
        top = self.known("the file", raw, "file")
        for key in sorted(_KEYS["file"] - {"fixed", "output", "native"} - set(top)):
            self.faults.append(f"the key {key!r} is missing")
        models, layers = top.get("models", ["x"]), top.get("layers", "x")
        if not isinstance(models, list) or not models or not all(isinstance(model, str) for model in models):
            self.faults.append(f"models must be a list of model types, not {models!r}")
        if not isinstance(layers, str) or not layers:
            self.faults.append(f"layers must be the name of a list of modules, not {layers!r}")
        self.fixed = self.mapping("the file", top, "fixed")
        for dimension, given in self.fixed.items():
            self.size(f"fixed {dimension!r}", given)
        for axis, spec in self.mapping("the file", top, "axes").items():
            self.axes[axis] = self.axis(axis, spec)
        self.faults += axis_faults(self.axes)
        blocks = tuple(self.block(kind, spec) for kind, spec in self.mapping("the file", top, "blocks").items())
        self.nesting({block.kind: block for block in blocks})
        native = self.native(top["native"]) if "native" in top else None
        if top.get("output", "tensor") not in ("tensor", "tuple"):
            self.faults.append(f"the output of a layer must be 'tensor' or 'tuple', not {top['output']!r}")
        if self.faults:
            listed = "\n".join(f"  {i}. {fault}" for i, fault in enumerate(self.faults, 1))
            raise ArchitectureError(f"architecture file {name!r} has {len(self.faults)} fault(s):\n{listed}")
        return Architecture(
            name=name,
            models=tuple(top["models"]),
            layers=layers,
            fixed=self.fixed,
            axes=self.axes,
            blocks=blocks,
            returns_tuple=top.get("output") == "tuple",
            raw=raw,
            native=native,
        )

    def known(self, where: str, given: Any, kind: str) -> dict[str, Any]:
        if not isinstance(given, dict):
            self.faults.append(f"{where} must be a mapping, not {type(given).__name__}")
            return {}
        for key in sorted(set(given) - _KEYS[kind], key=str):
            if key in _LATER:
                self.faults.append(f"{where} has the key {key!r}: {_LATER[key]}")
                continue
            self.faults.append(f"{where} has the unknown key {key!r}; choose from: {', '.join(sorted(_KEYS[kind]))}")
        return given

    def mapping(self, where: str, spec: dict[str, Any], key: str) -> dict[str, Any]:
        """The mapping under a key, whose own keys are names; empty if the key is missing."""
        given = spec.get(key) or {}
        if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
            self.faults.append(f"{where}: {key} must map names to values, not {given!r}")
            return {}
        return given

    def size(self, where: str, given: Any) -> None:
        if isinstance(given, bool) or not isinstance(given, int | str):
            self.faults.append(f"{where}: {given!r} is not a size; give a number or config keys")
            return
        for alternative in str(given).split(" or "):
            try:
                factors(alternative)
            except ArchitectureError as error:
                self.faults.append(f"{where}: {error}")

    def axis(self, axis: str, given: Any) -> AxisSpec:
        spec = self.known(f"axis {axis!r}", given, "axis")
        if "size" not in spec:
            self.faults.append(f"axis {axis!r} needs 'size': the config key that holds its number of units")
        for word in ("size", "unit", "groups", "copies"):
            if word in spec:
                self.size(f"{word} of axis {axis!r}", spec[word])
        for word in ("cut", "normed"):
            if not isinstance(spec.get(word, True), bool):
                self.faults.append(f"axis {axis!r}: {word} must be true or false, not {spec[word]!r}")
        for word, lowest in (("multiple", 1), ("least", 0)):
            number = spec.get(word, 1)
            if isinstance(number, bool) or not isinstance(number, int) or number < lowest:
                self.faults.append(f"axis {axis!r}: {word} must be a whole number of at least {lowest}, not {number!r}")
        if "follows" in spec and "groups" in spec:
            self.faults.append(f"axis {axis!r}: leave groups out; it has the groups of {spec['follows']!r}")
        if spec.get("active") is not None and not isinstance(spec["active"], str):
            self.faults.append(f"axis {axis!r}: active must be a config key, not {spec['active']!r}")
        return AxisSpec(
            size=str(spec.get("size")),
            unit=spec.get("unit", 1),
            follows=spec.get("follows"),
            cut=spec.get("cut", True),
            active=spec.get("active"),
            multiple=spec.get("multiple", 1),
            normed=spec.get("normed", False),
            least=spec.get("least", 1),
            groups=spec.get("groups", 1),
            copies=spec.get("copies", 1),
            only_with=spec.get("only_with"),
        )

    def part(self, where: str, given: Any) -> Part:
        axis, factor = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else (given, 1)
        if not isinstance(axis, str) or (axis not in self.axes and axis not in self.fixed):
            declared = ", ".join([*self.axes, *self.fixed])
            self.faults.append(f"{where}: unknown axis {given!r}; choose from: {declared}")
        return Part(str(axis), factor)

    def block(self, kind: str, given: Any) -> BlockSpec:
        where = f"block {kind!r}"
        spec = self.known(where, given, "block")
        whole = {key: spec[key] for key in ("guard", "slot", "needs") if key in spec}
        for word in ("guard", "needs"):
            if spec.get(word) is not None and not isinstance(spec[word], str):
                self.faults.append(f"{where}: {word} must be a config key, not {spec[word]!r}")
        if spec.get("slot") is not None and not isinstance(spec["slot"], str):
            self.faults.append(f"{where}: slot must be the name of an attribute, not {spec['slot']!r}")
        if not isinstance(spec.get("tied", False), bool):
            self.faults.append(f"{where}: tied must be true or false, not {spec['tied']!r}")
        whole |= {"tied": spec.get("tied", False), "when": self.words(where, spec, "when")}
        for word, meaning in (("counts", "the name of a call argument"), ("inside", "the name of another block")):
            if not _is_name(spec.get(word, "x")):
                self.faults.append(f"{where}: {word} must be {meaning}, not {spec[word]!r}")
        if "passes" in spec and spec["passes"] not in list(self.fixed):
            self.faults.append(f"{where}: passes must be a dimension under 'fixed', not {spec['passes']!r}")
        if "counts" in spec and "slot" in spec:
            self.faults.append(f"{where} has both 'slot' and 'counts'; its cache slot is named by one of them")
        whole |= {word: spec.get(word) for word in ("counts", "inside", "passes")}
        role = spec.get("role", kind if kind in ROLES else "attention" if spec.get("scores") else "other")
        if role not in ROLES:
            self.faults.append(f"{where}: role must be one of {', '.join(ROLES)}; not {role!r}")
        state = spec.get("state", "kv" if spec.get("slot") else [])
        state = (state,) if isinstance(state, str) else tuple(state) if isinstance(state, list) else ("",)
        if not all(one in STATES for one in state):
            self.faults.append(
                f"{where}: state must be one of {', '.join(STATES)}, or a list of these; not {spec['state']!r}"
            )
        if state and not spec.get("slot"):
            self.faults.append(f"{where} has a state and needs 'slot': the attribute that names its cache slot")
        whole |= {"role": role, "state": state}
        if "either" not in spec:
            return self.layout(kind, where, spec, whole)
        variants = spec["either"]
        if not isinstance(variants, list) or len(variants) < 2:
            self.faults.append(f"{where}: either must be a list of two or more variants, not {variants!r}")
            variants = []
        common = {key: value for key, value in spec.items() if key in _LAYOUT}
        either = []
        for number, variant in enumerate(variants, 1):
            own = self.known(f"variant {number} of {where}", variant, "variant")
            merged = {**common, **own}
            for word in ("weights", "attributes"):  # every variant has those of the block, too
                if isinstance(common.get(word), dict) and isinstance(own.get(word), dict):
                    merged[word] = common[word] | own[word]
            either.append(self.layout(kind, f"variant {number} of {where}", merged, whole))
        first = either[0] if either else None
        return BlockSpec(
            kind=kind,
            modules=first.modules if first else (kind,),
            norms=first.norms if first else (),
            weights={},
            either=tuple(either),
            **whole,
        )

    def nesting(self, blocks: Mapping[str, BlockSpec]) -> None:
        """Every block is inside one that all its layers have, and none is inside itself."""
        for kind, block in blocks.items():
            outer = blocks.get(str(block.inside))
            if block.inside is not None and (
                outer is None or (outer.when is not None and not set(outer.when).issuperset(block.when or ("",)))
            ):
                self.faults.append(
                    f"block {kind!r} is inside {block.inside!r}; it must be inside a block that all its layers have"
                )
            chain = [kind]
            while (outer := blocks.get(str(blocks[chain[-1]].inside))) is not None and outer.kind not in chain:
                chain.append(outer.kind)
            if outer is not None:
                self.faults.append(f"block {kind!r} is inside itself: {' inside '.join([*chain, outer.kind])}")

    def layout(self, kind: str, where: str, spec: dict[str, Any], whole: dict[str, Any]) -> BlockSpec:
        """A block, or one of its variants."""
        self.faults += [f"{where} needs {key!r}" for key in ("module", "weights") if key not in spec]
        weights, optional = self.weights(where, self.mapping(where, spec, "weights"))
        attributes = {name: self.terms(where, name, of) for name, of in self.mapping(where, spec, "attributes").items()}
        if spec.get("output", "tensor") not in ("tensor", "tuple"):
            self.faults.append(f"{where}: output must be 'tensor' or 'tuple', not {spec['output']!r}")
        residual = spec.get("residual")
        if residual is not None and (isinstance(residual, bool) or not isinstance(residual, int) or residual < 0):
            self.faults.append(f"{where}: residual must be the index of an argument, counted from 0; not {residual!r}")
        modules = spec.get("module")
        listed = [modules] if isinstance(modules, str) else modules
        if "module" in spec and not (isinstance(listed, list) and listed and all(_is_name(name) for name in listed)):
            self.faults.append(f"{where}: module must be a name or a list of names, not {modules!r}")
        if not isinstance(spec.get("cached", {}), dict):
            self.faults.append(f"{where}: cached must map config keys to numbers of heads, not {spec['cached']!r}")
        else:
            for key, given in (spec.get("cached") or {}).items():
                self.size(f"cached {key!r} of {where}", given)
        if spec.get("scores") is not None:
            self.part(f"scores of {where}", spec["scores"])
        scan_state = self.words(where, spec, "scan_state") or ()
        for axis in scan_state:
            self.part(f"scan_state of {where}", axis)
        scan_macs = spec.get("scan_macs", 3)
        if isinstance(scan_macs, bool) or not isinstance(scan_macs, int) or scan_macs < 1:
            self.faults.append(f"{where}: scan_macs must be a whole number of at least 1, not {scan_macs!r}")
        if ("scan" in whole["state"]) != bool(scan_state):
            self.faults.append(
                f"{where}: a block with the state 'scan' lists the axes that span it under scan_state, and no other "
                f"block does; not {spec.get('scan_state')!r}"
            )
        roles = spec.get("roles") or {}
        if not isinstance(roles, dict) or not all(
            role in WEIGHT_ROLES and isinstance(weight, str) and weight in weights for role, weight in roles.items()
        ):
            self.faults.append(
                f"{where}: roles must map {', '.join(WEIGHT_ROLES)} to weights of the block, not {roles!r}"
            )
        of_weights = ("transposed", "elementwise", "uncalled", "rescale")
        lists = {word: self.words(where, spec, word) or () for word in ("norms", *of_weights)}
        for word in of_weights:
            for weight in sorted(set(lists[word]) - set(weights)):
                self.faults.append(f"{where}: {word} names {weight!r}, which is not one of its weights")
        skip = self.mapping(where, spec, "skip")
        for weight, axis in skip.items():
            if weight not in weights or str(axis) not in self.axes or self.axes[str(axis)].least:
                self.faults.append(
                    f"{where}: skip must map one of its weights to an axis with 'least: 0', not {weight!r} to {axis!r}"
                )
        return BlockSpec(
            kind=kind,
            modules=tuple(map(str, modules)) if isinstance(modules, list) and modules else (str(modules),),
            norms=lists["norms"],
            weights=weights,
            optional=frozenset(optional),
            returns_tuple=spec.get("output") == "tuple",
            residual=residual,
            scores=spec.get("scores"),
            scan_state=scan_state,
            scan_macs=scan_macs,
            cached=spec.get("cached"),
            attributes=attributes,
            roles=roles,
            transposed=frozenset(lists["transposed"]),
            elementwise=frozenset(lists["elementwise"]),
            uncalled=frozenset(lists["uncalled"]),
            rescale=frozenset(lists["rescale"]),
            skip=skip,
            **whole,
        )

    def terms(self, where: str, name: str, given: Any) -> tuple[str, ...]:
        """The terms whose sum a plain attribute holds: an axis, its width, or the width of one of its groups."""
        terms = tuple(map(str, given if isinstance(given, list) else [given]))
        for term in terms:
            self.part(f"attribute {name!r} of {where}", term.partition(".")[0])
        if len({term.partition(".")[2] for term in terms}) != 1 or terms[0].partition(".")[2] not in ("", *MEASURES):
            self.faults.append(
                f"{where}: attribute {name!r} must be an axis, axis.width or axis.group, or a list of one of these "
                f"kinds; not {given!r}"
            )
        return terms

    def weights(self, where: str, given: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """Name -> axes of each dimension, and the names of the weights that only some models have."""
        weights: dict[str, tuple[tuple[Part, ...], ...] | None] = {}
        optional = set()
        for listed, dims in given.items():
            weight = listed.removesuffix("?")
            here = f"weight {weight!r} of {where}"
            if weight != listed:
                optional.add(weight)
            if dims == WHOLE:
                weights[weight] = None
            elif not isinstance(dims, list) or not dims or [] in dims:
                self.faults.append(f"{here} must be a list of dimensions or {WHOLE!r}, not {dims!r}")
            else:
                weights[weight] = tuple(
                    tuple(self.part(here, part) for part in (dim if isinstance(dim, list) else [dim])) for dim in dims
                )
        return weights, optional

    def words(self, where: str, spec: dict[str, Any], key: str) -> tuple[str, ...] | None:
        """A list of names; None if the key is missing."""
        names = spec.get(key, [])
        if not isinstance(names, list) or not all(map(_is_name, names)):
            self.faults.append(f"{where}: {key} must be a list of names, not {names!r}")
            return None
        return tuple(names) if key in spec else None

    def native(self, given: Any) -> NativeSpec | None:
        spec = self.known("native", given, "native")
        self.faults += [f"native needs {key!r}" for key in _NATIVE if key not in spec]
        for word in sorted(set(spec) & set(_NATIVE) - {"models"}):
            if not _is_name(spec[word]):
                self.faults.append(f"native: {word} must be a name, not {spec[word]!r}")
        models = spec.get("models")
        settings = models.values() if isinstance(models, dict) else [None]
        if not all(
            isinstance(words, dict) and set(words) <= {"window", "rotates"} and all(map(_is_name, words.values()))
            for words in settings
        ):
            self.faults.append(f"native: models must map model types to window and rotates, or to {{}}; not {models!r}")
        return None if self.faults else NativeSpec(**spec)


def _is_name(given: Any) -> bool:
    return isinstance(given, str) and bool(given)

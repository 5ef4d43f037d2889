"""Architecture files: what a model family is made of, as data.

One YAML file beside this one describes the repeated layer of a family::

    models: [llama]                 # the ``model_type`` values of config.json that have this layout
    layers: model.layers            # where the list of layers is
    fixed: {hidden: hidden_size}    # dimensions that no sub-network changes: name -> config key
    axes:                           # dimensions that can shrink
      kv:    {size: num_key_value_heads, unit: head_dim}
      heads: {size: num_attention_heads, unit: head_dim, follows: kv}
    blocks:                         # residual blocks, in the order in which they run
      attention:
        module: self_attn           # the module that computes f in ``x + f(norm(x))``
        norms: [input_layernorm]    # what disappears together with it
        output: tuple               # what the module returns: a tensor (default) or (tensor, None)
        slot: layer_idx             # the attribute that names its cache slot
        scores: heads               # the axis that attention scores are computed over (for counting MACs)
        attributes: {num_heads: heads, split_size: heads.width}    # plain attributes that must follow an axis
        weights:
          q_proj: [heads, hidden]   # (out, in) of a linear layer; the bias follows ``out``
          qkv_proj: [[heads, kv, kv], hidden]    # a fused weight lists its parts
          packed: [{heads: 3}, hidden]           # 3 units wide per head, interleaved

An axis counts in units (heads, channels); ``unit`` is how many elements wide one is. Sizes and units are numbers or
config keys; where a key may be absent, ``n_inner or 4 * hidden_size`` says what stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from pliant.errors import ArchitectureError


@dataclass(frozen=True)
class AxisSpec:
    """A dimension that can shrink: the config key of its size, the width of one unit, and the axis it follows."""

    size: str
    unit: int | str = 1
    follows: str | None = None

    @property
    def config_key(self) -> str:
        return self.size.split()[0]


@dataclass(frozen=True)
class Part:
    """A stretch of a tensor dimension: ``factor`` units of ``axis`` side by side for each unit kept."""

    axis: str
    factor: int = 1


@dataclass(frozen=True)
class BlockSpec:
    """One residual block of the repeated layer."""

    kind: str
    module: str
    norms: tuple[str, ...]
    weights: dict[str, tuple[tuple[Part, ...], ...]]
    returns_tuple: bool = False
    slot: str | None = None
    scores: str | None = None
    attributes: dict[str, str] | None = None


@dataclass(frozen=True)
class Architecture:
    """A model family: where its layers are, which dimensions can shrink, which blocks a layer runs."""

    name: str
    models: tuple[str, ...]
    layers: str
    fixed: dict[str, str]
    axes: dict[str, AxisSpec]
    blocks: tuple[BlockSpec, ...]

    def leader(self, axis: str) -> str:
        """The axis that decides: ``heads`` follows ``kv`` in grouped-query attention."""
        return self.axes[axis].follows or axis

    def leaders(self, block: BlockSpec) -> tuple[str, ...]:
        """The axes of a block that can be chosen, in file order."""
        used = {part.axis for dims in block.weights.values() for dim in dims for part in dim}
        return tuple(name for name, axis in self.axes.items() if axis.follows is None and name in used)


_KEYS = {
    "file": {"models", "layers", "fixed", "axes", "blocks"},
    "axis": {"size", "unit", "follows"},
    "block": {"module", "norms", "output", "slot", "scores", "attributes", "weights"},
}


def parse(name: str, raw: Any) -> Architecture:
    """Build an ``Architecture`` from the content of a YAML file; every fault is reported at once.

    Raises:
        ArchitectureError: with a numbered list of faults.
    """
    faults: list[str] = []

    def known(where: str, given: Any, kind: str) -> dict[str, Any]:
        if not isinstance(given, dict):
            faults.append(f"{where} must be a mapping, not {type(given).__name__}")
            return {}
        for key in sorted(set(given) - _KEYS[kind]):
            faults.append(f"{where} has the unknown key {key!r}; known are {', '.join(sorted(_KEYS[kind]))}")
        return given

    top = known("the file", raw, "file")
    for key in sorted(_KEYS["file"] - {"fixed"} - set(top)):
        faults.append(f"the key {key!r} is missing")
    fixed = top.get("fixed") or {}
    axes: dict[str, AxisSpec] = {}
    for axis, spec in (top.get("axes") or {}).items():
        spec = known(f"axis {axis!r}", spec, "axis")
        if "size" not in spec:
            faults.append(f"axis {axis!r} needs 'size': the config key that holds how many units there are")
        axes[axis] = AxisSpec(str(spec.get("size")), spec.get("unit", 1), spec.get("follows"))
    for axis, spec in axes.items():
        if spec.follows and (spec.follows not in axes or axes[spec.follows].follows):
            faults.append(f"axis {axis!r} follows {spec.follows!r}, which is not an axis that stands on its own")

    def part(where: str, given: Any) -> Part:
        axis, factor = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else (given, 1)
        if not isinstance(axis, str) or (axis not in axes and axis not in fixed):
            faults.append(f"{where}: {given!r} is no axis; declared are {', '.join([*axes, *fixed])}")
        return Part(str(axis), factor)

    blocks = []
    for kind, spec in (top.get("blocks") or {}).items():
        spec = known(f"block {kind!r}", spec, "block")
        faults += [f"block {kind!r} needs {key!r}" for key in ("module", "weights") if key not in spec]
        weights = {}
        for weight, dims in (spec.get("weights") or {}).items():
            where = f"weight {weight!r} of block {kind!r}"
            weights[weight] = tuple(
                tuple(part(where, one) for one in (dim if isinstance(dim, list) else [dim])) for dim in dims
            )
        attributes = spec.get("attributes") or {}
        for attribute, value in attributes.items():
            part(f"attribute {attribute!r} of block {kind!r}", str(value).removesuffix(".width"))
        if spec.get("output", "tensor") not in ("tensor", "tuple"):
            faults.append(f"block {kind!r}: output is 'tensor' or 'tuple', not {spec['output']!r}")
        blocks.append(
            BlockSpec(
                kind=kind,
                module=str(spec.get("module")),
                norms=tuple(spec.get("norms") or ()),
                weights=weights,
                returns_tuple=spec.get("output") == "tuple",
                slot=spec.get("slot"),
                scores=spec.get("scores"),
                attributes=attributes,
            )
        )
    if faults:
        listed = "\n".join(f"  {i}. {fault}" for i, fault in enumerate(faults, 1))
        raise ArchitectureError(f"architecture file {name!r} has {len(faults)} fault(s):\n{listed}")
    return Architecture(name, tuple(top["models"]), str(top["layers"]), fixed, axes, tuple(blocks))


@cache
def catalogue() -> dict[str, Architecture]:
    """Every architecture file that ships with pliant, by ``model_type``."""
    found: dict[str, Architecture] = {}
    for file in sorted(resources.files("pliant.architecture").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            architecture = parse(name, yaml.safe_load(file.read_text("utf-8")))
            for model_type in architecture.models:
                if model_type in found:
                    raise ArchitectureError(f"{model_type!r} is in both {found[model_type].name}.yaml and {name}.yaml")
                found[model_type] = architecture
    return found


def architecture_of(model_type: str) -> Architecture:
    """The architecture of a ``model_type``.

    Raises:
        ArchitectureError: when no file describes it; the message lists those that are.
    """
    known = catalogue()
    if model_type not in known:
        raise ArchitectureError(
            f"no architecture file describes model_type {model_type!r}; known are {', '.join(sorted(known))}. "
            "Adding one takes a YAML file in src/pliant/architecture: see CONTRIBUTING.md"
        )
    return known[model_type]


def families() -> dict[str, str]:
    """model_type -> what of it can be cut."""
    return {
        model_type: ", ".join(f"{spec.kind} ({', '.join(architecture.leaders(spec))})" for spec in architecture.blocks)
        for model_type, architecture in sorted(catalogue().items())
    }

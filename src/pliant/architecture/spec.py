"""Architecture files: what a model family is made of, as data.

One YAML file beside this one describes the repeated layer of a family::

    models: [llama]                 # the ``model_type`` values of config.json that have this layout
    layers: model.layers            # where the list of layers is
    output: tensor                  # what a layer returns: a tensor (default) or a tuple that begins with it
    fixed: {hidden: hidden_size}    # dimensions that no sub-network changes: name -> config key
    axes:                           # dimensions that can shrink
      kv:      {size: num_key_value_heads, unit: head_dim}
      heads:   {size: num_attention_heads, unit: head_dim, follows: kv}
      experts: {size: num_local_experts, active: num_experts_per_tok}  # units that one token uses; so many stay
      wide:    {size: intermediate_size, multiple: 8}                  # only in eights, for the sake of a kernel
      whole:   {size: num_heads, unit: head_dim, cut: false}           # known, but not to be cut
    blocks:                         # residual blocks, in the order in which they run
      attention:
        module: self_attn           # the module that computes f in ``x + f(norm(x))``; see below for a list
        norms: [input_layernorm]    # what disappears with it; ``a or b`` is the first that is there
        output: tuple               # what the module returns: a tensor (default) or (tensor, None)
        residual: 0                 # the argument to which the module itself adds f; left out when the layer adds
        guard: norm_eps             # a config key that transformers reads when it builds the layer. It is overridden where
                                    # the block is gone, so that transformers alone refuses: a float by the next float, a
                                    # size by 0. Default: the config's norm epsilon, or the keys of the axes if there is none
        slot: layer_idx             # the attribute that names its cache slot
        scores: heads               # the axis that attention scores are computed over (for counting MACs)
        cached: {multi_query: 1}    # heads in the cache by the first of these config keys that is set; else those of scores
        attributes: {num_heads: heads, split_size: heads.width}    # plain attributes that must follow an axis
        weights:
          q_proj: [heads, hidden]   # (out, in) of a linear layer; the bias follows ``out``
          qkv_proj: [[heads, kv, kv], hidden]    # a fused weight lists its parts
          packed: [{heads: 3}, hidden]           # 3 units wide per head, interleaved
          experts.down_proj: [experts, hidden, channels]    # a parameter: a stack of matrices, one an expert
          q_norm?: [head]           # there only in some models of the family
          odd: whole                # goes with its block and is never cut
        roles: {q: q_proj, k: k_proj, v: v_proj, o: o_proj}    # the role of each weight, for native runs
    native:                         # optional: the parts that pliant's kernels need to run all layers in one call
      models: {llama: {}, mistral: {window: config.sliding_window}, smollm3: {window: sliding_window, rotates: use_rope}}
      embedding: embed_tokens       # beside the list of layers, as are the next two
      norm: norm
      rotary: rotary_emb
      activation: hidden_act        # the config key of the MLP's activation
      scale: scaling                # the attribute of attention that its scores are multiplied by

An axis counts in units (heads, channels); ``unit`` is the width of one in elements. Sizes and units are numbers or config keys, or
sums and products of those (``a * b``, ``a // b``, ``a + b``). If a key may be absent, ``n_inner or 4 * hidden_size`` gives its
default. If the layer computes f without a module of its own, ``module: [fc1, fc2]`` lists the modules f is made of, and weights are
named from the layer; the last module returns f. A norm that several blocks of a layer list is shared: it stays.

The ``roles`` of an attention are q, k, v, o and, if it has them, q_norm and k_norm; those of an MLP are gate, up and down. ``native``
lists the model types whose layers have an RMS norm before each block, rotary positions, softmax attention and a gated MLP. Each type
names the attributes of its attention that hold the number of tokens a token attends to (``window``) and whether it applies rotary
positions (``rotates``); ``config.x`` is a key of the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pliant.errors import ArchitectureError, UnknownArchitectureError


@dataclass(frozen=True)
class AxisSpec:
    """A dimension of a block: the config key of its size, the width of one unit, and the axis it follows.

    Attributes:
        cut: whether a sub-network may choose it.
        active: the config key that says how many units one token uses (experts); None when it uses all.
        multiple: units come and go in such numbers.
    """

    size: str
    unit: int | str = 1
    follows: str | None = None
    cut: bool = True
    active: str | None = None
    multiple: int = 1

    @property
    def config_key(self) -> str | None:
        """The config key that holds the size, None when it is computed from others."""
        first = self.size.split(" or ")[0]
        return first if first.isidentifier() else None


@dataclass(frozen=True)
class Part:
    """A stretch of a tensor dimension: ``factor`` units of ``axis`` side by side for each unit kept."""

    axis: str
    factor: int = 1


WHOLE = "whole"


@dataclass(frozen=True)
class BlockSpec:
    """One residual block of the repeated layer.

    Attributes:
        modules: what computes f; the last one returns it.
        weights: name -> axes of each dimension, or None for one that is never cut.
        optional: the weights that only some models of the family have.
        residual: which argument the module adds f to, None when the layer does the adding.
        guard: the config key that is overridden where the block is gone, so that transformers alone refuses the config; None for
            the norm epsilon, or the keys of its axes.
        cached: config key -> how many heads are in the cache when it is set and none before it is.
        roles: role -> name of the weight.
    """

    kind: str
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    weights: dict[str, tuple[tuple[Part, ...], ...] | None]
    optional: frozenset[str] = frozenset()
    returns_tuple: bool = False
    residual: int | None = None
    guard: str | None = None
    slot: str | None = None
    scores: str | None = None
    cached: dict[str, int | str] | None = None
    attributes: dict[str, str] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The module that returns f."""
        return self.modules[-1]

    @property
    def prefix(self) -> str:
        """What the names of weights are relative to, inside the layer."""
        return f"{self.module}." if len(self.modules) == 1 else ""


@dataclass(frozen=True)
class NativeSpec:
    """The parts outside the blocks that a native run of all layers needs.

    Attributes:
        models: model type -> ``window`` and ``rotates``: attributes of its attention, or config keys.
        embedding, norm, rotary: modules beside the list of layers.
        activation: config key of the MLP's activation.
        scale: attribute of attention that its scores are multiplied by.
    """

    models: Mapping[str, Mapping[str, str]]
    embedding: str
    norm: str
    rotary: str
    activation: str
    scale: str


@dataclass(frozen=True)
class Architecture:
    """A model family: where its layers are, which dimensions can shrink, which blocks a layer runs.

    Attributes:
        native: the parts that a native run of all layers needs; None if the family has no native run.
        raw: the content of the file it was read from.
    """

    name: str
    models: tuple[str, ...]
    layers: str
    fixed: dict[str, str]
    axes: dict[str, AxisSpec]
    blocks: tuple[BlockSpec, ...]
    returns_tuple: bool
    raw: Mapping[str, Any] = field(repr=False, compare=False)
    native: NativeSpec | None = None

    def leader(self, axis: str) -> str:
        """The axis that decides: ``heads`` follows ``kv`` in grouped-query attention."""
        return self.axes[axis].follows or axis

    def leaders(self, block: BlockSpec) -> tuple[str, ...]:
        """The axes of a block that others follow or that stand alone, in file order."""
        used = {part.axis for dims in block.weights.values() for dim in dims or () for part in dim}
        return tuple(name for name, axis in self.axes.items() if axis.follows is None and name in used)


ROLES = ("q", "k", "v", "o", "q_norm", "k_norm", "gate", "up", "down")
_NATIVE = tuple(NativeSpec.__dataclass_fields__)
_KEYS = {
    "file": {"models", "layers", "output", "fixed", "axes", "blocks", "native"},
    "native": set(_NATIVE),
    "axis": {"size", "unit", "follows", "cut", "active", "multiple"},
    "block": {
        "module",
        "norms",
        "output",
        "residual",
        "guard",
        "slot",
        "scores",
        "cached",
        "attributes",
        "roles",
        "weights",
    },
}


def factors(alternative: str) -> list[list[str]]:
    """Split one alternative of a size into the products that it sums: ``a * b + c`` into ``[["a", "*", "b"], ["c"]]``.

    Raises:
        ArchitectureError: it does not alternate between operands (numbers, config keys) and operators (``+``, ``*``, ``//``).
    """
    words = alternative.split()
    fine = len(words) % 2 == 1 and all(word.isdigit() or word.isidentifier() for word in words[::2])
    if not fine or not all(word in ("+", "*", "//") for word in words[1::2]):
        raise ArchitectureError(
            f"{alternative!r} is not a size; give a number, a config key, or several of them joined by '+', '*' and '//'"
        )
    terms: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            terms.append([])
        else:
            terms[-1].append(word)
    return terms


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

    def size(where: str, given: Any) -> None:
        if isinstance(given, bool) or not isinstance(given, int | str):
            faults.append(f"{where}: {given!r} is not a size; give a number or config keys")
            return
        for alternative in str(given).split(" or "):
            try:
                factors(alternative)
            except ArchitectureError as error:
                faults.append(f"{where}: {error}")

    top = known("the file", raw, "file")
    for key in sorted(_KEYS["file"] - {"fixed", "output", "native"} - set(top)):
        faults.append(f"the key {key!r} is missing")
    fixed = top.get("fixed") or {}
    for dimension, given in fixed.items():
        size(f"fixed {dimension!r}", given)
    axes: dict[str, AxisSpec] = {}
    for axis, spec in (top.get("axes") or {}).items():
        spec = known(f"axis {axis!r}", spec, "axis")
        if "size" not in spec:
            faults.append(f"axis {axis!r} needs 'size': the config key that holds how many units there are")
        for word in ("size", "unit"):
            if word in spec:
                size(f"{word} of axis {axis!r}", spec[word])
        axes[axis] = AxisSpec(
            size=str(spec.get("size")),
            unit=spec.get("unit", 1),
            follows=spec.get("follows"),
            cut=spec.get("cut", True),
            active=spec.get("active"),
            multiple=spec.get("multiple", 1),
        )
    for axis, spec in axes.items():
        if not isinstance(spec.cut, bool):
            faults.append(f"axis {axis!r}: cut is true or false, not {spec.cut!r}")
        if isinstance(spec.multiple, bool) or not isinstance(spec.multiple, int) or spec.multiple < 1:
            faults.append(f"axis {axis!r}: multiple is a whole number from 1, not {spec.multiple!r}")
        if spec.active is not None and not isinstance(spec.active, str):
            faults.append(f"axis {axis!r}: active is a config key, not {spec.active!r}")
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
        weights: dict[str, tuple[tuple[Part, ...], ...] | None] = {}
        optional = set()
        for name_, dims in (spec.get("weights") or {}).items():
            weight = name_.removesuffix("?")
            where = f"weight {weight!r} of block {kind!r}"
            if weight != name_:
                optional.add(weight)
            if dims == WHOLE:
                weights[weight] = None
            elif not isinstance(dims, list):
                faults.append(f"{where}: a list of dimensions or {WHOLE!r} is expected, not {dims!r}")
            else:
                weights[weight] = tuple(
                    tuple(part(where, one) for one in (dim if isinstance(dim, list) else [dim])) for dim in dims
                )
        attributes = spec.get("attributes") or {}
        for attribute, value in attributes.items():
            part(f"attribute {attribute!r} of block {kind!r}", str(value).removesuffix(".width"))
        if spec.get("output", "tensor") not in ("tensor", "tuple"):
            faults.append(f"block {kind!r}: output is 'tensor' or 'tuple', not {spec['output']!r}")
        residual = spec.get("residual")
        if residual is not None and (isinstance(residual, bool) or not isinstance(residual, int) or residual < 0):
            faults.append(f"block {kind!r}: residual is the place of an argument, counted from 0; not {residual!r}")
        modules = spec.get("module")
        if "module" in spec and not (isinstance(modules, str) or (isinstance(modules, list) and modules)):
            faults.append(f"block {kind!r}: module is a name or a list of names, not {modules!r}")
        if not isinstance(spec.get("norms", []), list):
            faults.append(f"block {kind!r}: norms is a list of names, not {spec['norms']!r}")
        if spec.get("guard") is not None and not isinstance(spec["guard"], str):
            faults.append(f"block {kind!r}: guard is a config key, not {spec['guard']!r}")
        if not isinstance(spec.get("cached", {}), dict):
            faults.append(f"block {kind!r}: cached maps config keys to heads, it is {spec['cached']!r}")
        else:
            for key, given in (spec.get("cached") or {}).items():
                size(f"cached {key!r} of block {kind!r}", given)
        if spec.get("scores") is not None:
            part(f"scores of block {kind!r}", spec["scores"])
        roles = spec.get("roles") or {}
        if not isinstance(roles, dict) or not set(roles) <= set(ROLES) or not set(roles.values()) <= set(weights):
            faults.append(f"block {kind!r}: roles must map {', '.join(ROLES)} to weights of the block, not {roles!r}")
        blocks.append(
            BlockSpec(
                kind=kind,
                modules=tuple(map(str, modules)) if isinstance(modules, list) and modules else (str(modules),),
                norms=tuple(spec.get("norms") or ()),
                weights=weights,
                optional=frozenset(optional),
                returns_tuple=spec.get("output") == "tuple",
                residual=residual,
                guard=spec.get("guard"),
                slot=spec.get("slot"),
                scores=spec.get("scores"),
                cached=spec.get("cached"),
                attributes=attributes,
                roles=roles,
            )
        )
    native = None
    if "native" in top:
        given = known("native", top["native"], "native")
        faults += [f"native needs {key!r}" for key in _NATIVE if key not in given]
        models = given.get("models")
        words = models.values() if isinstance(models, dict) else [None]
        if not all(isinstance(one, dict) and set(one) <= {"window", "rotates"} for one in words):
            faults.append(f"native: models must map model types to window and rotates, or to {{}}; not {models!r}")
        if not faults:
            native = NativeSpec(**given)
    if top.get("output", "tensor") not in ("tensor", "tuple"):
        faults.append(f"the output of a layer is 'tensor' or 'tuple', not {top['output']!r}")
    if faults:
        listed = "\n".join(f"  {i}. {fault}" for i, fault in enumerate(faults, 1))
        raise ArchitectureError(f"architecture file {name!r} has {len(faults)} fault(s):\n{listed}")
    returns_tuple = top.get("output") == "tuple"
    layers = str(top["layers"])
    return Architecture(name, tuple(top["models"]), layers, fixed, axes, tuple(blocks), returns_tuple, raw, native)


@cache
def shipped() -> dict[str, Architecture]:
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


_added: dict[str, Architecture] = {}


def catalogue() -> dict[str, Architecture]:
    """Every architecture known, by ``model_type``: what ships with pliant and what was added."""
    return {**shipped(), **_added}


def add_architecture(file: str | Path) -> Architecture:
    """Make an architecture file of your own known, for this process; it goes before one that ships with pliant.

    Models cut with it carry it in their config.json, so that they load where the file is not.

    Raises:
        ArchitectureError: no such file, or its content is no architecture; every fault is listed.
    """
    path = Path(file)
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArchitectureError(f"cannot read the architecture file {str(path)!r}: {error}") from None
    architecture = parse(path.stem, raw)
    _added.update(dict.fromkeys(architecture.models, architecture))
    return architecture


def architecture_of(model_type: str) -> Architecture:
    """The architecture of a ``model_type``.

    Raises:
        UnknownArchitectureError: when no file describes it; the message lists those that are.
    """
    known = catalogue()
    if model_type not in known:
        raise UnknownArchitectureError(
            f"no architecture file describes model_type {model_type!r}; known are {', '.join(sorted(known))}. "
            "One YAML file adds it: see 'Add an architecture' in CONTRIBUTING.md, and pliant.add_architecture"
        )
    return known[model_type]


def families() -> dict[str, str]:
    """model_type -> what of it can be cut."""
    return {
        model_type: ", ".join(_cuttable(architecture, spec) for spec in architecture.blocks)
        for model_type, architecture in sorted(catalogue().items())
    }


def _cuttable(architecture: Architecture, spec: BlockSpec) -> str:
    axes = [name for name in architecture.leaders(spec) if architecture.axes[name].cut]
    return f"{spec.kind} ({', '.join(axes) or 'whole only'})"

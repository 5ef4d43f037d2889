"""Architecture files: the blocks and axes of a model family, as data.

One YAML file beside this one describes the repeated layer of a family::

    models: [llama]                 # the ``model_type`` values of config.json that have this layout; or the class of a
                                    # plain module
    layers: model.layers            # where the list of layers is
    output: tensor                  # what a layer returns: a tensor (default) or a tuple that begins with it
    fixed: {hidden: hidden_size}    # dimensions that no sub-network changes: name -> config key
    axes:                           # dimensions that can shrink
      kv:      {size: num_key_value_heads, unit: head_dim}
      heads:   {size: num_attention_heads, unit: head_dim, follows: kv}
      experts: {size: num_local_experts, active: num_experts_per_tok}  # units of one token; a group keeps them
      wide:    {size: intermediate_size, multiple: 8}                  # cut only to multiples of 8, for a kernel
      whole:   {size: num_heads, unit: head_dim, cut: false}           # never cut
      rank:    {size: q_lora_rank, normed: true}                       # a norm runs over it: cutting is not zeroing
      shared:  {size: shared_size, least: 0}                           # the fewest units that can stay; default 1
      scan:    {size: num_heads, unit: head_dim, groups: n_groups}     # in equal groups; each keeps equally many
      state:   {size: state_size, copies: n_groups}                    # one copy after another, all cut alike
      steps:   {size: num_heads, follows: scan, only_with: state}      # gone once that axis has no units
      key:     {size: linear_num_key_heads, unit: linear_key_head_dim}
      value:   {size: linear_num_value_heads, unit: linear_value_head_dim, groups: key}   # the units of an axis as its
                                                                       # groups, which can be removed too
    blocks:                         # residual blocks, in the order in which they run
      attention:
        role: attention             # attention, mlp, experts, conv, scan or other; default: the block's name if it is
                                    # one of these, else attention if it has ``scores``, else other
        when: [full_attention]      # only in layers of these types (``layer_types`` in config.json); default: all
        needs: num_local_experts    # only in models whose config sets this key, and not to 0; default: all
        state: kv                   # the state between tokens: kv, conv, scan or a list of these; needs ``slot``
        tied: true                  # it may share tensors with this block of other layers: cut alike, counted once
        module: self_attn           # the module that computes f in ``x + f(norm(x))``; ``a or b`` is the first that
                                    # exists; see below for a list
        norms: [input_layernorm]    # the norms that are removed with it; ``a or b`` is the first that exists
        output: tuple               # the module returns a tensor (default) or (tensor, None)
        residual: 0                 # the argument to which the module itself adds f; omitted if the layer adds it
        guard: norm_eps             # a config key that transformers reads when it builds the layer. It is overridden
                                    # where the block is removed, so that transformers alone refuses: a float by the
                                    # next float, a size by 0. Default: the config's norm epsilon, or the keys of the
                                    # axes without one
        slot: layer_idx             # the attribute that names its cache slot; it makes kv the default state
        counts: layer_idx           # instead, if a call argument names the slot: the module in place of a removed one
                                    # adds a key of width 1 there, so that transformers still counts tokens
        inside: mixer               # another block of the layer, which reads its output: removed with that block
        passes: hidden              # the output of the module in its place: as many first elements of the input,
                                    # instead of zeros
        scores: heads               # the axis that attention scores are computed over (for counting MACs)
        scan_state: [scan, state]   # the axes that span the state of a scan; needed by a block with the state scan
        scan_macs: 4                # its multiply-accumulates per element and token; default 3: decay, input, readout;
                                    # a delta rule reads the state once more, before it writes
        cached: {multi_query: 1}    # heads in the cache if this config key is set (the first that is); else ``scores``
        attributes: {num_heads: heads, split_size: heads.width}    # plain attributes that must follow an axis: its
                                    # units, its ``width`` in elements, or that of one ``group``; a list is added up
        weights:
          q_proj: [heads, hidden]   # (out, in) of a linear layer; the bias follows ``out``
          qkv_proj: [[heads, kv, kv], hidden]    # a fused weight lists its parts
          packed: [{heads: 3}, hidden]           # 3 units wide per head, interleaved
          experts.down_proj: [experts, hidden, channels]    # a parameter: a stack of one matrix per expert
          q_norm?: [head]           # only some models of the family have it
          adapters.*.0: [heads, rank]    # a list with an entry for each layer that has the block; a cut of tied
                                    # blocks removes the entries of other layers
          odd: whole                # never cut, only removed with its block
          gate.correction: [experts]                     # a buffer is listed like a parameter
        transposed: [experts.up]    # stacks of matrices that are stored (in, out)
        elementwise: [gate.bias]    # tensors of two or more dimensions that are not matrices
        uncalled: [dt_proj]         # linear layers whose weight is read and which are never called: they are not packed
        rescale: [norm]             # a norm over an axis: its epsilon and its weight change when the axis narrows, so
                                    # that cutting equals zeroing. It is over each group alone if one of its attributes
                                    # holds the number or the width of groups
        skip: {D: state}            # a weight that alone remains of a scan once this axis has no units: weight -> axis
        roles: {q: q_proj, k: k_proj, v: v_proj, o: o_proj}    # the role of each weight, for native runs
    native:                         # optional: the parts that pliant's kernels need to run all layers in one call
      models:
        llama: {}
        smollm3: {window: sliding_window, rotates: use_rope}
      embedding: embed_tokens       # beside the list of layers, as are the next two
      norm: norm
      rotary: rotary_emb
      activation: hidden_act        # the config key of the MLP's activation
      scale: scaling                # the attribute of attention that its scores are multiplied by

An axis counts in units (heads, channels); ``unit`` is the width of one in elements. Sizes and units are numbers or
config keys, or sums and products of those (``a * b``, ``a // b``, ``a + b``). If a key may be absent, ``n_inner or 4 *
hidden_size`` gives its default. A size that no key of the family holds gets a key of pliant's own, which only the
config of a cut model has: ``shared_size or 2 * hidden_size``; or ``mlp_size or built`` if transformers computes the
size in a way that has no words here, so that only a built layer shows it. If f has no module of its own, ``module:
[fc1, fc2]`` lists the modules of the layer that compute it, and weights are named from the layer; the last module
returns f. A norm that several blocks of a layer list is shared and stays.

``groups`` and ``copies`` may name another axis instead of a number. Then each unit of that axis has one group, or one
copy, and it is removed with them; every group that stays keeps equally many units. The units kept of an axis in groups
are counted over all groups, so that their number does not depend on how many groups are kept. Of 8 value heads in 4
groups, ``value: 4`` with ``key: 3`` keeps one in each of three groups: 3 heads in all, the number in ``config.json``.
An axis that only names groups (those of Mamba-2, which no weight has) is read from the attribute that holds it.

A block whose layout differs between layers lists its variants::

      mlp:
        module: mlp
        norms: [norm]
        either:                     # the first whose weights all exist; it has no role, state, slot, tied, needs, guard
          - weights: {gate.weight: [experts, hidden], experts.up: [experts, channels, hidden]}
            attributes: {gate.num_experts: experts}
          - weights: {up_proj: [dense, hidden], down_proj: [hidden, dense]}

An axis exists only in the layers that have a weight on it. Blocks of different ``when`` may share a module path. The
last block of each layer type that keeps a state stays, because models count tokens in it. The ``weights`` of a
depthwise convolution are ``[[channels], one, kernel]`` with ``fixed: {one: 1}``; its sizes follow by themselves. Keys
that other families need but that are not supported yet are refused with an explanation: ``own``, ``scale``, ``stays``,
``parts``, ``part``, ``record``, ``has``.

The ``roles`` of an attention are q, k, v, o and, if it has them, q_norm and k_norm; those of an MLP are gate, up and
down. ``native`` lists the model types whose layers have an RMS norm before each block, rotary positions, softmax
attention and a gated MLP. Each type names the attributes of its attention that hold the number of tokens a token
attends to (``window``) and whether it applies rotary positions (``rotates``); ``config.x`` is a key of the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pliant.errors import ArchitectureError


@dataclass(frozen=True)
class AxisSpec:
    """A dimension of a block: the config key of its size, the width of one unit, and the axis it follows.

    Attributes:
        cut: whether a sub-network may choose its width.
        active: the config key that holds how many units one token uses (experts); None if it uses all.
        multiple: a cut axis keeps a multiple of this many units.
        normed: a norm is taken over all units together, so cutting a unit differs from zeroing it.
        least: the fewest units that can stay.
        groups: number of equal groups that the units are in, or the axis whose units they are; every group keeps
            equally many.
        copies: how often the units are repeated in a tensor dimension, or the axis whose units have one copy each; all
            copies are cut alike.
        only_with: the axis without whose units it is gone; None if it does not depend on one.
    """

    size: str
    unit: int | str = 1
    follows: str | None = None
    cut: bool = True
    active: str | None = None
    multiple: int = 1
    normed: bool = False
    least: int = 1
    groups: int | str = 1
    copies: int | str = 1
    only_with: str | None = None

    @property
    def built(self) -> bool:
        """Whether only a built layer shows the size, unless the config has the key."""
        return BUILT in self.size.split()

    @property
    def config_key(self) -> str | None:
        """The config key that holds the size; None if the size is computed from others."""
        first = self.size.split(" or ")[0]
        return first if first.isidentifier() else None


@dataclass(frozen=True)
class Part:
    """A stretch of a tensor dimension: ``factor`` units of ``axis`` side by side for each kept unit."""

    axis: str
    factor: int = 1


WHOLE = "whole"
BUILT = "built"
"""The last alternative of a size that only a layer shows that transformers has built."""
EMPTY_STATE = "_pliant_empty_state"
"""Mark of a scan function of transformers that pliant has replaced by one that runs with a state of size 0."""
ROLES = ("attention", "mlp", "experts", "conv", "scan", "other")
STATES = ("kv", "conv", "scan")
MEASURES = ("width", "group")
"""Measures of an axis that an attribute may hold, besides its units: elements in all, or in one of its groups."""
WEIGHT_ROLES = ("q", "k", "v", "o", "q_norm", "k_norm", "gate", "up", "down")


@dataclass(frozen=True)
class BlockSpec:
    """One residual block of the repeated layer.

    Attributes:
        modules: the modules that compute f; the last one returns it.
        weights: name -> axes of each dimension, or None for a weight that is never cut.
        optional: the weights that only some models of the family have.
        residual: the argument to which the module adds f; None if the layer adds it.
        guard: the config key that is overridden where the block is removed, so that transformers alone refuses the
            config; None for the norm epsilon, or the keys of its axes.
        scan_state: the axes, or fixed dimensions, that span the state of its scan.
        scan_macs: multiply-accumulates for an element of the state of its scan and a token.
        cached: config key -> number of heads in the cache if this is the first key that is set.
        roles: role -> name of the weight.
        role: the kind of block: attention, mlp, experts, conv, scan or other.
        state: the states that it keeps between tokens; empty if none.
        when: the types of the layers that have it; None for all layers.
        needs: the config key without which a model does not have it; None if every model of the family has it.
        either: the layouts that it may have; the first whose weights all exist applies.
        transposed: stacks of matrices that are stored (in, out).
        elementwise: weights of two or more dimensions that are not matrices.
        uncalled: linear layers whose weight is read and which are never called.
        rescale: norms over an axis, whose epsilon and weight make up for a narrower axis.
        skip: a weight that alone remains of a scan -> the axis without whose units the scan is gone.
        tied: its tensors may be shared with the same block of other layers.
        counts: the call argument that names its cache slot, if no attribute does; a removed block still counts tokens.
        inside: the block of the layer that reads its output, so that it has no effect without that block.
        passes: the dimension of the input that the module in its place passes on; None if that returns zeros.
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
    scan_state: tuple[str, ...] = ()
    scan_macs: int = 3
    cached: dict[str, int | str] | None = None
    attributes: dict[str, tuple[str, ...]] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    role: str = "other"
    state: tuple[str, ...] = ()
    when: tuple[str, ...] | None = None
    needs: str | None = None
    either: tuple[BlockSpec, ...] = ()
    transposed: frozenset[str] = frozenset()
    elementwise: frozenset[str] = frozenset()
    uncalled: frozenset[str] = frozenset()
    rescale: frozenset[str] = frozenset()
    skip: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    counts: str | None = None
    inside: str | None = None
    passes: str | None = None

    @property
    def layouts(self) -> tuple[BlockSpec, ...]:
        """Its variants, or itself if it has only one layout."""
        return self.either or (self,)

    @property
    def module(self) -> str:
        """The module that returns f."""
        return self.modules[-1]

    def at(self, position: int, modules: tuple[str, ...]) -> BlockSpec:
        """The block in one layer.

        Arguments:
            position: number of the layer among those that have the block, which ``*`` in names of weights stands for.
            modules: its modules in this layer.
        """

        def named(names: Iterable[str]) -> dict[str, str]:
            return {name: name.replace("*", str(position)) for name in names}

        weights = named(self.weights)
        return replace(
            self,
            modules=modules,
            weights={weights[name]: dims for name, dims in self.weights.items()},
            optional=frozenset(named(self.optional).values()),
        )

    @property
    def lists(self) -> tuple[str, ...]:
        """The lists of its weights that have an entry for each layer that has the block."""
        return tuple(dict.fromkeys(name.partition(".*")[0] for name in self.weights if "*" in name))

    @property
    def prefix(self) -> str:
        """The prefix of its weights' names inside the layer."""
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

    def of(self, plain: Any) -> Architecture:
        """The architecture without the blocks that a model does not have.

        Arguments:
            plain: the dense model's config.
        """
        return replace(self, blocks=tuple(b for b in self.blocks if b.needs is None or getattr(plain, b.needs, None)))

    def blocks_of(self, layer_type: str) -> tuple[BlockSpec, ...]:
        """The blocks that a layer of this type has."""
        return tuple(block for block in self.blocks if block.when is None or layer_type in block.when)

    def inside(self, kind: str) -> tuple[str, ...]:
        """The kinds of the blocks that a block is inside of, from the innermost."""
        outer = next(block.inside for block in self.blocks if block.kind == kind)
        return () if outer is None else (outer, *self.inside(outer))

    def leader(self, axis: str) -> str:
        """The axis that an axis follows, or itself: ``heads`` follows ``kv`` in grouped-query attention."""
        return self.axes[axis].follows or axis

    def leaders(self, block: BlockSpec) -> tuple[str, ...]:
        """The axes of a block that follow no other axis, in file order."""
        weights = (dims for layout in block.layouts for dims in layout.weights.values())
        used = {part.axis for dims in weights for dim in dims or () for part in dim}
        used |= {named for name in used & set(self.axes) for named in self.named_by(name)}
        return tuple(name for name, axis in self.axes.items() if axis.follows is None and name in used)

    def named_by(self, axis: str) -> tuple[str, ...]:
        """The axes whose units are the groups or copies of an axis."""
        named = (self.axes[self.leader(axis)].groups, self.axes[axis].copies)
        return tuple(str(name) for name in named if name in self.axes)


def factors(alternative: str) -> list[list[str]]:
    """Split one alternative of a size into the products of its sum: ``a * b + c`` into ``[["a", "*", "b"], ["c"]]``.

    Raises:
        ArchitectureError: it does not alternate between operands (numbers, config keys) and operators (``+``, ``*``,
            ``//``).
    """
    words = alternative.split()
    fine = len(words) % 2 == 1 and all(word.isdigit() or word.isidentifier() for word in words[::2])
    if not fine or not all(word in ("+", "*", "//") for word in words[1::2]):
        raise ArchitectureError(
            f"{alternative!r} is not a size; give a number, a config key, or several of them joined by '+', '*' "
            "and '//'"
        )
    terms: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            terms.append([])
        else:
            terms[-1].append(word)
    return terms

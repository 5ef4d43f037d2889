"""The model that is exported, as containers see it: its blocks in running order, and the names of their parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pliant.anatomy import Anatomy, Axis, Block, anatomy_of, plain_config, text_config_of
from pliant.exporters.gguf.plan import Rows, Unfit, stored_of
from pliant.runtime.packed_linear import Packed

MIXERS = ("attention", "scan", "conv")
_NAMES = {  # role of a weight -> its names in architecture files without roles
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "out_proj"),
    "q_norm": ("q_norm", "q_layernorm"),
    "k_norm": ("k_norm", "k_layernorm"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "c_fc"),
    "down": ("down_proj", "w2", "c_proj", "experts.down_proj", "output_linear"),
    "qkv": ("qkv_proj",),
    "gate_up": ("gate_up_proj", "experts.gate_up_proj", "input_linear"),
    "router": ("gate.weight", "router.weight"),
    "shared_router": ("shared_expert_gate",),
    "shared_gate": ("shared_expert.gate_proj",),
    "shared_up": ("shared_expert.up_proj",),
    "shared_down": ("shared_expert.down_proj",),
}
_FUSED = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "gate": ("gate_up", 0), "up": ("gate_up", 1)}


class Pair(NamedTuple):
    """One layer of a file: a block that mixes tokens, and the MLP or the experts after it."""

    mixer: Block | None
    mlp: Block | None


class Source:
    """A model and its anatomy.

    Attributes:
        config: that of the text model; keys that differ from layer to layer have their dense value.

    Raises:
        Unfit: the model was read without an architecture file.
    """

    def __init__(self, model: Any):
        self.model = model
        self.anatomy: Anatomy = anatomy_of(model)
        if self.anatomy.traced:
            raise Unfit(f"{type(model).__name__} has no architecture file")
        self.config = plain_config(text_config_of(model.config))
        self.kind: str = self.config.model_type

    def of_role(self, role: str) -> list[Block]:
        """The blocks of a role, in running order."""
        return [block for block in self.anatomy.blocks.values() if block.role == role]

    def module(self, block: Block) -> Any:
        """The module that computes a block."""
        return self.model.get_submodule(f"{self.anatomy.architecture.layers}.{block.layer}.{block.spec.module}")

    def layers(self) -> list[Pair]:
        """The blocks of each layer; layers without blocks are left out."""
        found: dict[int, Pair] = {}
        for block in self.anatomy.blocks.values():
            pair = found.setdefault(block.layer, Pair(None, None))
            found[block.layer] = pair._replace(mixer=block) if block.role in MIXERS else pair._replace(mlp=block)
        return [found[layer] for layer in sorted(found)]

    def beside(self, block: Block | None) -> dict[str, Block]:
        """Role -> block of the same layer, itself included; empty for None."""
        return {} if block is None else {o.role: o for o in self.anatomy.blocks.values() if o.layer == block.layer}

    def pairs(self) -> list[Pair]:
        """The blocks in running order, a mixer with the MLP that follows it; layers without blocks are left out.

        The MLP may come from a later layer of the model, because blocks are a chain.
        """
        found: list[Pair] = []
        for block in self.anatomy.blocks.values():
            if block.role in MIXERS:
                found.append(Pair(block, None))
            elif found and found[-1].mlp is None:
                found[-1] = Pair(found[-1].mixer, block)
            else:
                found.append(Pair(None, block))
        return found

    def rows(self, block: Block, role: str, order: torch.Tensor | None = None, factor: float = 1.0) -> Rows:
        """The weight that has a role in a block, or its rows of a weight that holds several roles.

        Raises:
            Unfit: the block has none.
        """
        name, dim, part = self._place(block, role)
        path = self.path(block, name)
        dims = block.spec.weights[name]
        if dims is None or len(dims[dim]) == 1:
            return Rows(path, order, factor=factor)
        widths = [block.axes[one.axis].size * block.axes[one.axis].unit * one.factor for one in dims[dim]]
        start = sum(widths[:part])
        stretch = torch.arange(start, start + widths[part])
        return Rows(path, stretch if order is None else stretch[order], dim, factor)

    def named(self, block: Block, role: str) -> str | None:
        """The name of the weight that has a role in a block, from its architecture file or by convention."""
        names = (block.spec.roles[role],) if role in block.spec.roles else _NAMES.get(role, ())
        return next((name for name in names if name in block.spec.weights), None)

    def path(self, block: Block, name: str) -> str:
        """The full name of a weight by its name in the architecture file: that of a parameter, or of its module."""
        inside = f"{block.spec.prefix}{name}"
        own = inside if any(weight.path == inside for weight in block.weights) else f"{inside}.weight"
        return f"{self.anatomy.architecture.layers}.{block.layer}.{own}"

    def norm(self, block: Block, number: int = 0) -> Rows:
        """The weight of a norm of a block."""
        layer = f"{self.anatomy.architecture.layers}.{block.layer}"
        names = block.spec.norms[number].split(" or ")
        has = self.model.get_submodule(layer)
        name = next((name for name in names if getattr(has, name, None) is not None), names[0])
        return Rows(f"{layer}.{name}.weight")

    def bias(self, rows: Rows) -> Rows | None:
        """The bias beside a weight, in the same order; None if there is none."""
        owner, _, last = rows.source.rpartition(".")
        has = last == "weight" and getattr(self.model.get_submodule(owner), "bias", None) is not None
        return Rows(f"{owner}.bias", rows.order, rows.dim, rows.factor) if has else None

    def shape(self, rows: Rows) -> tuple[int, ...]:
        """The shape of these rows."""
        stored = stored_of(self.model, rows.source)
        shape = (stored.out_features, stored.in_features) if isinstance(stored, Packed) else tuple(stored.shape)
        if rows.order is None:
            return shape
        return (*shape[: rows.dim], len(rows.order), *shape[rows.dim + 1 :])

    def units(self, block: Block | None, role: str) -> int:
        """Units of the axis that the outputs of a weight lie on: heads of q, channels of gate; 0 without a block."""
        return 0 if block is None else self.axis(block, role).size

    def head_width(self) -> int:
        """The width of a head, which is the same in all layers.

        Raises:
            Unfit: it is not, or no layer has an attention.
        """
        widths = {self.axis(block, "q").unit for block in self.of_role("attention")}
        if len(widths) != 1:
            raise Unfit("its heads have different widths" if widths else "no attention is left")
        return widths.pop()

    def window(self) -> int | None:
        """The shortest sliding window of a layer; None if every layer reads all tokens."""
        attentions = [self.module(block) for block in self.of_role("attention")]
        windows = [getattr(attention, "sliding_window", None) for attention in attentions]
        if not hasattr(self.config, "layer_types") and not any(hasattr(one, "sliding_window") for one in attentions):
            windows = [getattr(self.config, "sliding_window", None)]  # of all layers
        return min((window for window in windows if window), default=None)

    def axis(self, block: Block, role: str) -> Axis:
        """The axis that the outputs of a weight lie on.

        Raises:
            Unfit: the block has no such weight.
        """
        name, dim, part = self._place(block, role)
        dims = block.spec.weights[name]
        if dims is None:
            raise Unfit(f"{block.name} has no separate weight of the role {role!r}")
        return block.axes[dims[dim][part].axis]

    def _place(self, block: Block, role: str) -> tuple[str, int, int]:
        """The weight that has a role in a block, the dimension that its outputs lie on, and its stretch of that."""
        if (name := self.named(block, role)) is not None:
            return name, 0, 0
        fused, part = _FUSED.get(role, ("", 0))
        if (name := self.named(block, fused)) is None:
            raise Unfit(f"{block.name} has no separate weight of the role {role!r}")
        dims = block.spec.weights[name] or ()
        return name, next(number for number, parts in enumerate(dims) if len(parts) > 1), part

    def embedding(self) -> Rows:
        """The embedding of the tokens."""
        return Rows(self._name_of(self.model.get_input_embeddings()) + ".weight")

    def output(self) -> Rows | None:
        """The output head; None if it is the embedding."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not isinstance(head, Packed) and head.weight is embedding.weight:
            return None
        if getattr(head, "bias", None) is not None:
            raise Unfit("its output head has a bias")
        return Rows(self._name_of(head) + ".weight")

    def final_norm(self) -> Rows:
        """The norm before the output head: the only module of the base model with parameters outside layers and
        embedding."""
        base, layers = self.model.base_model, self.anatomy.architecture.layers + "."
        embedding = self.embedding().source
        own = {
            name.rpartition(".")[0]
            for name, _ in base.named_parameters(prefix=self._name_of(base))
            if name != embedding and not name.startswith(layers)
        }
        if len(own) != 1:
            raise Unfit(f"{type(base).__name__} has other parameters than layers, embedding and a norm")
        return Rows(f"{own.pop()}.weight")

    def _name_of(self, module: Any) -> str:
        return next(name for name, one in self.model.named_modules() if one is module)

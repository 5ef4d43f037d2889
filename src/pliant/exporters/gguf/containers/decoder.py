"""Base of the containers whose layers are an attention and an MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from pliant.anatomy import Block
from pliant.exporters.gguf.plan import Plan, Rows, Tensor, Unfit
from pliant.exporters.gguf.rope import LONG, pairwise, rope_of
from pliant.exporters.gguf.source import Pair, Source

EMPTY = 32  # channels of an MLP that adds nothing: the shortest row that every type can store
ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
HEAD_NORMS = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")  # config keys, by family
QKV = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}
MLP = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


class Decoder:
    """One architecture of llama.cpp. A subclass says which models it carries, and how its readers compute.

    Attributes:
        name: ``general.architecture``.
        models: the ``model_type`` of the models that it carries.
        uneven: heads, key-value heads and MLP widths may differ from layer to layer.
        headless: a layer may have no attention, except the first.
        square: heads times their width must be the hidden size.
        pairs: its readers rotate neighbouring dimensions of a head; transformers rotates its two halves.
        partial: a head may have dimensions that do not rotate.
        rope_tensors: divisors of frequencies that its readers know.
        activations: of the MLPs.
        biases: roles of weights that may have a bias.
        head_norms: q and k are normed.
        gated_heads: q has, after the rows of each head, as many that gate its output.
        gated: an MLP has a gate.
        layer_norm: its norms subtract the mean, and may have a bias.
        norm_shift: transformers adds this to the weights of its norms, and readers do not.
        norms: role of a block -> the names of its norms, in the order of the architecture file.
        joined: name of a matrix -> the names of those that it holds one after another.
        tied: the output head is always the embedding.
        own_head: the file needs an output head, and so the embedding twice if it is the head.
        constants: config key -> key of the file; constants without a key are multiplied into weights.
        period: every so many-th layer lacks what this attribute of an attention says; None if all layers are alike.
    """

    name: ClassVar[str]
    models: ClassVar[Sequence[str]]
    uneven: ClassVar[bool] = False
    headless: ClassVar[bool] = False
    square: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    partial: ClassVar[bool] = False
    rope_tensors: ClassVar[Sequence[str]] = ()
    activations: ClassVar[Sequence[str]] = ("silu", "swish")
    biases: ClassVar[Sequence[str]] = ()
    head_norms: ClassVar[bool] = False
    gated_heads: ClassVar[bool] = False
    gated: ClassVar[bool] = True
    layer_norm: ClassVar[bool] = False
    norm_shift: ClassVar[float] = 0.0
    norms: ClassVar[Mapping[str, Sequence[str]]] = {"attention": ("attn_norm",), "mlp": ("ffn_norm",)}
    joined: ClassVar[Mapping[str, Sequence[str]]] = {}
    tied: ClassVar[bool] = False
    own_head: ClassVar[bool] = False
    constants: ClassVar[Mapping[str, str]] = {}
    period: ClassVar[tuple[int, str] | None] = None

    def plan(self, source: Source) -> Plan:
        """The file of a model.

        Raises:
            Unfit: this container does not carry it.
        """
        plan = Plan(self.name)
        layers, width = self.layers(source), source.head_width()
        self.check(source, width)
        keys, divisors = self.rope(source, width)
        if LONG in divisors:
            plan.notes.append(
                f"readers with room for more than {keys['.rope.scaling.original_context_length']} tokens use the "
                "positions of long texts for short ones, too"
            )
        heads = [source.units(pair.mixer, "q") for pair in layers]
        kv = [source.units(pair.mixer, "k") for pair in layers]
        channels = [source.units(pair.mlp, "up") for pair in layers]
        for number, count in enumerate(heads):
            if not count and not (self.headless and number):
                heads[number] = kv[number] = 1
                plan.notes.append(f"layer {number} of the file has an attention of one head that adds nothing")
        for number, count in enumerate(channels):
            if not count:
                channels[number] = EMPTY
                plan.notes.append(f"layer {number} of the file has an MLP of {EMPTY} channels that adds nothing")
        if self.square and heads[0] * width != source.config.hidden_size:
            raise Unfit(f"{self.name} has {source.config.hidden_size // width} heads of {width}, and it has {heads[0]}")
        plan.metadata = {
            ".block_count": len(layers),
            ".context_length": self.context(source, plan),
            ".embedding_length": source.config.hidden_size,
            ".feed_forward_length": self._listed("MLP widths", channels),
            ".attention.head_count": self._listed("numbers of heads", heads),
            ".attention.head_count_kv": self._listed("numbers of key-value heads", kv),
            ".attention.key_length": width,
            ".attention.value_length": width,
            f".attention.layer_norm_{'' if self.layer_norm else 'rms_'}epsilon": self.epsilon(source),
            **keys,
            **{key: _constant(source, name) for name, key in self.constants.items()},
            **self.more(source),
        }
        factors = self._factors(source, self.scale(source, width, heads[0], len(layers)))
        plan.tensors += self._ends(source, factors)
        for name, values in divisors.items():
            plan.tensors.append(Tensor(name, tuple(values.shape), change=lambda _, values=values: values, plain=True))
        for number, pair in enumerate(layers):
            sizes = {"q": heads[number] * width, "k": kv[number] * width, "up": channels[number]}
            found = self.attention(source, pair.mixer, sizes, factors) if heads[number] else []
            found += self.mlp(source, pair.mlp, sizes, factors)
            plan.tensors += [replace(one, name=f"blk.{number}.{one.name}") for one in self._join(found)]
        return plan

    def check(self, source: Source, width: int) -> None:  # noqa: ARG002
        """Refuse what the readers of this container do not compute.

        Arguments:
            width: of a head.
        """
        config = source.config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in self.activations:
            raise Unfit(f"its MLPs have the activation {activation}, and {self.name} computes {self.activations[0]}")

    def epsilon(self, source: Source) -> float:
        """That of all norms."""
        return float(next(getattr(source.config, key) for key in EPSILONS if hasattr(source.config, key)))

    def rope(self, source: Source, width: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The metadata of rotary positions, and tensors of divisors."""
        keys, divisors = rope_of(source.config, width)
        if keys[".rope.dimension_count"] != width and not self.partial:
            raise Unfit(f"only {keys['.rope.dimension_count']} of {width} dimensions of a head rotate")
        if other := sorted(set(divisors) - set(self.rope_tensors)):
            raise Unfit(f"{self.name} does not read {', '.join(other)}, which its rotary positions need")
        return keys, divisors

    def scale(self, source: Source, width: int, heads: int, depth: int) -> float:  # noqa: ARG002
        """The number that readers multiply attention scores by.

        Arguments:
            heads: of the first layer.
            depth: layers of the file.
        """
        scaled = "attention_multiplier" in self.constants
        return _constant(source, "attention_multiplier") if scaled else width**-0.5

    def more(self, source: Source) -> Mapping[str, Any]:  # noqa: ARG002
        """Keys that only this container has."""
        return {}

    def _factors(self, source: Source, scale: float) -> Mapping[str, float]:
        """Constants of the model that its weights take up, by role; ``embedding``, ``norm`` and ``output`` for those
        outside the layers."""
        scales = {source.module(block).scaling for block in source.of_role("attention")}
        if len(scales) != 1:
            raise Unfit("its attentions are scaled by different numbers")
        ratio = scales.pop() / scale
        query = 1.0 if math.isclose(ratio, 1, rel_tol=1e-6) else ratio
        residual, embedding, logits = (
            1.0 if name in self.constants else _constant(source, name)
            for name in ("residual_multiplier", "embedding_multiplier", "logits_scaling")
        )
        return {
            **dict.fromkeys(("k", "v", "gate", "up", "k_norm"), 1.0),
            "q": 1.0 if self.head_norms else query,
            "q_norm": query,
            "o": residual,
            "down": residual,
            "embedding": embedding,
            "norm": 1.0 if source.output() else 1 / (logits * embedding),
            "output": 1 / logits,
        }

    def layers(self, source: Source) -> list[Pair]:
        """The layers of the file."""
        found = source.pairs()
        if not found:
            raise Unfit("no block is left")
        if not self.uneven:
            for pair in found:
                if pair.mixer is None or pair.mlp is None:
                    block, lacks = (pair.mlp, "attention") if pair.mixer is None else (pair.mixer, "MLP")
                    raise Unfit(f"{block and block.name} has no {lacks} beside it, as every layer of {self.name} has")
        if self.period is not None:
            every, attribute = self.period
            for number, pair in enumerate(found):
                has = (number + 1) % every != 0
                if pair.mixer and bool(getattr(source.module(pair.mixer), attribute)) != has:
                    raise Unfit(
                        f"{pair.mixer.name} would be layer {number} of the file, where readers of {self.name} "
                        f"{'expect' if has else 'expect no'} {attribute}: layers can only be removed by whole periods "
                        f"of {every}"
                    )
        return found

    def attention(
        self, source: Source, block: Block | None, sizes: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The tensors of an attention and its norms; of zeros for None."""
        hidden, width = source.config.hidden_size, source.head_width()
        rows = {"q": sizes["q"] * (2 if self.gated_heads else 1), "k": sizes["k"], "v": sizes["k"]}
        shapes = {role: (count, hidden) for role, count in rows.items()} | {"o": (hidden, sizes["q"])}
        if block is None:
            found = [Tensor(f"{name}.weight", (hidden,)) for name in self.norms["attention"]]
            found += [Tensor(f"{HEAD_NORMS[role]}.weight", (width,)) for role in HEAD_NORMS if self.head_norms]
            return [*found, *(Tensor(f"{ATTENTION[role]}.weight", shape) for role, shape in shapes.items())]
        found = self._norms(source, block)
        for role, name in HEAD_NORMS.items():
            if (source.named(block, role) is not None) != self.head_norms:
                raise Unfit(f"{self.name} {'needs' if self.head_norms else 'has no'} norms of q and k")
            if self.head_norms:
                found.append(self._norm(source, name, source.rows(block, role, None, factors[role])))
        rotated = self.rope(source, width)[0][".rope.dimension_count"] if self.pairs else 0
        for role, shape in shapes.items():
            turned = pairwise(shape[0] // width, width, rotated) if rotated and role in ("q", "k") else None
            found += self._linear(source, ATTENTION[role], source.rows(block, role, turned, factors[role]), shape, role)
        return found

    def mlp(
        self, source: Source, block: Block | None, sizes: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The tensors of an MLP and its norms; of zeros for None."""
        hidden, channels = source.config.hidden_size, sizes["up"]
        shapes = {"gate": (channels, hidden)} if self.gated else {}
        shapes |= {"up": (channels, hidden), "down": (hidden, channels)}
        if block is None:
            found = [Tensor(f"{name}.weight", (hidden,)) for name in self.norms["mlp"]]
            return [*found, *(Tensor(f"{MLP[role]}.weight", shape) for role, shape in shapes.items())]
        found = self._norms(source, block)
        for role, shape in shapes.items():
            rows = source.rows(block, role, None, factors[role])
            found += self._linear(source, MLP[role], rows, shape, role)
        return found

    def _ends(self, source: Source, factors: Mapping[str, float]) -> list[Tensor]:
        """The tensors outside the layers."""
        embedding, norm, output = source.embedding(), source.final_norm(), source.output()
        found = [
            Tensor("token_embd.weight", source.shape(embedding), (replace(embedding, factor=factors["embedding"]),)),
            *self._normed(source, "output_norm", replace(norm, factor=factors["norm"])),
        ]
        if output is None and self.own_head:
            return [*found, replace(found[0], name="output.weight")]
        if output is None:
            return found
        if self.tied:
            raise Unfit(f"its output head is not its embedding, which it is in {self.name}")
        return [*found, Tensor("output.weight", source.shape(output), (replace(output, factor=factors["output"]),))]

    def _norms(self, source: Source, block: Block) -> list[Tensor]:
        names = self.norms[block.role]
        if len(names) != len(block.spec.norms):
            raise Unfit(f"{block.name} has {len(block.spec.norms)} norms, and {self.name} has {len(names)}")
        return [
            tensor
            for number, name in enumerate(names)
            for tensor in self._normed(source, name, source.norm(block, number))
        ]

    def _normed(self, source: Source, name: str, rows: Rows) -> list[Tensor]:
        """The weight of a norm, and its bias if readers have one."""
        found = [self._norm(source, name, rows)]
        bias = source.bias(rows)
        if bias is not None and self.layer_norm:
            found.append(Tensor(f"{name}.bias", source.shape(rows), (bias,), plain=True))
        elif bias is not None or self.layer_norm:
            has = "has a bias" if bias else "has no bias"
            raise Unfit(f"{rows.source.removesuffix('.weight')} {has}, unlike the norms of {self.name}")
        return found

    def _norm(self, source: Source, name: str, rows: Rows) -> Tensor:
        shape, shift, factor = source.shape(rows), self.norm_shift, rows.factor
        if not shift:
            return Tensor(f"{name}.weight", shape, (rows,), plain=True)
        change = lambda values: (values + shift) * factor  # noqa: E731
        return Tensor(f"{name}.weight", shape, (replace(rows, factor=1.0),), change, plain=True)

    def _join(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors of a layer, with those of ``joined`` as one."""
        found = {tensor.name: tensor for tensor in tensors}
        for name, names in self.joined.items():
            parts = [found.pop(f"{one}.weight") for one in names]
            rows = sum(part.shape[0] for part in parts)
            sources = tuple(rows for part in parts for rows in part.parts)
            found[name] = Tensor(f"{name}.weight", (rows, *parts[0].shape[1:]), sources)
        return list(found.values())

    def _linear(self, source: Source, name: str, rows: Rows, shape: tuple[int, ...], role: str) -> list[Tensor]:
        """A weight, and its bias if it has one."""
        if source.shape(rows) != shape:
            raise Unfit(f"{rows.source} has shape {source.shape(rows)}, and {self.name} expects {shape}")
        found = [Tensor(f"{name}.weight", shape, (rows,))]
        if (bias := source.bias(rows)) is not None:
            if role not in self.biases:
                raise Unfit(f"{rows.source.removesuffix('.weight')} has a bias, and {self.name} has none there")
            found.append(Tensor(f"{name}.bias", shape[:1], (bias,), plain=True))
        return found

    def _listed(self, what: str, values: Sequence[int]) -> list[int] | int:
        """The value of a key: a list where layers may differ, else the one number of all."""
        if self.uneven:
            return list(values)
        if len(set(values)) > 1:
            raise Unfit(f"its {what} differ from layer to layer, and {self.name} has one for all")
        return values[0]

    def context(self, source: Source, plan: Plan) -> int:
        """The longest text. Where readers attend to all of it, a model with sliding windows is exact within one."""
        context: int = source.config.max_position_embeddings
        window = source.window()
        if window is None or window >= context:
            return context
        plan.notes.append(f"its attention reads {window} tokens; the context length of the file is therefore {window}")
        return window


def _constant(source: Source, name: str) -> float:
    return float(getattr(source.config, name, 1.0))

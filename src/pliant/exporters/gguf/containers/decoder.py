"""Base of the containers whose layers are an attention and an MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pliant.anatomy import Block
from pliant.exporters.gguf.plan import Plan, Rows, Tensor, Unfit
from pliant.exporters.gguf.rope import FREQUENCIES, pairwise, rope_of
from pliant.exporters.gguf.source import Pair, Source

EMPTY = 32  # channels of an MLP that adds nothing: the shortest row that every type can store
ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
HEAD_NORMS = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
MLP = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


class Decoder:
    """One architecture of llama.cpp. A subclass says which models it carries, and how its readers compute.

    Attributes:
        name: ``general.architecture``.
        models: the ``model_type`` of the models that it carries.
        uneven: heads, key-value heads and MLP widths may differ from layer to layer.
        headless: a layer may have no attention, except the first.
        pairs: its readers rotate neighbouring dimensions of a head; transformers rotates its two halves.
        biases: roles of weights that may have a bias.
        head_norms: q and k are normed.
        tied: the output head is always the embedding.
        ordered: its readers compute layers differently by their number, so a block stays in its layer.
        norms: role of a block -> the names of its norms, in the order of the architecture file.
    """

    name: ClassVar[str]
    models: ClassVar[Sequence[str]]
    uneven: ClassVar[bool] = False
    headless: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    biases: ClassVar[Sequence[str]] = ()
    head_norms: ClassVar[bool] = False
    tied: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    norms: ClassVar[Mapping[str, Sequence[str]]] = {"attention": ("attn_norm",), "mlp": ("ffn_norm",)}

    def plan(self, source: Source) -> Plan:
        """The file of a model.

        Raises:
            Unfit: this container does not carry it.
        """
        plan = Plan(self.name)
        layers, width = self.layers(source), source.head_width()
        self.check(source, width)
        keys, divisors = rope_of(source.config, width)
        heads = [source.units(pair.mixer, "q") for pair in layers]
        kv = [source.units(pair.mixer, "k") for pair in layers]
        channels = [source.units(pair.mlp, "gate") for pair in layers]
        for number, count in enumerate(heads):
            if not count and not (self.headless and number):
                heads[number] = kv[number] = 1
                plan.notes.append(f"layer {number} of the file has an attention of one head that adds nothing")
        for number, count in enumerate(channels):
            if not count:
                channels[number] = EMPTY
                plan.notes.append(f"layer {number} of the file has an MLP of {EMPTY} channels that adds nothing")
        plan.metadata = {
            ".block_count": len(layers),
            ".context_length": self._context(source, plan),
            ".embedding_length": source.config.hidden_size,
            ".feed_forward_length": self._listed("MLP widths", channels),
            ".attention.head_count": self._listed("numbers of heads", heads),
            ".attention.head_count_kv": self._listed("numbers of key-value heads", kv),
            ".attention.key_length": width,
            ".attention.value_length": width,
            ".attention.layer_norm_rms_epsilon": float(source.config.rms_norm_eps),
            **keys,
            **self.more(source),
        }
        factors = self.factors(source, width)
        plan.tensors += self._ends(source, factors)
        if divisors is not None:
            values = divisors
            plan.tensors.append(Tensor(FREQUENCIES, tuple(values.shape), change=lambda _: values, plain=True))
        for number, pair in enumerate(layers):
            sizes = {"q": heads[number] * width, "k": kv[number] * width, "gate": channels[number]}
            found = self.attention(source, pair.mixer, sizes, factors) if heads[number] else []
            found += self.mlp(source, pair.mlp, sizes, factors)
            plan.tensors += [replace(tensor, name=f"blk.{number}.{tensor.name}") for tensor in found]
        return plan

    def check(self, source: Source, width: int) -> None:
        """Refuse what the readers of this container do not compute.

        Arguments:
            width: of a head.
        """
        if (activation := source.config.hidden_act) not in ("silu", "swish"):
            raise Unfit(f"its MLPs have the activation {activation}, and {self.name} computes silu")
        expected = width**-0.5 * self.factors(source, width)["q"]
        for block in source.of_role("attention"):
            if not math.isclose(scale := source.module(block).scaling, expected, rel_tol=1e-6):
                raise Unfit(f"its attention is scaled by {scale:g}, and {self.name} scales by {expected:g}")

    def factors(self, source: Source, width: int) -> Mapping[str, float]:  # noqa: ARG002
        """Constants of the model that its weights take up, by role; ``embedding``, ``norm`` and ``output`` for those
        outside the layers."""
        return dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down", "embedding", "norm", "output"), 1.0)

    def more(self, source: Source) -> Mapping[str, Any]:  # noqa: ARG002
        """Keys that only this container has."""
        return {}

    def layers(self, source: Source) -> list[Pair]:
        """The layers of the file."""
        found = source.layers() if self.ordered else source.pairs()
        if not found:
            raise Unfit("no block is left")
        if not self.uneven:
            for pair in found:
                if pair.mixer is None or pair.mlp is None:
                    block, lacks = (pair.mlp, "attention") if pair.mixer is None else (pair.mixer, "MLP")
                    raise Unfit(f"{block and block.name} has no {lacks} beside it, as every layer of {self.name} has")
        return found

    def attention(
        self, source: Source, block: Block | None, sizes: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The tensors of an attention and its norms; of zeros for None."""
        hidden, width = source.config.hidden_size, source.head_width()
        shapes = {"q": (sizes["q"], hidden), "k": (sizes["k"], hidden), "v": (sizes["k"], hidden)}
        shapes |= {"o": (hidden, sizes["q"])}
        if block is None:
            found = [Tensor(f"{name}.weight", (hidden,)) for name in self.norms["attention"]]
            found += [Tensor(f"{HEAD_NORMS[role]}.weight", (width,)) for role in HEAD_NORMS if self.head_norms]
            return [*found, *(Tensor(f"{ATTENTION[role]}.weight", shape) for role, shape in shapes.items())]
        found = self._norms(source, block)
        for role, name in HEAD_NORMS.items():
            if (source.named(block, role) is not None) != self.head_norms:
                raise Unfit(f"{self.name} {'needs' if self.head_norms else 'has no'} norms of q and k")
            if self.head_norms:
                found.append(self._norm(source, name, source.rows(block, role)))
        for role, shape in shapes.items():
            turned = pairwise(shape[0] // width, width) if self.pairs and role in ("q", "k") else None
            found += self._linear(source, ATTENTION[role], source.rows(block, role, turned, factors[role]), shape, role)
        return found

    def mlp(
        self, source: Source, block: Block | None, sizes: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The tensors of an MLP and its norms; of zeros for None."""
        hidden, channels = source.config.hidden_size, sizes["gate"]
        shapes = {"gate": (channels, hidden), "up": (channels, hidden), "down": (hidden, channels)}
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
            self._norm(source, "output_norm", replace(norm, factor=factors["norm"])),
        ]
        if output is None:
            return found
        if self.tied:
            raise Unfit(f"its output head is not its embedding, which it is in {self.name}")
        return [*found, Tensor("output.weight", source.shape(output), (replace(output, factor=factors["output"]),))]

    def _norms(self, source: Source, block: Block) -> list[Tensor]:
        names = self.norms[block.role]
        if len(names) != len(block.spec.norms):
            raise Unfit(f"{block.name} has {len(block.spec.norms)} norms, and {self.name} has {len(names)}")
        return [self._norm(source, name, source.norm(block, number)) for number, name in enumerate(names)]

    def _norm(self, source: Source, name: str, rows: Rows) -> Tensor:
        return Tensor(f"{name}.weight", source.shape(rows), (rows,), plain=True)

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

    def _context(self, source: Source, plan: Plan) -> int:
        """The longest text. Where readers attend to all of it, a model with sliding windows is exact within one."""
        context: int = source.config.max_position_embeddings
        window = source.window()
        if window is None or window >= context:
            return context
        plan.notes.append(f"its attention reads {window} tokens; the context length of the file is therefore {window}")
        return window

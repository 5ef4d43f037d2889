"""Base of the containers in which tokens are mixed by scans or convolutions, in all layers or some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pliant.anatomy import Block
from pliant.exporters.gguf.containers import scan
from pliant.exporters.gguf.containers.decoder import ATTENTION, EMPTY, HEAD_NORMS, MLP, Decoder
from pliant.exporters.gguf.plan import Plan, Tensor, Unfit
from pliant.exporters.gguf.source import Pair, Source

EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "norm_eps")  # config keys, by family
ENDLESS = 2**20  # tokens: the context length that files of models without positions have by convention


class Hybrid(Decoder):
    """One architecture of llama.cpp whose readers see from ``head_count_kv`` which layers have an attention.

    Attributes:
        attends: some of its layers have an attention.
        scaled: the file says what attention scores are multiplied by.
        padded: a layer without its MLP has one of full width that adds nothing.
        alike: the MLPs of all layers have one width.
    """

    uneven = True
    attends: ClassVar[bool] = True
    scaled: ClassVar[bool] = False
    padded: ClassVar[bool] = False
    alike: ClassVar[bool] = False

    def plan(self, source: Source) -> Plan:
        """The file of a model.

        Raises:
            Unfit: this container does not carry it.
        """
        plan = Plan(self.name)
        layers = self.layers(source)
        width = source.head_width() if self.attends else 0
        self.check(source, width)
        sizes = self.sizes(source, layers, width, plan)
        plan.metadata = {
            ".block_count": len(layers),
            ".context_length": self.context(source, plan) if width else ENDLESS,
            ".embedding_length": source.config.hidden_size,
            ".attention.layer_norm_rms_epsilon": scan.epsilon_of(source) or self.epsilon(source),
            **self.counts(sizes, width),
            **({".attention.key_length": width, ".attention.value_length": width} if width else {}),
            **({".attention.scale": self._scale(source)} if self.scaled else {}),
            **self.mixers(source, plan),
            **self.more(source),
        }
        factors = {**dict.fromkeys((*ATTENTION, *HEAD_NORMS, *MLP, "output"), 1.0), **self.enlarged(source)}
        plan.tensors += self._ends(source, factors)
        for number, (pair, own) in enumerate(zip(layers, sizes, strict=True)):
            found = self.mixer(source, pair.mixer, own, factors) + self.rest(source, pair.mlp, own, factors)
            plan.tensors += [replace(tensor, name=f"blk.{number}.{tensor.name}") for tensor in found]
        return plan

    def check(self, source: Source, width: int) -> None:
        """Refuse what the readers of this container do not compute."""
        config = source.config
        activation = getattr(config, "mlp_hidden_act", None) or getattr(config, "hidden_act", "silu")
        if self.activations and activation not in self.activations:
            raise Unfit(f"its MLPs have the activation {activation}, and {self.name} computes {self.activations[0]}")
        for block in source.of_role("attention"):
            scale = source.module(block).scaling
            if not self.scaled and not math.isclose(scale, expected := width**-0.5, rel_tol=1e-6):
                raise Unfit(f"its attention is scaled by {scale:g}, and {self.name} scales by {expected:g}")

    def enlarged(self, source: Source) -> Mapping[str, float]:
        """The factors of weights, by role, that are not 1.

        Readers have one epsilon for all norms, and the norm of a cut scan has a larger one, so that cutting equals
        zeroing. The file has that one; the other norms compute the same if the residual stream is larger, too: the
        norm of ``c x`` with an epsilon of ``c² e`` is that of ``x`` with ``e``.
        """
        own = scan.epsilon_of(source)
        larger = 1.0 if own is None else math.sqrt(own / self.epsilon(source))
        return {
            **dict.fromkeys(("embedding", "o", "down", "mixer"), larger),
            "norm": 1.0 if source.output() else 1 / larger,
        }

    def sizes(self, source: Source, layers: Sequence[Pair], width: int, plan: Plan) -> list[dict[str, int]]:
        """For each layer, the rows of q and k, which are 0 without an attention, and the channels of the MLP."""
        widest = max((source.units(pair.mlp, "up") for pair in layers), default=0)
        found = []
        for number, pair in enumerate(layers):
            heads = dict.fromkeys("qk", 0)
            if pair.mixer is None and pair.mlp is not None and self.padded:
                heads = {"q": source.config.hidden_size // width if self.square else 1, "k": 1}
                plan.notes.append(f"layer {number} of the file has an attention that adds nothing")
            elif pair.mixer is not None and pair.mixer.role == "attention":
                heads = {role: source.units(pair.mixer, role) for role in heads}
                if self.square and heads["q"] * width != (hidden := source.config.hidden_size):
                    raise Unfit(f"{pair.mixer.name} has {heads['q']} heads, and {self.name} has {hidden // width}")
            channels = source.units(pair.mlp, "up")
            if not channels and self.padded:
                channels = widest = widest or EMPTY
                plan.notes.append(f"layer {number} of the file has an MLP of {widest} channels that adds nothing")
            found.append({**{role: count * width for role, count in heads.items()}, "gate": channels, "up": channels})
        if self.alike:
            self._uniform(found, ["up"])
        return found

    def counts(self, sizes: Sequence[Mapping[str, int]], width: int) -> Mapping[str, Any]:
        """The keys that tell readers what each layer is. The first head count makes sizes that all layers need, so a
        layer without heads has the number of another one."""
        heads = [own["q"] // width for own in sizes]
        some = next((count for count in heads if count), 0)
        return {
            ".feed_forward_length": sizes[0]["up"] if self.alike else [own["up"] for own in sizes],
            ".attention.head_count": [count or some for count in heads],
            ".attention.head_count_kv": [own["k"] // width for own in sizes],
        }

    def mixers(self, source: Source, plan: Plan) -> Mapping[str, Any]:
        """The sizes of its scans or convolutions."""
        raise NotImplementedError

    def mix(self, source: Source, block: Block, factors: Mapping[str, float]) -> list[Tensor]:
        """The tensors of a scan or a convolution."""
        raise NotImplementedError

    def mixer(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The tensors of what mixes tokens in a layer, and its norm."""
        if block is None or block.role == "attention":
            return self.attention(source, block, own, factors) if own["q"] else []
        return [self._norm(source, self.norms["attention"][0], source.norm(block)), *self.mix(source, block, factors)]

    def rest(
        self, source: Source, block: Block | None, own: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The tensors of the MLP of a layer, and its norm."""
        return self.mlp(source, block, own, factors) if own["up"] else []

    def epsilon(self, source: Source) -> float:
        """The epsilon of the norms before blocks."""
        return float(next(getattr(source.config, key) for key in EPSILONS if hasattr(source.config, key)))

    def _scale(self, source: Source) -> float:
        scales = {float(source.module(block).scaling) for block in source.of_role("attention")}
        if len(scales) > 1:
            raise Unfit("its layers scale attention differently")
        return scales.pop()

    def _uniform(self, sizes: Sequence[Mapping[str, int]], roles: Sequence[str]) -> None:
        """Refuse sizes that differ between the layers that have them."""
        names = {"q": "numbers of heads", "k": "numbers of key-value heads", "up": "MLP widths"}
        for role in roles:
            if len({own[role] for own in sizes if own[role]}) > 1:
                raise Unfit(f"its {names[role]} differ from layer to layer, and {self.name} has one for all")

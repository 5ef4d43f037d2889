"""Base of the containers whose MLPs are experts, as many and as wide in all layers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pliant.anatomy import Block
from pliant.exporters.gguf.containers.decoder import MLP, Decoder
from pliant.exporters.gguf.plan import Tensor, Unfit
from pliant.exporters.gguf.source import Source


class Experts(Decoder):
    """A decoder of experts.

    Attributes:
        normalised: readers divide the shares of the chosen experts by their sum.
        shared: an expert of its own sees every token, and a router of its own weights it.
    """

    normalised: ClassVar[bool] = True
    shared: ClassVar[bool] = False

    def check(self, source: Source, width: int) -> None:
        super().check(source, width)
        if bool(getattr(source.config, "norm_topk_prob", True)) != self.normalised:
            does = "divides" if self.normalised else "does not divide"
            raise Unfit(f"{self.name} {does} the shares of the chosen experts by their sum, unlike this model")
        for block in source.of_role("mlp"):
            if source.named(block, "router") is None:
                raise Unfit(f"{block.name} has no experts, as every layer of {self.name} has")

    def more(self, source: Source) -> Mapping[str, Any]:
        axes = [source.axis(block, "router") for block in source.of_role("mlp")]
        keys = {
            ".expert_count": self._listed("numbers of experts", [axis.size for axis in axes]),
            ".expert_used_count": self._listed("experts of a token", [axis.active or 0 for axis in axes]),
            ".expert_feed_forward_length": source.units(source.of_role("mlp")[0], "up"),
        }
        if self.shared:
            widths = [source.units(block, "shared_gate") for block in source.of_role("mlp")]
            keys[".expert_shared_feed_forward_length"] = self._listed("widths of the shared expert", widths)
        return keys

    def mlp(
        self, source: Source, block: Block | None, sizes: Mapping[str, int], factors: Mapping[str, float]
    ) -> list[Tensor]:
        """The tensors of a router, its experts, and their norms."""
        assert block is not None  # all containers of experts are even
        hidden, channels, count = source.config.hidden_size, sizes["up"], source.units(block, "router")
        shapes = {"gate": (count, channels, hidden), "up": (count, channels, hidden), "down": (count, hidden, channels)}
        found = self._norms(source, block)
        router = source.rows(block, "router")
        found.append(Tensor("ffn_gate_inp.weight", (count, hidden), (router,), plain=True))
        for role, shape in shapes.items():
            rows = source.rows(block, role, None, factors[role])
            found += self._linear(source, f"{MLP[role]}_exps", rows, shape, role)
        if self.shared:
            width = source.units(block, "shared_gate")
            router = source.rows(block, "shared_router")
            found.append(
                Tensor("ffn_gate_inp_shexp.weight", (hidden,), (router,), lambda values: values.flatten(), plain=True)
            )
            for role, shape in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
                rows = source.rows(block, f"shared_{role}", None, factors[role])
                found += self._linear(source, f"{MLP[role]}_shexp", rows, shape, role)
        return found

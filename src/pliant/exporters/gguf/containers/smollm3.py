"""smollm3: SmolLM3; every fourth layer has no rotary positions."""

from pliant.exporters.gguf.containers.decoder import Decoder


class SmolLM3(Decoder):
    name = "smollm3"
    models = ("smollm3",)
    pairs = True
    period = (4, "use_rope")

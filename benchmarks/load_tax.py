"""What one registered stand-in class costs every `from_pretrained`, against a wrapped constructor.

python benchmarks/load_tax.py
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from machine import save


class StandIn(LlamaDecoderLayer):
    pass


def seconds(folder: str) -> float:
    began = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(folder)
    return time.perf_counter() - began


def main() -> None:
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=512)
    )
    rounds: dict[str, list[float]] = {"wrapped constructor": [], "registered stand-in": []}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        seconds(folder)
        for _ in range(7):
            rounds["wrapped constructor"].append(seconds(folder))
            register_patch_mapping({"LlamaDecoderLayer": StandIn})
            rounds["registered stand-in"].append(seconds(folder))
            unregister_patch_mapping(["LlamaDecoderLayer"])
    result = {
        name: dict(zip(("p10", "median", "p90"), np.percentile(values, [10, 50, 90]).tolist(), strict=True))
        for name, values in rounds.items()
    }
    print(result)
    save("load_tax", {"seconds": result})


if __name__ == "__main__":
    main()

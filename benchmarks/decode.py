"""Token generation: packed formats next to torch and llama.cpp, in turn, on one machine in the same minutes.

    python benchmarks/decode.py --model build/demo/parts/smollm2-135m --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        --held-out build/demo/parts/held-out.jsonl --out benchmarks/results/decode.json
    python benchmarks/decode.py --model build/demo/parts/smollm2-135m --compiled --only \\
        --out benchmarks/results/decode_compiled.json
    python benchmarks/decode.py --billion --gguf build/random.gguf --out benchmarks/results/decode_billion.json

``--gguf`` is a file of the same model that llama.cpp requantises to Q8_0 and Q4_0. ``--billion`` takes a Llama of 1.1 B
random parameters and writes that file to ``--gguf``, if it is given. A round decodes so many tokens with every
candidate; rates are medians over rounds with 10th and 90th percentiles. Candidates that stand for a whole family of
settings (compiled, sparse) are made and freed one after the other, each in turn with int8 and the formats of 4 bits
with llama.cpp's Q4_0 as well, so that ratios are those of the same minutes: ``over`` holds each decode rate over the
others', medians of a round's ratios.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import pliant
from machine import machine
from pliant.compat.cache_argument import cache_argument
from pliant.forward.losses import nll
from pliant.forward.windows import windows_for
from pliant.measure.speed.token_breakdown import token_time
from pliant.runtime import library

PROMPT, TOKENS, ROUNDS = 128, 32, 7
PACKED = {
    "int8": ([], {"format": "int8"}),
    "bf16": ([], {"format": "bf16", "head": "bf16"}),
    "int4, groups of 32": ([], {"format": "int4", "group": 32}),
    "int4, groups of 128": ([], {"format": "int4"}),
    "int4, groups of 128, head too": ([], {"format": "int4", "head": "int4"}),
    "int4, 50% zeros, left out where that is faster": ([0.5], {"format": "int4"}),
    **{
        f"{form}, {zeros:.0%} zeros": (
            [zeros],
            {"format": form, "sparse": "always"} | ({"head": "bf16"} if form == "bf16" else {}),
        )
        for form in ("bf16", "int8", "int4")
        for zeros in (0.5, 0.7)
    },
}
Rates = tuple[float, float]


@torch.inference_mode()
def decode(model: Any) -> Rates:
    """Prefill and decode in tokens per second."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT))
    cache = cache_argument(model, DynamicCache(config=model.config))
    gc.collect()
    began = time.perf_counter()
    out = model(input_ids=ids, **cache, use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for _ in range(TOKENS):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), **cache, use_cache=True)
    return PROMPT / (middle - began), TOKENS / (time.perf_counter() - middle)


def compiled(model: Any) -> Callable[[], Rates]:
    """torch.compile over a static cache, as generate does it."""
    from transformers import StaticCache

    step = torch.compile(model.forward, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + TOKENS + 1)
    handed = cache_argument(model, cache)

    @torch.inference_mode()
    def run() -> Rates:
        ids = torch.randint(model.config.vocab_size, (1, PROMPT))
        cache.reset()
        began = time.perf_counter()
        out = model(input_ids=ids, **handed, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for at in range(TOKENS):
            ids = out.logits[:, -1:].argmax(-1)
            out = step(input_ids=ids, **handed, use_cache=True, position_ids=torch.tensor([[PROMPT + at]]))
        return PROMPT / (middle - began), TOKENS / (time.perf_counter() - middle)

    run()
    return run


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a file requantised by itself."""

    TYPES = (("llama.cpp Q8_0", 7), ("llama.cpp Q4_0", 2))

    def __init__(self, source: Path, kind: int, threads: int):
        import ctypes

        import llama_cpp

        self.path = source.with_name(f"requantised-{kind}.gguf")
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.allow_requantize, settings.ftype, settings.nthread = True, kind, threads
        llama_cpp.llama_model_quantize(str(source).encode(), str(self.path).encode(), ctypes.byref(settings))
        self.open = lambda **more: llama_cpp.Llama(
            str(self.path), n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False, **more
        )
        self.model = self.open(n_ctx=8192)

    def __call__(self) -> Rates:
        ids = np.random.default_rng(0).integers(100, 4000, PROMPT).tolist()
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(ids)
        middle = time.perf_counter()
        for token in range(TOKENS):
            self.model.eval([100 + token])
        return PROMPT / (middle - began), TOKENS / (time.perf_counter() - middle)

    def perplexity(self, windows: torch.Tensor) -> float:
        model, losses = self.open(n_ctx=windows.shape[1], logits_all=True), []
        for window in windows:
            model.reset()
            model.eval(window.tolist())
            losses.append(nll(torch.from_numpy(model.scores).unsqueeze(0), window.unsqueeze(0)))
        return math.exp(torch.cat(losses).mean().item())


def in_turn(candidates: dict[str, Callable[[], Rates]]) -> dict[str, dict[str, Any]]:
    rates: dict[str, list[Rates]] = {name: [] for name in candidates}
    for round_ in range(ROUNDS + 1):
        for name, run in candidates.items():
            found = run()
            if round_:
                rates[name].append(found)
    return {
        name: {kind: spread([pair[i] for pair in pairs]) for i, kind in enumerate(("prefill", "decode"))}
        | {
            "over": {
                other: spread([mine / its for (_, mine), (_, its) in zip(pairs, rates[other], strict=True)])
                for other in rates
                if other != name
            }
        }
        for name, pairs in rates.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def packed(model: Any, zeros: list[float], settings: dict[str, Any]) -> Any:
    steps = [*(pliant.Magnitude(sparsity=share) for share in zeros), pliant.PackedLinear(**settings)]
    return pliant.apply(copy.deepcopy(model), steps, progress=False)


def billion() -> Any:
    """A Llama of the sizes of TinyLlama 1.1B, of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def written(model: Any, path: Path) -> Path:
    """A Llama as a GGUF file of float16, without a vocabulary."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if tensor.dim() == 1 else torch.float16
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--billion", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well")
    parser.add_argument("--only", nargs="*", help="packed settings, all when left out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    dense = billion() if arguments.billion else pliant.load(arguments.model, dtype="float32")
    if arguments.billion and arguments.gguf is not None:
        written(dense, arguments.gguf)

    def perplexity(of: Any) -> float | None:
        if arguments.held_out is None:
            return None
        tokenizer, text = pliant.checkpoint.load.tokenizer_of(dense), pliant.text(arguments.held_out)
        if isinstance(of, LlamaCpp):
            return of.perplexity(windows_for(dense, tokenizer, text, 1024, 16))
        found = pliant.evaluate(of, perplexity=text, tokenizer=tokenizer, windows=16, seqlen=1024)
        return found["perplexity"][text.source]["perplexity"]

    result: dict[str, Any] = {
        **machine(), "kernels": library.state(), "prompt": PROMPT, "tokens": TOKENS, "rounds": ROUNDS, "groups": [],
    }  # fmt: skip

    def group(candidates: dict[str, Callable[[], Rates]], about: dict[str, Any]) -> None:
        rows = {name: row | about.get(name, {}) for name, row in in_turn(candidates).items()}
        result["groups"].append(rows)
        for name, row in rows.items():
            rest = {key: value for key, value in row.items() if key not in ("prefill", "decode", "over")}
            over = ", ".join(f"{ratio['median']:.2f} of {other}" for other, ratio in row["over"].items())
            print(
                f"{name}: prefill {row['prefill']['median']:.1f}, decode {row['decode']['median']:.1f}, {over} {rest}",
                flush=True,
            )
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    reference = packed(dense, *PACKED["int8"])
    about = {"int8": {"perplexity": perplexity(reference), "split": token_time(reference)}}
    half = copy.deepcopy(dense).bfloat16()
    group(
        {
            "int8": lambda: decode(reference),
            "torch float32": lambda: decode(dense),
            "torch bf16": lambda of=half: decode(of),
        },
        about
        | {"torch float32": {"perplexity": perplexity(dense), "split": token_time(dense)}}
        | {"torch bf16": {"perplexity": perplexity(half)}},
    )
    if arguments.compiled:
        for name, model in (("torch float32, compiled", dense), ("torch bf16, compiled", half)):
            group({"int8": lambda: decode(reference), name: compiled(model)}, {})
            torch._dynamo.reset()
    del half
    four_bits: dict[str, Callable[[], Rates]] = {}
    if arguments.gguf is not None:
        for name, kind in LlamaCpp.TYPES:
            other = LlamaCpp(arguments.gguf, kind, threads)
            group({"int8": lambda: decode(reference), name: other}, {name: {"perplexity": perplexity(other)}})
        four_bits = {name: other}
    for name, (zeros, settings) in PACKED.items():
        if name == "int8" or (arguments.only is not None and name not in arguments.only):
            continue
        model = packed(dense, zeros, settings)
        own = {
            name: {
                "bits": model.pliant_history[-1]["bits"],
                "perplexity": perplexity(model),
                "split": token_time(model),
            }
        }
        beside = four_bits if settings["format"] == "int4" else {}
        group({"int8": lambda: decode(reference), **beside, name: lambda model=model: decode(model)}, own)


if __name__ == "__main__":
    main()

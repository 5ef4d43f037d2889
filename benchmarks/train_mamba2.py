"""Trains a small Mamba-2 language model, because no package brings one: the model of state_space.py.

    python benchmarks/train_mamba2.py --text calibration.jsonl --held-out held-out.jsonl --to build/mamba2

`pliant demo` leaves both texts in build/demo/parts: leads of Wikipedia articles that pip alone can fetch. Training
stops as soon as the model beats an interpolated Kneser-Ney 5-gram model of the same tokens by 0.1 bit a byte on the
held-out documents; results/train_mamba2.json has the curve. The last state is written every few minutes, and the same
command goes on from there. It needs torch 2.9, for Muon.

Both models see a document alone: they predict its tokens and its end after a separator.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerFast

from kneser_ney import KneserNey
from machine import save
from pliant.files import replacing

VOCABULARY = 2048
SEPARATOR, SEPARATOR_ID = "\n\n", 0  # between documents, as pliant.text joins rows
SHAPE = {"hidden_size": 192, "num_hidden_layers": 12, "head_dim": 32, "num_heads": 12, "state_size": 64, "n_groups": 1}
SEQLEN, BATCH, PART = 256, 16, 4  # tokens of a window, windows of a step, windows in memory at a time
LEARNING_RATE, WARMUP = 4e-3, 60  # the peak, and steps until it; then linearly down to nothing
WEIGHT_DECAY, CLIP, DROPOUT = 0.1, 1.0, 0.1
MARGIN = 0.1  # bits per byte
HELD_OUT = 500  # documents
AT_ONCE = 2048  # tokens of an evaluation batch
EVERY = 100  # steps between two evaluations
STATE_EVERY = 180.0  # seconds between two states


def documents(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text("utf-8").splitlines()]


def tokenizer_for(texts: list[str], folder: Path) -> Tokenizer:
    """Byte-level BPE of the training text, made once."""
    file = folder / "tokenizer.json"
    if not file.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=SEPARATOR,
            eos_token=SEPARATOR,
            pad_token=SEPARATOR,
            model_max_length=4096,
        )
        fast.save_pretrained(folder)
    return Tokenizer.from_file(str(file))


def new_model() -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    config = Mamba2Config(
        **SHAPE,
        vocab_size=VOCABULARY,
        expand=2,
        chunk_size=64,
        initializer_range=0.05,
        rescale_prenorm_residual=True,
        tie_word_embeddings=True,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
        pad_token_id=SEPARATOR_ID,
    )
    model = Mamba2ForCausalLM(config)

    def drop(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, DROPOUT, module.training)

    for module in (model.backbone.embeddings, *(layer.mixer for layer in model.backbone.layers)):
        module.register_forward_hook(drop)
    return model


def optimizers(model: Mamba2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the mixers, AdamW for everything else."""
    matrices = [p for layer in model.backbone.layers for p in layer.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, LEARNING_RATE, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95)),
    ]


def batches(tokens: list[list[int]], start: int) -> Iterator[torch.Tensor]:
    """Windows from step ``start`` on, without end, shape ``(BATCH, SEQLEN + 1)``: each epoch joins and cuts the
    documents in another order."""
    steps = (sum(map(len, tokens)) + len(tokens) - SEQLEN - 1) // SEQLEN // BATCH
    for epoch in range(start // steps, 1_000_000):
        generator = np.random.default_rng(epoch)
        order = generator.permutation(len(tokens))
        stream = np.concatenate([[SEPARATOR_ID, *tokens[number]] for number in order])
        first = generator.integers(0, SEQLEN)
        cuts = generator.permutation((len(stream) - first - 1) // SEQLEN) * SEQLEN + first
        for step in range(start % steps if epoch == start // steps else 0, steps):
            chosen = cuts[step * BATCH : (step + 1) * BATCH]
            yield torch.from_numpy(np.stack([stream[at : at + SEQLEN + 1] for at in chosen]))


@torch.no_grad()
def bits(model: Mamba2ForCausalLM, tokens: list[list[int]]) -> float:
    """Bits that the model needs for the documents and their ends."""
    model.eval()
    total, batch = 0.0, []
    ordered = sorted(tokens, key=len)
    for number, document in enumerate(ordered, start=1):
        batch.append(document)
        following = ordered[number] if number < len(ordered) else None
        if following is not None and (len(batch) + 1) * (len(following) + 1) <= AT_ONCE:
            continue
        ids = torch.full((len(batch), len(document) + 1), SEPARATOR_ID)  # the last document is the longest
        labels = torch.full_like(ids, -100)
        for row, each in enumerate(batch):
            ids[row, 1 : len(each) + 1] = torch.tensor(each)
            labels[row, : len(each) + 1] = torch.tensor([*each, SEPARATOR_ID])
        logits = model(input_ids=ids, use_cache=False).logits
        total += functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        batch = []
    model.train()
    return total / math.log(2)


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of its peak."""
    return min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="training documents, JSON lines")
    parser.add_argument("--held-out", required=True, help=f"JSON lines; the first {HELD_OUT} are used")
    parser.add_argument("--to", default="build/mamba2", help="folder of the model and the training state")
    parser.add_argument("--steps", type=int, default=2000, help=f"of {BATCH * SEQLEN} tokens each, at most")
    arguments = parser.parse_args()
    folder = Path(arguments.to)
    folder.mkdir(parents=True, exist_ok=True)

    texts, held_out = documents(arguments.text), documents(arguments.held_out)[:HELD_OUT]
    tokenizer = tokenizer_for(texts, folder)
    train, held = ([one.ids for one in tokenizer.encode_batch(each)] for each in (texts, held_out))
    size = sum(len(text.encode()) for text in held_out)
    baseline = -KneserNey(train, VOCABULARY, SEPARATOR_ID).log2(held).sum() / size
    print(f"{sum(map(len, train)):,} tokens of {len(train):,} documents; {size:,} bytes held out", flush=True)
    print(f"Kneser-Ney 5-grams: {baseline:.4f} bits per byte; wanted: {baseline - MARGIN:.4f}", flush=True)

    model = new_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {torch.get_num_threads()} threads", flush=True)
    every = optimizers(model)
    step, seconds, losses, curve = 0, 0.0, [], []
    state_file = folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, values in zip(every, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        step, seconds, losses, curve = (state[key] for key in ("step", "seconds", "losses", "curve"))
        print(f"going on from step {step}", flush=True)

    def write_state() -> None:
        with replacing(state_file) as aside:
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in every]}
            torch.save({**state, "step": step, "seconds": seconds, "losses": losses, "curve": curve}, aside)

    def finish(reached: bool) -> None:
        model.save_pretrained(folder)
        save(
            "train_mamba2",
            {
                "kneser_ney_bits_per_byte": baseline,
                "bits_per_byte": curve[-1]["bits_per_byte"],
                "margin": baseline - curve[-1]["bits_per_byte"],
                "reached": reached,
                "parameters": parameters,
                "shape": SHAPE,
                "vocabulary": VOCABULARY,
                "training_tokens": sum(map(len, train)),
                "held_out": {"documents": len(held), "bytes": size, "tokens": sum(map(len, held))},
                "threads": torch.get_num_threads(),
                "curve": curve,
            },
        )

    model.train()
    data = batches(train, step)
    began, started, written = time.monotonic(), step, time.monotonic()
    while not curve or curve[-1]["bits_per_byte"] > baseline - MARGIN:
        if step >= arguments.steps:
            finish(reached=False)
            raise SystemExit(f"{step} steps were too few: {curve[-1]}; the same command with more --steps goes on")
        tick = time.monotonic()
        torch.manual_seed(step)  # of the dropout, so that a run that was stopped goes on as if it was not
        window = next(data)
        for optimizer in every:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate(step, arguments.steps)
        losses.append(0.0)
        for part in window.split(PART):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) * len(part) / BATCH
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in every:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss of step {step} is {losses[-1]}")
        seconds += time.monotonic() - tick
        if step % 10 == 0:
            eta = (time.monotonic() - began) / (step - started) * (arguments.steps - step)
            mean = sum(losses[-10:]) / len(losses[-10:])
            print(
                f"step {step} of at most {arguments.steps} | loss {mean:.3f} | {seconds / 60:.1f} min, "
                f"at most {eta / 60:.0f} min left",
                flush=True,
            )
        if step % EVERY == 0:
            point = {
                "step": step,
                "tokens": step * BATCH * SEQLEN,
                "seconds": round(seconds, 1),
                "loss": sum(losses) / len(losses),
                "bits_per_byte": bits(model, held) / size,
            }
            curve.append(point)
            losses = []
            print(f"held out {point['bits_per_byte']:.4f} bits per byte; Kneser-Ney {baseline:.4f}", flush=True)
        if step % EVERY == 0 or time.monotonic() - written > STATE_EVERY:
            write_state()
            written = time.monotonic()
    finish(reached=True)


if __name__ == "__main__":
    main()

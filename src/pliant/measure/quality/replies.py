"""Generated replies to prompts, for people to read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pliant.errors import DataError
from pliant.forward.windows import longest_of


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that a model cannot continue.

    Raises:
        DataError: ``prompts`` is one string instead of a list of them, or one of them is empty.
    """
    if isinstance(prompts, str):
        raise DataError(f"prompts must be a list of strings, not one string; write [{prompts[:40]!r}]")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt:
            raise DataError(f"a prompt must be a string of at least one character; not {prompt!r}")


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = 64) -> list[str]:
    """A model's greedily generated reply to each prompt, in the tokenizer's chat template if there is one.

    Arguments:
        tokens: maximum length of a reply.

    Raises:
        DataError: a prompt is empty, or fills all positions of the model.
    """
    check_prompts(prompts)
    texts = []
    for prompt in prompts:
        inputs = inputs_of(model, tokenizer, prompt, chat=bool(getattr(tokenizer, "chat_template", None)))
        length, positions = inputs["input_ids"].shape[1], longest_of(model)
        room = min(tokens, positions - length)
        if room < 1:
            raise DataError(
                f"a prompt has {length} tokens, but the model has {positions} positions; shorten {prompt[:40]!r}"
            )
        out = model.generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=pad_of(tokenizer))
        texts.append(tokenizer.decode(out[0, length:], skip_special_tokens=True).strip())
    return texts


def inputs_of(model: Any, tokenizer: Any, prompt: str, *, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of a prompt, on the model's device; with ``chat`` in the tokenizer's chat
    template."""
    if chat:
        talk = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask") if name in inputs}


def pad_of(tokenizer: Any) -> int | None:
    """The id of the padding token, else that of the end of a text."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

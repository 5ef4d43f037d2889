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
        raise DataError(f"prompts are a list of strings, not one string; write [{prompts[:40]!r}]")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt:
            raise DataError(f"a prompt is a text of at least one character, not {prompt!r}; leave it out")


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = 64) -> list[str]:
    """A model's greedily generated reply to each prompt, in the tokenizer's chat template if there is one.

    Arguments:
        tokens: maximum length of a reply.

    Raises:
        DataError: a prompt is empty, or fills all positions of the model.
    """
    check_prompts(prompts)
    found = []
    for prompt in prompts:
        if getattr(tokenizer, "chat_template", None):
            talk = [{"role": "user", "content": prompt}]
            given = tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            given = tokenizer(prompt, return_tensors="pt")
        given = {name: given[name].to(model.device) for name in ("input_ids", "attention_mask")}
        length = given["input_ids"].shape[1]
        room = min(tokens, longest_of(model) - length)
        if room < 1:
            raise DataError(
                f"a prompt has {length} tokens, the model reads {longest_of(model)}; shorten the prompt {prompt[:40]!r}"
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        out = model.generate(**given, max_new_tokens=room, do_sample=False, pad_token_id=pad)
        found.append(tokenizer.decode(out[0, length:], skip_special_tokens=True).strip())
    return found

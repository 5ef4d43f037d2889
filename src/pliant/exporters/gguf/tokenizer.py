"""The tokenizer of a model as the metadata of a GGUF file: tokens, merges or scores, special tokens, chat templates.

Two kinds are written: byte-level BPE (``gpt2`` in llama.cpp) and BPE with byte fallback as sentencepiece trains it
(``llama``). Everything that the readers would guess or take from a default is written out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pliant.errors import ArtefactError
from pliant.exporters.gguf.pre_tokenizers import pre_tokenizer_name, steps_of
from pliant.exporters.gguf.sentencepiece import SPACE, kind_of, score_list, scores_of, space_prefix

_TYPES = {"NORMAL": 1, "UNKNOWN": 2, "CONTROL": 3, "USER_DEFINED": 4, "UNUSED": 5, "BYTE": 6}
_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>", re.DOTALL)  # by its text
_ENDS = {  # tokens at which llama.cpp ends generation because of their text
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip
_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_NEVER_IN_UTF8 = 13  # of 256 bytes
_NO_TOKENIZER = "this kind of tokenizer cannot be written as GGUF"


def tokenizer_metadata(tokenizer: Any, rows: int, ends: Iterable[int] = ()) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a tokenizer, and notes on where llama.cpp does not do the same.

    Arguments:
        tokenizer: of transformers; None for a model without one.
        rows: of the embedding; the list of tokens gets as many.
        ends: ids at which generation ends, beside the tokenizer's own end of text: ``eos_token_id`` of
            ``generation_config``.

    Raises:
        ArtefactError: llama.cpp cannot do what this tokenizer does.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none", ".vocab_size": rows}, ["the file has no tokenizer"]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArtefactError(f"{_NO_TOKENIZER}: {type(tokenizer).__name__} has no tokenizer.json; save it as one")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise ArtefactError(f"{_NO_TOKENIZER}: {model['type']}; byte-level and sentencepiece-like BPE are supported")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise ArtefactError(f"{_NO_TOKENIZER}: BPE with {setting}, which llama.cpp does not know")
    metadata, notes = (_byte_level if _is_byte_level(definition) else _sentencepiece)(definition, rows)
    notes += _added_notes(definition)
    for part, more in (_special(tokenizer, rows, list(ends)), (_templates(tokenizer), [])):
        metadata |= part
        notes += more
    return metadata, notes


def _is_byte_level(definition: Mapping[str, Any]) -> bool:
    byte_level = any(step["type"] == "ByteLevel" for step in steps_of(definition["pre_tokenizer"]))
    fallback = bool(definition["model"].get("byte_fallback"))
    if byte_level == fallback:
        raise ArtefactError(f"{_NO_TOKENIZER}: BPE that is neither byte-level nor falls back to bytes")
    return byte_level


def _byte_level(definition: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], list[str]]:
    from tokenizers.pre_tokenizers import ByteLevel

    model = definition["model"]
    if any(step.get("add_prefix_space") for step in steps_of(definition["pre_tokenizer"])):
        raise ArtefactError(f"{_NO_TOKENIZER}: byte-level BPE with add_prefix_space, which llama.cpp does not know")
    lacking = set(ByteLevel.alphabet()) - set(model["vocab"])
    if model.get("unk_token") is not None and len(lacking) > _NEVER_IN_UTF8:
        raise ArtefactError(
            f"{_NO_TOKENIZER}: its vocabulary lacks {len(lacking)} of 256 bytes; it replaces them by "
            f"{model['unk_token']!r}, and llama.cpp drops them"
        )
    name, notes = pre_tokenizer_name(definition)
    tokens, types, more = _tokens(definition, rows, spaces=False)
    merges = [merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)
              for merge in model["merges"]]  # fmt: skip
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }, notes + more


def _sentencepiece(definition: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], list[str]]:
    prefix, notes = space_prefix(definition)
    scores = scores_of(definition)
    tokens, types, more = _tokens(definition, rows, spaces=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": score_list(tokens, scores),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefix,
    }, notes + more


def _tokens(definition: Mapping[str, Any], rows: int, spaces: bool) -> tuple[list[str], list[int], list[str]]:
    """The text and the type of every row of the embedding; rows without a token are called ``[PAD7]``.

    Arguments:
        spaces: the vocabulary writes spaces as ``▁``.
    """
    model = definition["model"]
    found = {
        number: (text, kind_of(text, model.get("unk_token")) if spaces else "NORMAL")
        for text, number in model["vocab"].items()
    }
    if found and max(found) >= rows:
        raise ArtefactError(f"the tokenizer has {max(found) + 1} tokens, and the embedding has {rows} rows")
    outside, normalizers = [], {step["type"] for step in steps_of(definition["normalizer"])}
    for token in definition["added_tokens"]:
        number, text = token["id"], token["content"]
        if number >= rows:
            outside.append(text)
            continue
        kind = "CONTROL" if token["special"] or _CONTROL.fullmatch(text) else "USER_DEFINED"
        if found.get(number, ("", ""))[1] == "UNKNOWN":
            kind = "UNKNOWN"
        if kind == "USER_DEFINED" and token["normalized"] and "Replace" in normalizers:
            text = text.replace(SPACE, " ")
        found[number] = text, kind
    tokens, types = [], []
    for number in range(rows):
        text, kind = found.get(number, (f"[PAD{number}]", "UNUSED"))
        tokens.append(text)
        types.append(_TYPES[kind])
    if len(set(tokens)) < rows or "" in tokens:
        seen: set[str] = set()
        text = next(text for text in tokens if not text or text in seen or seen.add(text))
        raise ArtefactError(f"{_NO_TOKENIZER}: the token {text!r} is {'there twice' if text else 'empty'}")
    notes = [f"tokens without a row of the embedding are left out: {_some(outside)}"] if outside else []
    return tokens, types, notes


def _added_notes(definition: Mapping[str, Any]) -> list[str]:
    """Notes on tokens that llama.cpp finds in a text in another way."""
    added = definition["added_tokens"]
    trimming = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    spaced: list[str] = []
    if any(step["type"] == "Prepend" for step in steps_of(definition["normalizer"])):
        spaced = [token["content"] for token in added if token["normalized"]]
    notes = []
    if trimming:
        notes.append(f"llama.cpp keeps the spaces around {_some(trimming)}, and this tokenizer does not")
    if spaced:
        notes.append(
            f"this tokenizer finds {_some(spaced)} only after a space, which it takes in, llama.cpp everywhere"
        )
    return notes


def _some(texts: list[str]) -> str:
    return ", ".join(map(repr, texts[:5])) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def _special(tokenizer: Any, rows: int, ends: list[int]) -> tuple[dict[str, Any], list[str]]:
    """Ids of special tokens, and what is put around a text, by what the tokenizer does with one."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _IDS}
    ids = {name: number for name, number in ids.items() if number is not None and number < rows}
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if start is None:
        raise ArtefactError(f"{_NO_TOKENIZER}: it changes the tokens of a text when it adds special tokens")
    before, after = whole[:start], whole[start + len(plain) :]
    notes = []
    if len(before) == 1:
        ids["bos"] = before[0]
    if before[1:] or after[1:] or (after and after != [ids.get("eos")]):
        notes.append(
            f"this tokenizer puts the tokens {before} before and {after} after a text; llama.cpp puts at most one on "
            "each side, the first and last of the text"
        )
    ends = list(dict.fromkeys(number for number in ends if 0 <= number < rows))
    if "eos" not in ids:
        if not ends:
            raise ArtefactError(
                "neither the tokenizer nor generation_config says at which token a text ends, and llama.cpp would take "
                "token 11 or 2; set tokenizer.eos_token"
            )
        ids["eos"] = ends[0]
    metadata: dict[str, Any] = {
        f"tokenizer.ggml.{_IDS[name]}_token_id": number for name, number in ids.items() if name != "bos"
    }
    metadata["tokenizer.ggml.bos_token_id"] = ids.get("bos", ids["eos"])
    metadata["tokenizer.ggml.add_bos_token"] = len(before) == 1
    metadata["tokenizer.ggml.add_eos_token"] = after == [ids["eos"]]
    texts = {number: tokenizer.convert_ids_to_tokens(number) for number in ends}
    unknown = [number for number in ends if number != ids["eos"] and texts[number] not in _ENDS]
    if unknown:
        metadata["tokenizer.ggml.eot_token_id"] = unknown[0]
    if unknown[1:]:
        lost = ", ".join(repr(texts[number]) for number in unknown[1:])
        notes.append(f"llama.cpp does not end a text at {lost}, as transformers does")
    return metadata, notes


def _templates(tokenizer: Any) -> dict[str, Any]:
    templates = getattr(tokenizer, "chat_template", None) or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    metadata: dict[str, Any] = {}
    if "default" in templates:
        metadata["tokenizer.chat_template"] = templates["default"]
    others = {re.sub(r"\W", "", name, flags=re.ASCII): text for name, text in templates.items() if name != "default"}
    for name, text in others.items():
        metadata[f"tokenizer.chat_template.{name}"] = text
    if others:
        metadata["tokenizer.chat_templates"] = list(others)
    return metadata

"""How a byte-level BPE tokenizer splits text into words, by the name that llama.cpp has for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.errors import ArtefactError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"


def _cased(end: str, digits: str) -> str:
    words = rf"{_START}{_UPPER}*{_LOWER}+{end}|{_START}{_UPPER}+{_LOWER}*{end}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = rf"{_CONTRACTIONS}|{_START}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"

# The regular expressions of a tokenizer, and whether it takes a word that is a token as it is (ignore_merges) -> the
# name of llama.cpp; others that split alike differ in defaults, which a file overrides
_RULES = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_cased("", r"\p{N}"),), True): "tekken",
    ((_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),), False): "gpt-4o",
}
_APPROXIMATE = {"tekken", "gpt-4o"}  # only a-z and A-Z have a case


def pre_tokenizer_name(definition: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The name of a tokenizer's splitting rule, and notes on how exact it is.

    Arguments:
        definition: its ``tokenizer.json``.

    Raises:
        ArtefactError: llama.cpp has no name for this rule, as far as is known here.
    """
    normalizers = {step["type"] for step in steps_of(definition["normalizer"])}
    regexes = _regexes(steps_of(definition["pre_tokenizer"]))
    name = _RULES.get((regexes, bool(definition["model"].get("ignore_merges"))))
    if name is None or normalizers - {"NFC"}:
        raise ArtefactError(
            "llama.cpp has no known name for the way in which this tokenizer splits text; without it the file would "
            "split text in another way. Export to another format, or use a model with a tokenizer that llama.cpp reads"
        )
    notes = []
    if normalizers:
        notes.append("llama.cpp does not compose letters and accents (NFC) as this tokenizer does")
    if name in _APPROXIMATE:
        notes.append(
            "llama.cpp knows capital letters only from A to Z, and no combining marks, as in Hindi; it may split words "
            "with others in another way"
        )
    return name, notes


def steps_of(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, normalizer or decoder; a sequence in a sequence is flattened."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders") or []
    return [step for each in inner for step in steps_of(each)]


def _regexes(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The regular expressions that text is split by, one after another; empty if a step is of another kind."""
    found: list[str] = []
    for step in steps:
        last = step is steps[-1]
        if step["type"] == "ByteLevel" and last and not step.get("add_prefix_space"):
            found += [_GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step.get("individual_digits"):
            found.append(r"\p{N}")
        elif step["type"] == "Split" and "Regex" in step["pattern"] and _keeps_all(step):
            found.append(step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n"))
        else:
            return ()
    return tuple(found) if steps and steps[-1]["type"] == "ByteLevel" else ()


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a split makes a word of each match, and drops nothing: all of these expressions match every text."""
    return (step["behavior"], bool(step.get("invert"))) in {("Isolated", False), ("Removed", True)}

"""BPE over characters with bytes for the rest, as sentencepiece trains it, for llama.cpp's reader of such vocabularies.

This reader has no list of merges. It joins the two neighbours whose *result* has the highest score, whenever that
result is a token. Both ways are the same if all merges into one token stand together in the list, and if no token can
be made from two others in a way that the list lacks. Tokenizers that were converted from sentencepiece are like that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.errors import ArtefactError
from pliant.exporters.gguf.pre_tokenizers import steps_of

SPACE = "▁"
_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
_REMEDY = "export to another format, or put the original tokenizer.json, as converted from sentencepiece, in the folder"


def scores_of(definition: Mapping[str, Any]) -> dict[str, float]:
    """A score for each token that is made by merges: the earlier its first merge, the higher.

    Raises:
        ArtefactError: llama.cpp would join other tokens than this tokenizer.
    """
    model = definition["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    lacking = [byte for byte in _BYTES if byte not in vocabulary]
    if lacking:
        raise ArtefactError(f"the tokenizer lacks {len(lacking)} of 256 bytes, such as {lacking[0]}; {_REMEDY}")
    if model.get("ignore_merges"):
        raise ArtefactError(f"the tokenizer takes words as tokens without merges, and llama.cpp does not; {_REMEDY}")
    pairs: dict[str, set[int]] = {}
    scores: dict[str, float] = {}
    latest = ""
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if token != latest and token in scores:
            raise ArtefactError(
                f"merges into the token {token!r} are in several places of the list, and llama.cpp knows one; {_REMEDY}"
            )
        latest = token
        scores.setdefault(token, -float(rank))
        pairs.setdefault(token, set()).add(len(left))
    added = {token["content"] for token in definition["added_tokens"]}
    for token in vocabulary:
        for end in range(1, len(token)):
            joins = _can_stand(token[:end], vocabulary) and _can_stand(token[end:], vocabulary)
            if joins and end not in pairs.get(token, ()) and token not in added:
                raise ArtefactError(
                    f"llama.cpp would join {token[:end]!r} and {token[end:]!r}, and this tokenizer does not; {_REMEDY}"
                )
    return scores


def _can_stand(text: str, vocabulary: Mapping[str, int]) -> bool:
    """Whether a text can be a single symbol while llama.cpp joins tokens."""
    return len(text) == 1 or text in vocabulary


def space_prefix(definition: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is put before the text, and notes on where llama.cpp does it in another way.

    Raises:
        ArtefactError: text is changed or split in a way that llama.cpp does not know.
    """
    prefix, notes = False, []
    replaced = False
    for step in steps_of(definition["normalizer"]):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, SPACE):
            replaced = True
        else:
            raise ArtefactError(f"llama.cpp does not do this tokenizer's {step['type']} of text; {_REMEDY}")
    for step in steps_of(definition["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE:
            scheme = step.get("prepend_scheme", "always")
            replaced = True
            if step.get("split", True):
                _refuse_inner_spaces(definition)
            if scheme != "never":
                prefix = True
                notes.append("llama.cpp puts a space before a text that begins with one, and this tokenizer does not")
            if scheme == "first":
                notes.append("llama.cpp puts a space after a special token inside a text, and this tokenizer does not")
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaced):
            raise ArtefactError(f"llama.cpp does not split text with this tokenizer's {step['type']}; {_REMEDY}")
    if not replaced:
        raise ArtefactError(f"this tokenizer does not write spaces as {SPACE!r}; {_REMEDY}")
    return prefix, notes


def _refuse_inner_spaces(definition: Mapping[str, Any]) -> None:
    added = {token["content"] for token in definition["added_tokens"]}
    inner = [token for token in definition["model"]["vocab"] if SPACE in token[1:] and token not in added]
    if inner:
        raise ArtefactError(
            f"this tokenizer splits text before each space, and llama.cpp would join {inner[0]!r}; {_REMEDY}"
        )


def kind_of(token: str, unknown: str | None) -> str:
    """The type of a token of the vocabulary."""
    return "UNKNOWN" if token == unknown else "BYTE" if token in _BYTES else "NORMAL"


def score_list(tokens: Sequence[str], scores: Mapping[str, float]) -> list[float]:
    """The score of every token; those that no merge makes never compete, and have the lowest."""
    lowest = min(scores.values(), default=0.0) - 1.0
    return [0.0 if token in _BYTES else scores.get(token, lowest) for token in tokens]

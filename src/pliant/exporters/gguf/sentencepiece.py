"""BPE over characters with bytes for the rest, as sentencepiece trains it, for llama.cpp's reader of such vocabularies.

This reader has no list of merges. It joins the two neighbours whose *result* has the highest score, whenever that
result is a token. Both ways are the same if all merges into one token stand together in the list, and if no token can
be made from two others in a way that the list lacks. Tokenizers that were converted from sentencepiece are like that,
except for runs of spaces, whose merges are mixed in the list: there, both ways are carried out and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
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
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    scores: dict[str, float] = {}
    for (left, right), rank in ranks.items():
        scores.setdefault(left + right, -float(rank))
    added = {token["content"] for token in definition["added_tokens"]}
    for token in vocabulary:
        for end in range(1, len(token)):
            pair = token[:end], token[end:]
            # llama.cpp begins with single characters, also with those that are not tokens
            joins = all(len(part) == 1 or part in vocabulary for part in pair)
            if joins and pair not in ranks and token not in added:
                raise ArtefactError(
                    f"llama.cpp would join {pair[0]!r} and {pair[1]!r}, and this tokenizer does not; {_REMEDY}"
                )
    _check_order(merges, ranks, scores)
    return scores


def _check_order(merges: list[tuple[str, ...]], ranks: dict[tuple[str, ...], int], scores: dict[str, float]) -> None:
    """Check that one score for all merges into a token says the same as their places in the list."""
    last = {left + right: rank for (left, right), rank in ranks.items()}
    counts: dict[str, int] = {}
    for left, right in ranks:
        counts[left + right] = counts.get(left + right, 0) + 1
    longest: dict[str, int] = {}
    for token, rank in last.items():
        first = int(-scores[token])
        if rank - first + 1 == counts[token]:
            continue
        if any(len(set(left + right)) > 1 for left, right in merges[first : rank + 1]):
            raise ArtefactError(
                f"merges into the token {token!r} are in several places of the list, and llama.cpp knows one; {_REMEDY}"
            )
        longest[token[0]] = max(longest.get(token[0], 0), len(token))
    for character, length in longest.items():
        for count in range(2, 4 * length + 1):
            run = character * count
            by_score = _joined(run, lambda left, right: -scores[left + right] if left + right in scores else None)
            if by_score != _joined(run, lambda left, right: ranks.get((left, right))):
                raise ArtefactError(f"llama.cpp would split {count} times {character!r} in another way; {_REMEDY}")


def _joined(text: str, rank_of: Callable[[str, str], float | None]) -> list[str]:
    """Tokens of a text: of all neighbours, those with the lowest rank are joined first, the leftmost of equals."""
    parts = list(text)
    after, before = [*range(1, len(parts)), -1], list(range(-1, len(parts) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (rank := rank_of(parts[left], parts[right])) is not None:
            heappush(queue, (rank, left, right, parts[left] + parts[right]))

    for right in range(1, len(parts)):
        offer(right - 1, right)
    while queue:
        _, left, right, result = heappop(queue)
        if not parts[left] or not parts[right] or parts[left] + parts[right] != result:
            continue
        parts[left], parts[right] = result, ""
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [part for part in parts if part]


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

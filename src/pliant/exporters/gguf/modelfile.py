"""Ollama's Modelfile for a GGUF file: the chat template in Ollama's own language, and where generation ends.

Ollama does not read the Jinja template in a GGUF file, unless it resembles one that it knows. A template is written
only if the Jinja template renders conversations as prefix, content and suffix by role, which is tried on some.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MOST_CONTEXT = 8192  # tokens; the cache of a longer context may not fit into memory
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_SYSTEM, _USER, _ASSISTANT = "system", "user", "assistant"
_WORDS = ("Zaffre", "Quoll", "Sphinx", "Jacquard", "Vexing", "Womble", "Fjord")  # contents that no template has


@dataclass(frozen=True)
class Turns:
    """How a chat template writes a conversation.

    Attributes:
        around: role -> prefix and suffix of its messages.
        start: before everything.
        default: the system message if the conversation has none.
        ask: what makes the model answer.
    """

    around: dict[str, tuple[str, str]]
    start: str
    default: str | None
    ask: str

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation that ends with a user's message, and what makes the model answer."""
        if self.default is not None and messages[0]["role"] != _SYSTEM:
            messages = [_message(_SYSTEM, self.default), *messages]
        parts = [self.around[each["role"]][0] + each["content"] + self.around[each["role"]][1] for each in messages]
        return self.start + "".join(parts) + self.ask

    def in_go(self) -> str:
        """The template in the language of Ollama."""
        cases = [
            f'{{{{ {"else " * bool(number)}if eq .Role "{role}" }}}}{prefix}{{{{ .Content }}}}{suffix}'
            for number, (role, (prefix, suffix)) in enumerate(self.around.items())
        ]
        return f"{self.start}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.ask}"


def modelfile(
    gguf: str, tokenizer: Any, ends: Iterable[int], context: int, folder: Path | None, adds_bos: bool
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and notes on what it lacks.

    Arguments:
        gguf: name of the GGUF file beside it.
        tokenizer: of transformers; None for a model without one.
        ends: ids at which generation ends, beside the tokenizer's own end of text.
        context: longest context of the model, in tokens.
        folder: of the model; its LICENSE is copied. None for a model that is in no folder.
        adds_bos: the reader puts the first special token before a text, so that the template must not.
    """
    lines, notes = [f'FROM "./{gguf}"' if " " in gguf else f"FROM ./{gguf}"], []
    template = getattr(tokenizer, "chat_template", None)
    if tokenizer is not None and not template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif tokenizer is not None:
        turns = turns_of(tokenizer, adds_bos)
        if turns is None:
            notes.append("Ollama's language cannot write this chat template, so the Modelfile has none")
        else:
            lines.append(f'TEMPLATE """{turns.in_go()}"""')
            if turns.default is not None:
                lines.append(f'SYSTEM """{turns.default}"""')
            if _SYSTEM not in turns.around:
                notes.append("the chat template takes no system message, so that Ollama drops it")
    for text in _stops(tokenizer, ends):
        lines.append(f'PARAMETER stop "{text}"')
    lines.append(f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}")
    licences = [path for name in _LICENCES if folder and (path := folder / name).is_file()]
    licence = licences[0].read_text("utf-8", "replace") if licences else ""
    if licence and '"""' not in licence:
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n", notes


def turns_of(tokenizer: Any, adds_bos: bool = False) -> Turns | None:
    """How the chat template writes a conversation; None if it is not by prefix, content and suffix."""
    if "strftime_now" in str(tokenizer.chat_template):
        return None  # it writes today's date
    bos = getattr(tokenizer, "bos_token", None) or ""
    for start in dict.fromkeys((bos, "") if adds_bos else ("", bos)):  # "" where roles begin with this token
        try:
            turns = _decomposed(tokenizer, start)
            exact = _is_exact(tokenizer, turns)
        except Exception:  # a template is a program of somebody else, and can fail in any way
            continue
        if exact:
            return _written(turns, bos if adds_bos else "")
    return None


def _written(turns: Turns, bos: str) -> Turns | None:
    """Turns without the token that the reader adds; None if they cannot stand in a Modelfile."""
    turns = replace(turns, start=turns.start.removeprefix(bos))
    pieces = [turns.start, turns.ask, turns.default or "", *(text for pair in turns.around.values() for text in pair)]
    return None if any(mark in text for text in pieces for mark in ("{{", "}}", '"""')) else turns


def _decomposed(tokenizer: Any, start: str) -> Turns:
    """The pieces of a few conversations, which begin with ``start``; a ``ValueError`` if they do not agree."""
    first, answer, second, system = _WORDS[:4]
    talk = [_message(_USER, first), _message(_ASSISTANT, answer), _message(_USER, second)]
    begin, after_first, between, _ = _pieces(tokenizer, talk, ask=True)
    *_, answer_suffix = _pieces(tokenizer, talk[:2], ask=False)
    *_, user_suffix = _pieces(tokenizer, talk[:1], ask=False)
    *_, user_suffix_and_ask = _pieces(tokenizer, talk[:1], ask=True)
    user_prefix = _without_start(between, answer_suffix)
    answer_prefix = _without_start(after_first, user_suffix)
    ask = _without_start(user_suffix_and_ask, user_suffix)
    around = {_USER: (user_prefix, user_suffix), _ASSISTANT: (answer_prefix, answer_suffix)}
    begin = _without_end(begin, user_prefix)
    try:
        system_begin, system_end, *_ = _pieces(tokenizer, [_message(_SYSTEM, system), *talk], ask=True)
    except Exception:  # templates raise errors of their own for roles that they do not know
        return Turns(around, begin, None, ask)
    prefix, suffix = _without_start(system_begin, start), _without_end(system_end, user_prefix)
    around = {_SYSTEM: (prefix, suffix), **around}
    default = _without_start(begin, start)
    if default:
        default = _without_end(_without_start(default, prefix), suffix)
        return Turns(around, start, default, ask)
    return Turns(around, start, None, ask)


def _is_exact(tokenizer: Any, turns: Turns) -> bool:
    """Whether all conversations of up to three questions are as the chat template writes them."""
    for questions in (1, 2, 3):
        talk = [
            _message((_USER, _ASSISTANT)[i % 2], f"{word} {i}") for i, word in enumerate(_WORDS[: 2 * questions - 1])
        ]
        systems: list[list[dict[str, str]]] = [[]]
        if _SYSTEM in turns.around:
            systems.append([_message(_SYSTEM, "Be brief.\nBe kind.")])
        if any(turns.render([*system, *talk]) != _rendered(tokenizer, [*system, *talk], True) for system in systems):
            return False
    return True


def _pieces(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool) -> list[str]:
    """The text before, between and after the contents of messages."""
    rest = _rendered(tokenizer, messages, ask)
    pieces = []
    for message in messages:
        piece, rest = rest.split(message["content"])
        pieces.append(piece)
    return [*pieces, rest]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], ask: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("the text begins in another way")
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError("the text ends in another way")
    return text[: len(text) - len(end)]


def _stops(tokenizer: Any, ends: Iterable[int]) -> list[str]:
    """Texts at which generation ends."""
    if tokenizer is None:
        return []
    numbers = dict.fromkeys((tokenizer.eos_token_id, *ends))
    texts = [tokenizer.convert_ids_to_tokens(number) for number in numbers if number is not None]
    return [text for text in texts if text and not set('"\\\n') & set(text)]

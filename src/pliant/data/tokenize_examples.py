"""Examples as token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pliant.data.text import Text
from pliant.digest import digest
from pliant.errors import DataError

if TYPE_CHECKING:
    from pliant.data.examples import Example

IGNORED = -100
"""The label of a token that is not learned, as everywhere in transformers."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Sequences of token ids, with a label for every token: its id where it is learned, -100 where it is only read.

    Attributes:
        ids: one tensor of shape ``(tokens,)`` for each sequence, int64.
        labels: the same shapes.
        dropped: rows left out, because what is to be learned in them lies behind the end of the sequence.
    """

    ids: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(len(ids) for ids in self.ids)

    @property
    def digest(self) -> str:
        """Hash of all ids and labels."""
        return digest(one.numpy().tobytes() + b"|" for one in (*self.ids, *self.labels))

    def take(self, which: Iterable[int]) -> Encoded:
        """Some of the sequences, in the given order."""
        which = list(which)
        return Encoded(tuple(self.ids[i] for i in which), tuple(self.labels[i] for i in which))

    def split(self, count: int) -> tuple[Encoded, Encoded]:
        """The sequences without ``count`` of them, and these: at even distances, so that both have the same mix."""
        out = {i * len(self) // count for i in range(count)}
        rest = self.take(i for i in range(len(self)) if i not in out)
        return replace(rest, dropped=self.dropped), self.take(sorted(out))

    def batch(self, which: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some sequences as one batch, filled up on the right.

        Returns:
            ids, labels and attention mask, each of shape ``(sequences, longest)`` and int64.
        """
        chosen = self.take(which)
        padded = torch.nn.utils.rnn.pad_sequence
        ids = padded(list(chosen.ids), batch_first=True, padding_value=0)
        labels = padded(list(chosen.labels), batch_first=True, padding_value=IGNORED)
        mask = padded([torch.ones_like(one) for one in chosen.ids], batch_first=True, padding_value=0)
        return ids, labels, mask


def encode(rows: Sequence[Example], source: str, tokenizer: Any, seqlen: int) -> Encoded:
    """See :meth:`pliant.data.examples.Examples.encode`."""
    if seqlen < 2:
        raise DataError(f"a sequence needs at least 2 tokens to predict one from another, not {seqlen}")
    ids: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    dropped = 0
    plain = tuple(row.text for row in rows if row.text is not None)
    if plain:
        windows = Text(plain, source).windows(tokenizer, seqlen)
        ids += windows.unbind()
        labels += windows.unbind()
    for number, row in enumerate(rows, 1):
        if row.text is not None:
            continue
        for one, label in _sequences(row, tokenizer, f"{source}, row {number}"):
            one, label = one[:seqlen], label[:seqlen]
            if bool((label[1:] == IGNORED).all()):  # the first token is predicted from nothing
                dropped += 1
                continue
            ids.append(one)
            labels.append(label)
    if not ids:
        raise DataError(
            f"{source}: in none of the {len(rows)} row(s) anything to learn lies within {seqlen} tokens; give a larger seqlen"
        )
    return Encoded(tuple(ids), tuple(labels), dropped)


def _sequences(row: Example, tokenizer: Any, where: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The ids and labels of a prompt with its completion, or of a conversation."""
    if row.messages is not None:
        return [
            _labelled(tokenizer, text, spans, where, rendered=True) for text, spans in _render(row, tokenizer, where)
        ]
    prompt, completion = row.prompt or "", row.completion or ""
    ids, labels = _labelled(tokenizer, prompt + completion, [(len(prompt), len(prompt + completion))], where)
    end = tokenizer.eos_token_id
    if end is not None and (not len(ids) or ids[-1] != end):
        ids = torch.cat([ids, torch.tensor([end])])
        labels = torch.cat([labels, torch.tensor([end])])
    elif end is not None:
        labels[-1] = end  # where to stop is to be learned, whoever wrote it
    return [(ids, labels)]


def _labelled(
    tokenizer: Any, text: str, spans: Sequence[Span], where: str, *, rendered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise a text once and learn the tokens that end inside a span: tokens may reach over the edges of a prompt.

    Arguments:
        rendered: the text comes from a chat template and has its special tokens already.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{where}: to tell prompt from completion a fast tokenizer is needed, not {type(tokenizer).__name__}"
        )
    out = tokenizer(text, add_special_tokens=not rendered, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(out["input_ids"], dtype=torch.int64)
    learned = torch.tensor(
        [
            any(begin < end <= stop or begin <= start < stop for begin, stop in spans)
            for start, end in out["offset_mapping"]
        ],
        dtype=torch.bool,
    )
    return ids, torch.where(learned, ids, IGNORED)


def _render(row: Example, tokenizer: Any, where: str) -> list[tuple[str, list[Span]]]:
    """A conversation through the chat template, and which stretches of it the assistant says.

    What a turn of the assistant adds is found by rendering the conversation up to it and including it. A template that
    renders earlier turns in another way once later ones follow (some take the reasoning out) gives one text for each turn,
    with only that turn learned: that is what the model will see when it answers.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is a conversation, and this tokenizer has no chat template: set tokenizer.chat_template, or give rows "
            "of prompt and completion"
        )
    messages = [dict(message) for message in row.messages or ()]

    def render(count: int, prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # templates raise what they like
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error

    turns: list[tuple[str, Span]] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = render(place + 1)
        # a prompt for the answer is not learned where the template has one; before the first message there is nothing
        before = [render(place, True), render(place)] if place else [""]
        given = next((text for text in before if upto.startswith(text)), None)
        if given is None:
            raise DataError(
                f"{where}: in the chat template's output, turn {place + 1} does not follow what precedes it"
            )
        turns.append((upto, (len(given), len(upto))))
    whole = turns[-1][0]  # what others say after the assistant's last turn teaches nothing
    if all(whole.startswith(upto) for upto, _ in turns):
        return [(whole, [span for _, span in turns])]
    return [(upto, [span]) for upto, span in turns]

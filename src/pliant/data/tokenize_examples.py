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
"""The label of a token that is not trained on, as everywhere in transformers."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Sequences of token ids, with a label for every token: its id if it is trained on, else -100.

    Attributes:
        ids: one tensor of shape ``(tokens,)`` for each sequence, int64.
        labels: the same shapes.
        dropped: rows left out, because all tokens to train on lie behind the end of the sequence.
    """

    ids: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(len(ids) for ids in self.ids)

    @property
    def digest(self) -> str:
        """Hash of all ids and labels."""
        return digest(tensor.numpy().tobytes() + b"|" for tensor in (*self.ids, *self.labels))

    def take(self, indices: Iterable[int]) -> Encoded:
        """The sequences at these indices, in their order."""
        indices = list(indices)
        return Encoded(tuple(self.ids[i] for i in indices), tuple(self.labels[i] for i in indices))

    def split(self, count: int) -> tuple[Encoded, Encoded]:
        """Split into remaining and ``count`` held-out sequences, at even distances, so that both have the same mix."""
        held_out = {i * len(self) // count for i in range(count)}
        rest = self.take(i for i in range(len(self)) if i not in held_out)
        return replace(rest, dropped=self.dropped), self.take(sorted(held_out))

    def batch(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sequences at these indices as one batch, padded on the right.

        Returns:
            ids, labels and attention mask, each of shape ``(sequences, longest)`` and int64.
        """
        chosen = self.take(indices)
        padded = torch.nn.utils.rnn.pad_sequence
        ids = padded(list(chosen.ids), batch_first=True, padding_value=0)
        labels = padded(list(chosen.labels), batch_first=True, padding_value=IGNORED)
        mask = padded([torch.ones_like(sequence) for sequence in chosen.ids], batch_first=True, padding_value=0)
        return ids, labels, mask


def encode(rows: Sequence[Example], source: str, tokenizer: Any, seqlen: int) -> Encoded:
    """See :meth:`pliant.data.examples.Examples.encode`."""
    if seqlen < 2:
        raise DataError(f"a sequence must have at least 2 tokens; not {seqlen}")
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
        for sequence, label in _sequences(row, tokenizer, f"{source}, row {number}"):
            sequence, label = sequence[:seqlen], label[:seqlen]
            if bool((label[1:] == IGNORED).all()):  # the first token is not predicted
                dropped += 1
                continue
            ids.append(sequence)
            labels.append(label)
    if not ids:
        raise DataError(
            f"{source}: none of the {len(rows)} row(s) has a token to train on within its first {seqlen} tokens; give "
            "a larger seqlen"
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
        labels[-1] = end  # the end token is trained on, whoever added it
    return [(ids, labels)]


def _labelled(
    tokenizer: Any, text: str, spans: Sequence[Span], where: str, *, rendered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise a text once, and label the tokens that end inside a span: tokens may cross the end of a prompt.

    Arguments:
        rendered: the text comes from a chat template and has its special tokens already.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{where}: separating prompt and completion needs a fast tokenizer, not {type(tokenizer).__name__}"
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
    """Render a conversation with the chat template, and find the spans of the assistant's turns.

    A turn of the assistant is the difference between the conversation rendered up to it and including it. Some
    templates render earlier turns differently once later ones follow (they drop the reasoning). Such a conversation
    gives one text per turn of the assistant, with only that turn trained on: this is the text that the model sees when
    it answers.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is a conversation, and this tokenizer has no chat template: set tokenizer.chat_template, or "
            "give rows of prompt and completion"
        )
    messages = [dict(message) for message in row.messages or ()]

    def render(count: int, prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template may raise anything
            raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error

    turns: list[tuple[str, Span]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = render(index + 1)
        # the generation prompt is not trained on if the template has one; before the first message there is no text
        before = [render(index, True), render(index)] if index else [""]
        prefix = next((text for text in before if upto.startswith(text)), None)
        if prefix is None:
            raise DataError(f"{where}: the chat template does not put turn {index + 1} after the turns before it")
        turns.append((upto, (len(prefix), len(upto))))
    whole = turns[-1][0]  # turns after the assistant's last one are not trained on
    if all(whole.startswith(upto) for upto, _ in turns):
        return [(whole, [span for _, span in turns])]
    return [(upto, [span]) for upto, span in turns]

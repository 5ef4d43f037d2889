"""Score: one number that says how well a model does."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from pliant.registry import SCORES, name_of, short_name

PLAIN = (int, float, str, type(None))  # bool is an int


class Score:
    """A number for a model, the mean over what it is measured on.

    A score of logits implements :meth:`batch`. It is measured on the calibration windows, and sub-networks that begin
    alike share the hidden states of their first layers. A score of its own examples, or one that generates, implements
    :meth:`measure` instead. Both return a sum and the number of things that were summed. A score with settings is a
    dataclass.

        class NextToken(Score):
            label = "next tokens predicted"
            lower_is_better = False

            def batch(self, logits, targets, reference=None):
                right = logits[:, : targets.shape[1]].argmax(-1) == targets
                return right.sum().item(), right.numel()
    """

    name: ClassVar[str] = ""
    """Name in the archive and in messages; by default its name in the registry, or that of the class in small
    letters."""

    label: ClassVar[str] = ""
    """The shown value in a few words, for tables and curves; by default the name."""

    lower_is_better: ClassVar[bool] = True

    needs_reference: ClassVar[bool] = False
    """Whether :meth:`batch` compares with the logits of the dense model."""

    needs_labels: ClassVar[bool] = False
    """Whether it is measured on examples of its own, with known answers."""

    generates: ClassVar[bool] = False
    """Whether the model writes text for it, one token after the other."""

    logits_copies: ClassVar[int] = 1
    """Tensors as large as the logits of a batch that are in memory at the same time."""

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        if "name" not in vars(cls):
            cls.name = short_name(SCORES, cls)
        cls.label = cls.label or cls.name

    @property
    def key(self) -> str:
        """A text for the archive that names everything the score depends on besides the model and the calibration text:
        its name, and the fields of a dataclass. A score that holds anything else has a key of its own."""
        return ":".join([self.name, *(f"{name}={value!r}" for name, value in _fields(self).items())])

    def plain(self) -> str | dict[str, Any]:
        """The score as plain data, for recipes: its name, with the fields of a dataclass. A recipe cannot repeat a
        score that holds anything else, and has its key instead."""
        name, fields = name_of(SCORES, type(self)), _fields(self)
        if vars(self).keys() != fields.keys() or not all(isinstance(value, PLAIN) for value in fields.values()):
            return {"score": name, "key": self.key}
        return {"score": name, **fields} if fields else name

    @property
    def on_windows(self) -> bool:
        """Whether it is measured on the logits of the calibration windows, see :meth:`batch`."""
        return not (self.needs_labels or self.generates)

    def batch(
        self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
    ) -> tuple[float, int]:
        """The sum of the score over some tokens, and their number.

        Arguments:
            logits: shape ``(windows, tokens, vocabulary)``.
            targets: the token after each of them, shape ``(windows, tokens)``, or one token less at the end of the
                windows.
            reference: logits of the dense model, as ``logits``; None unless :attr:`needs_reference`.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a score of logits; it implements measure")

    def measure(self, model: Any, tokenizer: Any) -> tuple[float, int]:
        """The sum of the score over its own examples, and their number."""
        raise NotImplementedError(f"{type(self).__name__} is a score of logits; it implements batch")

    def loss(self, value: float) -> float:
        """The score as a number of which less is better."""
        return value if self.lower_is_better else -value

    def shown(self, loss: float) -> float:
        """The number that people read, from a :meth:`loss`."""
        return loss if self.lower_is_better else -loss


def _fields(score: Score) -> dict[str, Any]:
    """Name -> value, for every field of a dataclass."""
    return (
        {f.name: getattr(score, f.name) for f in dataclasses.fields(score)} if dataclasses.is_dataclass(score) else {}
    )

"""Accuracy of a model that classifies texts or images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from pliant.digest import digest
from pliant.errors import DataError
from pliant.measure.scores.score import Score


class ClassAccuracy(Score):
    """Share of examples whose likeliest class is the right one.

    Arguments:
        batches: (inputs, labels) for one forward pass each: the tensors by argument name, such as ``pixel_values`` or
            ``input_ids``, or one tensor for a model that takes just that; and the right classes, shape ``(examples,)``.
    """

    name: ClassVar[str] = "class_accuracy"
    label: ClassVar[str] = "examples classified correctly"
    lower_is_better: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __init__(self, batches: Sequence[tuple[Mapping[str, torch.Tensor] | torch.Tensor, torch.Tensor]]):
        if not batches:
            raise DataError("class accuracy needs at least one batch of examples")
        self.batches = list(batches)

    @property
    def key(self) -> str:
        parts: list[str | bytes] = []
        for inputs, labels in self.batches:
            named = inputs if isinstance(inputs, Mapping) else {"": inputs}
            for name, tensor in [*sorted(named.items()), ("labels", labels)]:
                parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)};")
                parts.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return f"{self.name}:{digest(parts)}"

    @torch.inference_mode()
    def measure(self, model: Any, tokenizer: Any = None) -> tuple[float, int]:
        del tokenizer
        device = next(model.parameters()).device
        right = count = 0
        for inputs, labels in self.batches:
            if isinstance(inputs, Mapping):
                outputs = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            else:
                outputs = model(inputs.to(device))
            logits = getattr(outputs, "logits", outputs)
            right += int((logits.argmax(-1) == labels.to(device)).sum())
            count += labels.numel()
        return right, count

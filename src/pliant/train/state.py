"""The state of a training on disk: one file that is whole or absent, and says what it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pliant.errors import ArtefactError, ResumeError
from pliant.files import replacing

VERSION = 1  # raise it when a state comes to mean something else


class StateFile:
    """Tensors and plain data of a training, replaced as a whole.

    Arguments:
        path: the file; None keeps nothing.
        belongs_to: model, data and settings that the training depends on, JSON-ready.
    """

    def __init__(self, path: Path | None, belongs_to: dict[str, Any]):
        self.path = path
        self._header = json.loads(json.dumps({"training": VERSION, **belongs_to}))

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What :meth:`write` was given last, or None.

        Raises:
            ResumeError: it belongs to another training, or is damaged; the message names what differs.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                told = file.metadata() or {}
                header, plain = json.loads(told["header"]), json.loads(told["plain"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ResumeError(f"{str(self.path)!r} is damaged ({error}); delete it to start anew") from error
        differing = sorted(key for key in {*header, *self._header} if header.get(key) != self._header.get(key))
        if differing:
            told = "; ".join(
                f"{key}: {header.get(key)!r} there, {self._header.get(key)!r} now" for key in differing[:4]
            )
            raise ResumeError(
                f"{str(self.path)!r} belongs to another training ({told}). Delete it, or work in another folder"
            )
        return tensors, plain

    def write(self, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Replace the file; when this returns it is on the disk.

        Raises:
            ArtefactError: it cannot be written. What was there stays.
        """
        if self.path is None:
            return
        try:
            with replacing(self.path) as aside:
                save_file(
                    {key: tensor.detach().contiguous() for key, tensor in tensors.items()},
                    aside,
                    {"header": json.dumps(self._header), "plain": json.dumps(plain)},
                )
        except (OSError, SafetensorError) as error:
            raise ArtefactError(f"cannot write the state of the training {str(self.path)!r}: {error}") from error

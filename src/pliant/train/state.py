"""The state of a training on disk: one file, complete or absent, that records which training it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pliant.errors import ArtefactError, ResumeError
from pliant.files import replacing
from pliant.formatting import differences

VERSION = 1  # to be raised when the meaning of a state changes


class StateFile:
    """The file with the tensors and plain data of a training, replaced as a whole.

    Arguments:
        path: the file; None to keep nothing.
        belongs_to: model, data and settings that the training depends on, as plain data.
    """

    def __init__(self, path: Path | None, belongs_to: dict[str, Any]):
        self.path = path
        self._header = json.loads(json.dumps({"training": VERSION, **belongs_to}))

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last state that :meth:`write` was given, or None.

        Raises:
            ResumeError: the file belongs to another training, or is damaged; the message names the differences.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                header, plain = json.loads(metadata["header"]), json.loads(metadata["plain"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ResumeError(
                f"{str(self.path)!r} is damaged ({error}); delete it to start the training again"
            ) from error
        if differing := differences(header, self._header):
            raise ResumeError(
                f"{str(self.path)!r} belongs to another training ({differing}). Delete it, or use another work folder"
            )
        return tensors, plain

    def write(self, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Replace the file. It is on the disk when this returns.

        Raises:
            ArtefactError: the file cannot be written. The old one stays.
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

"""``import pliant`` is all it takes for transformers to know ``"quant_method": "pliant"``.

transformers has a registry for that. It is entered when its module is imported, so that importing pliant loads neither
transformers nor torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MODULE = "transformers.quantizers.auto"


def register(_: ModuleType) -> None:
    """Enter pliant's packed layers into transformers' registry of quantisation methods."""
    importlib.import_module("pliant.checkpoint.quantizer")
    importlib.import_module("pliant.compat.packed_quantizer")

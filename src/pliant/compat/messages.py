"""transformers warns whoever reads, and lets read, the global value of what differs from layer to layer. Of models that pliant
cut only its own checks of a config do that, whenever one is loaded or saved; that is how it has to be, and nobody's mistake."""

from __future__ import annotations

import logging
import sys

LOGGER = "transformers.integrations.heterogeneity.configuration_utils"


def register() -> None:
    """Leave these warnings out. The logger need not be there yet."""
    logging.getLogger(LOGGER).addFilter(_is_for_others)


def _is_for_others(record: logging.LogRecord) -> bool:
    """Whether a message is not that warning, or is about a config that pliant did not write."""
    if not str(record.msg).startswith("Reading global config value"):
        return True
    from pliant.anatomy import DENSE_LAYERS

    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "__getattribute__":  # of the config that is read
        frame = frame.f_back
    return frame is None or DENSE_LAYERS not in vars(frame.f_locals["self"])

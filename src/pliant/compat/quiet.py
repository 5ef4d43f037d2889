"""Drop a warning that transformers' own validation causes on the config of a cut model.

The config of a cut model whose head counts differ has ``allow_global_per_layer_attribute_access``. Then transformers
(checked: 5.14 to 5.24) logs "Reading global config value for per-layer attribute ..." whenever its validation reads the
config, at every load and save. The message warns programs that use the global value for a layer; the validation does
not, and the user cannot act on it.
"""

from __future__ import annotations

import logging

LOGGER = "transformers.integrations.heterogeneity.configuration_utils"
MESSAGE = "Reading global config value for per-layer attribute"


class _NotOfReading(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(MESSAGE)


def silence() -> None:
    """Drop that message, whether or not transformers is imported yet."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(known, _NotOfReading) for known in logger.filters):
        logger.addFilter(_NotOfReading())

"""No warning of what transformers itself does to the config of a cut model.

The config of a cut model whose head counts differ has ``allow_global_per_layer_attribute_access``. Then transformers (checked: 5.14
to 5.24) logs "Reading global config value for per-layer attribute ..." whenever its own validation walks through the config, which
it does at every load and save. The message is for programs that read such a value for a layer; what reads it here does not, and
the user can do nothing about it.
"""

from __future__ import annotations

import logging

LOGGER = "transformers.integrations.heterogeneity.configuration_utils"
MESSAGE = "Reading global config value for per-layer attribute"


class _NotOfReading(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(MESSAGE)


def silence() -> None:
    """Drop that message, whether or not transformers has been imported."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(known, _NotOfReading) for known in logger.filters):
        logger.addFilter(_NotOfReading())

"""The errors that pliant raises. Each is also the builtin error that a caller expects, so plain ``except ValueError``
works."""


class PliantError(Exception):
    """Base of every error that pliant raises on purpose. The message says what was given, what is allowed, what to
    do."""


class ArchitectureError(PliantError, ValueError):
    """The model's layout is unknown, or does not agree with the architecture file that describes it."""


class UnknownArchitectureError(ArchitectureError):
    """No architecture file describes this kind of model."""


class SubnetError(PliantError, ValueError):
    """A sub-network names blocks or axes that the model does not have, or keeps an impossible number of units."""


class DataError(PliantError, ValueError):
    """Text or questions are missing, empty, too short, malformed, or tokenised for another model."""


class StepError(PliantError, ValueError):
    """A setting of a step is unknown or out of range."""


class RatioError(PliantError, ValueError):
    """The requested ratio is meaningless or out of reach."""


class WeightError(PliantError, ValueError):
    """The model's weights are not finite numbers."""


class PackedError(PliantError, ValueError):
    """A tensor is not a packed matrix, or a damaged one; or a layer cannot be packed as requested."""


class ArtefactError(PliantError, OSError):
    """A model folder is missing, incomplete, damaged, or cannot be written."""


class MemoryLimitError(PliantError, MemoryError):
    """The work needs more memory than the limit allows, or the limit cannot be enforced on this machine."""


class DeviceError(PliantError, RuntimeError):
    """A device is missing, or cannot run this model."""


class BusyError(PliantError, RuntimeError):
    """Another run is already writing to the same folder."""


class MissingExtraError(PliantError, ImportError):
    """A package of an optional extra is not installed."""


class ResumeError(PliantError, ValueError):
    """The saved state of an interrupted training is damaged or belongs to another training."""


class DivergedError(PliantError, ArithmeticError):
    """The loss is no longer finite."""

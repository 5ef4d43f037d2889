"""What can go wrong, as types. Each also is the builtin error a caller would expect, so plain ``except ValueError`` works."""


class PliantError(Exception):
    """Base of every error that pliant raises on purpose. The message says what was given, what is allowed, what to do."""


class ArchitectureError(PliantError, ValueError):
    """The model's layout is unknown, or does not agree with the architecture file that describes it."""


class UnknownArchitectureError(ArchitectureError):
    """No architecture file describes this kind of model."""


class SubnetError(PliantError, ValueError):
    """A sub-network names blocks or axes the model does not have, or keeps an impossible amount of one."""


class DataError(PliantError, ValueError):
    """Text or questions are missing, empty, too short, malformed, or tokenised for another model."""


class StepError(PliantError, ValueError):
    """A setting of a step is outside what it can be."""


class RatioError(PliantError, ValueError):
    """The wanted ratio is outside what is meaningful or reachable."""


class WeightError(PliantError, ValueError):
    """The model's weights are not finite numbers."""


class PackedError(PliantError, ValueError):
    """A packed matrix is damaged, cut short, or none; or a layer cannot be packed as asked."""


class ArtefactError(PliantError, OSError):
    """A model folder is missing, incomplete, damaged, or cannot be written."""


class MemoryLimitError(PliantError, MemoryError):
    """The work needs more memory than the limit allows, or the limit cannot be held here."""


class DeviceError(PliantError, RuntimeError):
    """A device is missing, or cannot run this model."""


class BusyError(PliantError, RuntimeError):
    """Another run is already writing to the same folder."""


class MissingExtraError(PliantError, ImportError):
    """A package of an optional extra is not installed."""


class ResumeError(PliantError, ValueError):
    """What an interrupted training left on disk belongs to another one, or is damaged."""


class DivergedError(PliantError, ArithmeticError):
    """The loss is no longer a number."""

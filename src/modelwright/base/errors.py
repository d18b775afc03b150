"""The tree of errors: everything the house raises on purpose.

    ModelwrightError
    |-- ConfigError      a setting or recipe is wrong                     (also a ValueError)
    |-- DataError        a document, data set or tokenizer file is wrong  (also a ValueError)
    |-- CheckpointError  weights, manifests or resumed state are wrong
    |-- DeviceError      the machine lacks what was asked of it
    |-- RequestError     the caller's request cannot be served as given   (HTTP 400 and kin)
    |-- CapacityError    the house is full; the same request may pass later (HTTP 503)
    `-- MissingExtraError an optional dependency is not installed         (also an ImportError)

A message has four parts: what happened, the value seen, what was expected, what to do.
"""


class ModelwrightError(Exception):
    """Root of every error raised on purpose; the command line prints it without a traceback."""


class ConfigError(ModelwrightError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class DataError(ModelwrightError, ValueError):
    """A document, data set or tokenizer file cannot be used; the message names it."""


class CheckpointError(ModelwrightError):
    """A checkpoint, manifest or saved state is missing, damaged or does not fit."""


class DeviceError(ModelwrightError):
    """The machine lacks what was asked of it: memory, disk, a port, a device."""


class OutOfMemoryError(DeviceError):
    """A step needs more memory than there is; the message says which settings to change."""


class RequestError(ModelwrightError):
    """A request cannot be served as given; ``code`` and ``param`` follow the OpenAI error body."""

    def __init__(self, message: str, *, code: str = "invalid_request", param: str | None = None, status: int = 400):
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = status


class CapacityError(ModelwrightError):
    """The house is full right now; the same request may pass later."""


class MissingExtraError(ModelwrightError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'modelwright[{extra}]'"
        )

"""One family of exceptions; every message says what was wrong, why it matters, how to mend it, and where.

Each class also inherits the built-in exception that torch raises in the same place, so that code written
for ``torch.nn`` keeps catching what it caught.
"""

from __future__ import annotations


class BatchNormError(Exception):
    """Base of every error that this package raises on purpose.

    Parameters
    ----------
    what : str
        What was wrong, with the value that was wrong.
    why : str, optional
        Why it matters.
    mend : str, optional
        How to mend it.
    at : str, optional
        The module's path in the model, when it is known.
    """

    def __init__(self, what: str, *, why: str = "", mend: str = "", at: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.mend, self.at = what, why, mend, at

    def __str__(self) -> str:
        lines = [self.what]
        lines += [
            f"  {name}: {text}"
            for name, text in (("why", self.why), ("mend", self.mend), ("at", self.at))
            if text
        ]
        return "\n".join(lines)

    def __reduce__(self) -> tuple:
        # the default would drop the keyword-only parts when an error crosses a process
        state = {"what": self.what, "why": self.why, "mend": self.mend, "at": self.at}
        return (type(self), (self.what,), state)


class ShapeError(BatchNormError, ValueError, RuntimeError):
    """A tensor has the wrong number of axes, or a vector the wrong length."""


class DtypeError(BatchNormError, TypeError, RuntimeError):
    """A tensor has a dtype that batch normalization is not defined for."""


class DeviceError(BatchNormError, RuntimeError):
    """Tensors that belong together are on different devices."""


class LayoutError(BatchNormError, RuntimeError):
    """A tensor's values lie in memory in a way that batch normalization is not defined for."""


class ArgumentError(BatchNormError, ValueError):
    """An argument has a value outside its range, or two arguments contradict each other."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of a kind that it cannot be, where torch raises TypeError."""


class TooFewValuesError(BatchNormError, ValueError):
    """Training with fewer than two values per channel."""


class MissingStatisticsError(BatchNormError, ValueError, RuntimeError):
    """Inference without population statistics."""


class NonFiniteError(BatchNormError, ValueError):
    """A batch holds NaN or inf and the policy is to say so."""


class TraceError(BatchNormError, RuntimeError):
    """The flow of values through a model cannot be seen."""


class VerificationError(BatchNormError, RuntimeError):
    """A changed network did not give the answers of the one it came from."""


class DataError(BatchNormError, ValueError):
    """A data set, loader or file is empty or cannot be read, or a file cannot be written."""


class PoolingError(BatchNormError, RuntimeError):
    """The ranks that pool their statistics do not do the same, or one of them does not answer."""

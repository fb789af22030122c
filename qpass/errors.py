"""Every exception that qpass raises on purpose."""


class QpassError(Exception):
    """Base of all errors a user can meet; says what, where and what to do."""


class UnknownName(QpassError, KeyError):
    """A format, rounding, rotation, recipe or key that does not exist."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class BadInput(QpassError, ValueError):
    """An argument, file or recipe that qpass cannot use."""


class CaptureFailed(QpassError):
    """A model whose graph could not be obtained."""


class ContractBroken(QpassError):
    """A pass did not keep its promise; always a bug in qpass, never in the model."""


class Unsupported(QpassError):
    """Something qpass can name but not do here, such as a device or a backward pass."""


class StateError(QpassError):
    """A call that the object's history forbids, such as a second `quantize`."""

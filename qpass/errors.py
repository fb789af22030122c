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


def expect(claim: bool, key: str, value: object, allowed: str) -> None:
    """Raise BadInput about the field `key` unless `claim` holds."""
    if not claim:
        raise BadInput(f"{key} = {value!r}: expected {allowed}")


def expect_type(kind: type, key: str, value: object, allowed: str) -> None:
    """Raise BadInput about the field `key` unless `value` is a `kind`; a bool is no int."""
    expect(type(value) is kind, key, value, allowed)

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


def expect_instance(kind: type | tuple[type, ...], key: str, value: object, allowed: str) -> None:
    """Raise BadInput about the argument `key` unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise BadInput(f"{key} is {_with_article(value)}; expected {allowed}")


def own_failure(who: str, error: Exception) -> BadInput:
    """The error for inputs on which `who`, the user's model, fails by itself."""
    said = first_line(error)
    hint = (
        "\n  an index lies outside of a table: a token that is not in the vocabulary, or a text "
        "that is longer than the model has positions"
    )
    looked_up = isinstance(error, IndexError) and "index out of range" in said
    return BadInput(
        f"{who} itself fails on these inputs: {type(error).__name__}: {said}"
        + (hint if looked_up else "")
    )


def first_line(error: BaseException) -> str:
    """The first line of a message that says something, or the name of the exception."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _with_article(value: object) -> str:
    name = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    if value is None or isinstance(value, type):
        return name.replace("NoneType", "None")
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"

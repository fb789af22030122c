"""Which GPU kernel serves a call of an operator, and how CUDA tensors come to meet one.

`register` gives every operator of qpass an implementation for CUDA tensors, without initialising
CUDA. Triton and the files of `kernels/gpu` are imported by the first call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.library import Library

from qpass.errors import Unsupported
from qpass.ops.library import specification
from qpass.registry import Registry
from qpass.runtime.kernel import Choice, Refusal
from qpass.runtime.target import Target, target_of
from qpass.runtime.tuned import Tuning

PLAIN = "plain PyTorch"
OPERATORS = (
    "hadamard",
    "quantize_rows",
    "quantize_blocks",
    "linear.real",
    "linear.codes",
    "linear.points",
    "linear.blocks",
    "linear_fours",
    "linear.experts",
    "linear.real_low_rank",
    "linear.codes_low_rank",
    "embedding",
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """An operator of qpass, its arguments by name, and the target they are on.

    `accepts` of a kernel may look at shapes, dtypes and strides, never at values: the tensors may
    be fake.
    """

    operator: str
    arguments: Mapping[str, Any]
    target: Target

    @staticmethod
    def of(operator: str, arguments: Sequence[object], target: Target) -> Call:
        """Bind positional arguments to the names and defaults of the operator's schema."""
        parameters = _parameters(operator)
        bound = dict(parameters)
        bound.update(zip((name for name, _ in parameters), arguments, strict=False))
        return Call(operator, bound, target)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        return self.arguments[name]

    @property
    def values(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        return tuple(self.arguments.values())


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """What a call must at least move and do: bytes, operations, and the kind of the operations."""

    nbytes: float
    operations: float
    kind: str


@final
@dataclass(frozen=True, slots=True, eq=False)
class Build:
    """One compilation of a jitted function, as `make gpu-aot` checks it.

    `signature` maps the function's run-time parameters to Triton types (`*bf16`, `i32`, ...), in
    any order; pointers and the integers named in `divisible` are multiples of 16. `mma` is the
    kind of matrix product whose instructions the code must have (`bf16`, `int8`, ...).
    """

    label: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int
    stages: int
    mma: str | None = None
    divisible: frozenset[str] = frozenset()
    # whether a product and a sum may round once
    fusion: bool = True
    # what one launch costs, and how many programs it has, for the prediction
    cost: Cost | None = None
    programs: int | None = None
    # what it is compiled within
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@final
@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One implementation of an operator.

    `accepts` says why a call cannot be served, or None; `launch` computes what the specification
    does, from the same call. `builds` lists the compilations for a target, or says why there are
    none. Of several kernels that accept a call, the one with the highest `preference` serves it.
    """

    name: str
    operator: str
    accepts: Callable[[Call], str | None]
    launch: Callable[[Call], Any]
    cost: Callable[[Call], Cost]
    builds: Callable[[Target], Sequence[Build] | str]
    preference: int = 0
    # how it is configured, where there is more than one way
    tuning: Tuning | None = None


KERNELS: Registry[Kernel] = Registry("GPU kernel", "qpass._kernels.gpu")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """The kernel that serves a call, or None for plain PyTorch, and why no better one does."""

    kernel: Kernel | None
    refused: tuple[Refusal, ...] = field(default=())

    def choice(self) -> Choice:
        """The same as names."""
        return Choice(self.kernel.name if self.kernel else PLAIN, self.refused)


def choose(call: Call) -> Served:
    """The first kernel that accepts a call, in the order of preference."""
    refused: list[Refusal] = []
    for kernel in _by_operator()[call.operator]:
        why = kernel.accepts(call)
        if why is None:
            return Served(kernel, tuple(refused))
        refused.append(Refusal(kernel.name, why))
    return Served(None, tuple(refused))


def explain(operator: str, *arguments: object, target: Target) -> Choice:
    """Which kernel serves this call on `target`; the tensors may be fake, meta or on the CPU."""
    return choose(Call.of(operator, arguments, target)).choice()


@functools.cache
def why_not() -> str | None:
    """Why no GPU kernel can serve any call in this process, or None."""
    try:
        len(KERNELS)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton"):
            raise
        return "Triton is not installed; pip install 'qpass[gpu]'"
    return None


def lacking() -> str | None:
    """What this machine lacks for kernels on its GPU, or None; Triton is asked for last."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    found = target_of(torch.cuda.current_device())
    return found if isinstance(found, str) else why_not()


def insist(device: str) -> None:
    """Raise `Unsupported` where a recipe insists on a GPU and no kernel serves one here."""
    if device == "cuda" and (why := lacking()) is not None:
        raise Unsupported(
            f'the recipe has device = "cuda": {why}\n'
            "  leave device out to quantize here, or run this where such a GPU is"
        )


def state() -> str:
    """One line for people: which GPU the kernels serve, or why they serve none."""
    if not torch.cuda.is_available():
        return "no GPU kernels: torch finds no CUDA device; models on the CPU are not concerned"
    if (why := lacking()) is not None:
        return f"no GPU kernels, operators run on plain PyTorch: {why}"
    found = cast("Target", target_of(torch.cuda.current_device()))
    return f"GPU kernels for {found.name}: {', '.join(kernel.name for kernel in KERNELS)}"


@functools.cache
def _by_operator() -> dict[str, tuple[Kernel, ...]]:
    ordered = sorted(KERNELS, key=lambda kernel: (-kernel.preference, kernel.name))
    return {name: tuple(k for k in ordered if k.operator == name) for name in OPERATORS}


@functools.cache
def _parameters(operator: str) -> tuple[tuple[str, Any], ...]:
    """The names and defaults of an operator's parameters."""
    name, _, overload = operator.partition(".")
    schema = torch._C._get_schema(f"qpass::{name}", overload)
    return tuple((argument.name, argument.default_value) for argument in schema.arguments)


def _key(argument: object) -> object:
    if not isinstance(argument, Tensor):
        return argument
    # kernels may want aligned pointers; what else they look at is here
    aligned = argument.data_ptr() % 16 == 0
    return (argument.shape, argument.dtype, argument.stride(), argument.device, aligned)


# choices by what `accepts` may look at; decoding repeats a few hundred
_CHOSEN: dict[object, Kernel | None] = {}
_MOST_CHOICES = 1 << 14


def _implementation(operator: str) -> Callable[..., Any]:
    plain = specification(operator)

    def run(*arguments: object) -> Any:  # noqa: ANN401
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        found = target_of(device.index)
        if isinstance(found, str):
            _warn(found)
            return plain(*arguments)
        if (why := why_not()) is not None:
            _warn(why)
            return plain(*arguments)
        call = Call.of(operator, arguments, found)
        key = (operator, *map(_key, arguments))
        if key not in _CHOSEN:
            if len(_CHOSEN) >= _MOST_CHOICES:
                _CHOSEN.clear()
            _CHOSEN[key] = choose(call).kernel
        kernel = _CHOSEN[key]
        if kernel is None:
            return plain(*arguments)
        if device.index == torch.cuda.current_device():
            return kernel.launch(call)
        with torch.cuda.device(device):
            return kernel.launch(call)

    return run


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(f"qpass runs on plain PyTorch on this GPU: {why}", stacklevel=4)


@functools.cache
def register() -> Library:
    """Let kernels serve CUDA tensors from here on."""
    library = Library("qpass", "IMPL", "CUDA")
    for operator in OPERATORS:
        library.impl(operator, _implementation(operator))
    return library

"""Which compiled kernels there are: find the library, load it, say which kernel serves a call."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import importlib.metadata
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

import torch

import qpass._kernels
import qpass.ops  # the operators must be defined before the library implements them
from qpass.errors import BadInput, Unsupported
from qpass.registry import unknown
from qpass.runtime.kernel import Choice, Refusal

FILE = "libqpass_cpu.so"
PLAIN = "plain PyTorch"
T = TypeVar("T")
# the numbers whose products `run_limits` knows, in the order of `kernel.hpp`
_MULTIPLIED = (torch.int8, torch.float32, torch.bfloat16)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Isa(enum.IntEnum):
    """Instruction sets, each above those it replaces; the numbers are those of `kernel.hpp`."""

    PORTABLE = 0
    AVX2 = 1
    AVX512VNNI = 2
    AMX = 3
    AMX_EMULATED = 4


# what users call them
NAMES = {
    "portable": Isa.PORTABLE,
    "avx2": Isa.AVX2,
    "vnni": Isa.AVX512VNNI,
    "amx": Isa.AMX,
    "amx_emulated": Isa.AMX_EMULATED,
}
# caps the whole process
VARIABLE = "QPASS_ISA"


@final
@dataclass(frozen=True, slots=True)
class Native:
    """What loading found: `why` is None exactly when the library serves the operators."""

    path: Path | None
    why: str | None
    newest: Isa | None
    built: tuple[Isa, ...]

    def text(self) -> str:
        """One line for people."""
        if self.why is not None or self.newest is None:
            return f"no compiled kernels, operators run on plain PyTorch: {self.why}"
        names = ", ".join(isa.name.lower() for isa in self.built if isa is not Isa.AMX_EMULATED)
        return f"compiled kernels for {names}; this machine has {self.newest.name.lower()}"


@functools.cache
def load() -> Native:
    """Load the compiled library, once; whatever it lacks runs on plain PyTorch.

    The environment may name an instruction set, above which the process then uses none.
    """
    path = _find()
    if path is None:
        why = "the installed package has no library; install with a C++ compiler to build it"
        return Native(None, why, None, ())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        why = f"{path} does not load into torch {torch.__version__}: {error}"
        return Native(path, why, None, ())
    library = ctypes.CDLL(str(path))
    built = tuple(isa for isa in Isa if library.qpass_built(int(isa)))
    found = Native(path, None, Isa(library.qpass_newest()), built)
    if name := os.environ.get(VARIABLE):
        library.qpass_cap(int(_named(name, found)))
    return found


def _find() -> Path | None:
    places = [Path(place) / FILE for place in qpass._kernels.__path__]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # an editable install keeps the library apart from the checkout it imports from
        files = importlib.metadata.files("qpass") or ()
        places += [Path(str(file.locate())) for file in files if file.name == FILE]
    return next((place for place in places if place.is_file()), None)


def _library() -> ctypes.CDLL:
    native = load()
    if native.why is not None:
        raise Unsupported(f"no compiled kernels: {native.why}")
    return ctypes.CDLL(str(native.path))


@contextlib.contextmanager
def capped(isa: Isa) -> Generator[None]:
    """Use no instruction set above `isa` inside the block, in all threads: for tests and timings.

    AMX_EMULATED runs the AMX kernels on emulated tiles, slowly, on a machine with AVX-512 VNNI.
    """
    library = _library()
    before = library.qpass_cap(int(isa))
    try:
        yield
    finally:
        library.qpass_cap(before)


def named(name: str) -> Isa:
    """The instruction set that users call `name`; refused where this machine cannot run it."""
    return _named(name, load())


def _named(name: str, found: Native) -> Isa:
    if name not in NAMES:
        raise unknown("instruction set", name, NAMES)
    isa = NAMES[name]
    if found.newest is None:
        raise Unsupported(f"isa {name!r}: there are no compiled kernels: {found.why}")
    if isa not in found.built:
        raise Unsupported(f"isa {name!r}: the compiler that built the kernels did not know it")
    needed = Isa.AVX512VNNI if isa is Isa.AMX_EMULATED else isa
    if needed > found.newest:
        runs = [text for text, each in NAMES.items() if each <= found.newest]
        raise Unsupported(f"isa {name!r}: this machine lacks it\n  choose among {', '.join(runs)}")
    return isa


def limited(call: Callable[..., T], isa: Isa) -> Callable[..., T]:
    """`call`, during which operators of the calling thread use no instruction set above `isa`."""
    # keeps the interpreter lock, which such short functions are not worth giving up
    limit = ctypes.PyDLL(str(load().path)).qpass_limit_thread
    number = int(isa)

    def run(*arguments: object) -> T:
        before = limit(number)
        try:
            return call(*arguments)
        finally:
            limit(before)

    return run


def run_limits(
    lines: torch.Tensor | None, steps: int, rounds: int = 1, dtype: torch.dtype = torch.int8
) -> None:
    """Read `steps` lines of 64 bytes of `lines`, or multiply `dtype` in so many steps a thread.

    All of it `rounds` times, on torch's threads, as fast as the instruction set can.
    """
    if lines is not None and (lines.data_ptr() % 64 or lines.nbytes < 64 * steps):
        raise BadInput(f"{steps} lines: their memory is not aligned to 64 bytes, or too short")
    function = _library().qpass_limits
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_uint32
    data = None if lines is None else lines.data_ptr()
    function(data, _MULTIPLIED.index(dtype), steps, rounds)


def limit_products() -> int:
    """How many products a step of `run_limits` does."""
    return int(_library().qpass_limit_products())


def limit_kernel() -> str:
    """Which kernel multiplies in `run_limits`."""
    function = _library().qpass_limit_kernel
    function.restype = ctypes.c_char_p
    return function().decode()


def explain_linear(
    rows: int,
    packed: qpass.ops.PackedLinear,
    dtype: torch.dtype,
    *,
    integer_activations: bool,
) -> Choice:
    """Which kernel multiplies `rows` rows of activations with `packed`, and why no better one."""
    groups = 1 if packed.group_scales is None else packed.group_scales.shape[1]
    numbers = (packed.bits, packed.out_features, packed.in_features, groups)
    present = (packed.group_scales is not None, packed.group_offsets is not None)
    name = "linear_codes" if integer_activations else "linear_real"
    return _explain(name, rows, *numbers, *present, _float(dtype))


def explain_rows(
    rows: int, width: int, dtype: torch.dtype, *, order: int = 0, power: int = 1, bits: int = 0
) -> Choice:
    """Which kernel rotates (`order > 0`) and quantizes (`bits > 0`) rows, and why no better one."""
    return _explain("rows", rows, width, order, power, bits, _float(dtype))


def explain_embedding(indices: int, codes: torch.Tensor, dtype: torch.dtype) -> Choice:
    """Which kernel looks up `indices` rows of `codes`."""
    return _explain("embedding", indices, *codes.shape, _float(dtype))


def explain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> Choice:
    """Which kernel computes this attention, and why no better one."""
    batch, heads, length, width = query.shape
    sizes = (batch, heads, key.shape[1], length, key.shape[2], width, value.shape[3])
    kind = -1 if mask is None or mask.dtype is torch.bool else _float(mask.dtype)
    return _explain("attention", *sizes, _float(query.dtype), mask is not None, kind)


def _float(dtype: torch.dtype) -> int:
    if dtype not in _FLOATS:
        raise BadInput(f"kernels compute in {', '.join(map(str, _FLOATS))}, not {dtype}")
    return _FLOATS.index(dtype)


# arguments of each C function: `w` a 64-bit size, `i` an int
_SIGNATURES = {
    "linear_codes": "wiwwwiii",
    "linear_real": "wiwwwiii",
    "rows": "wwwwii",
    "embedding": "wwwi",
    "attention": "wwwwwwwiii",
}


def _explain(name: str, *numbers: int) -> Choice:
    native = load()
    if native.why is not None:
        return Choice(PLAIN, (Refusal("compiled kernels", native.why),))
    function = ctypes.CDLL(str(native.path))[f"qpass_explain_{name}"]
    function.restype = ctypes.c_int64
    kinds = [ctypes.c_int64 if kind == "w" else ctypes.c_int for kind in _SIGNATURES[name]]
    function.argtypes = [*kinds, ctypes.c_char_p, ctypes.c_int64]
    buffer = ctypes.create_string_buffer(4096)
    if function(*numbers, buffer, len(buffer)) >= len(buffer):
        raise Unsupported(f"the explanation for {name} is longer than {len(buffer)} bytes")
    kernel, *refused = buffer.value.decode().split("\n")
    pairs = (line.partition(": ") for line in refused)
    return Choice(kernel, tuple(Refusal(who, why) for who, _, why in pairs))

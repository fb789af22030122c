"""One call of a compiled graph as steps with addresses: operators, and the loops of inductor.

Everything that the call does is seen: operators by a dispatch mode, loops by their names in the
module that inductor wrote. Operators that are not qpass's own are called again as they were.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FrameType, ModuleType
from typing import Any, cast, final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qpass.runtime.tape import Tape

Compiled = Callable[..., Sequence[object]]
Globals = dict[str, Any]

# bytes of an input that is copied at every call
SHORT = 1 << 16
# bytes of what the steps write, which is kept for good
MOST_MEMORY = 1 << 24

# operators whose results, or sizes of results, do not follow from what they are given
_UNLIKE = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}
# a name that every module of inductor's has
_MARK = "empty_strided_cpu"


def is_short(tensor: Tensor) -> bool:
    """Whether copying a tensor costs next to nothing."""
    return tensor.nbytes <= SHORT and tensor.is_contiguous()


@final
class Finder(TorchDispatchMode):
    """Sees which module of inductor's calls the operators of qpass."""

    def __init__(self) -> None:
        super().__init__()
        self._modules: dict[int, Globals] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func.namespace == "qpass":
            frame: FrameType | None = sys._getframe()
            while frame is not None and _MARK not in frame.f_globals:
                frame = frame.f_back
            if frame is not None:
                self._modules[id(frame.f_globals)] = frame.f_globals
        return func(*args, **(kwargs or {}))

    def found(self) -> Globals | None:
        """The names of that module; None where there is none, or several."""
        return next(iter(self._modules.values())) if len(self._modules) == 1 else None


@final
class Recording(TorchDispatchMode):
    """Runs a graph once and keeps what it does.

    `module` has the names that the graph's code uses. Of `arguments`, those at `moving` are copied
    to places of their own; `fixed` come after them.
    """

    def __init__(
        self,
        module: Globals,
        arguments: Sequence[object],
        fixed: Sequence[Tensor],
        moving: Iterable[int],
    ) -> None:
        super().__init__()
        self._module = module
        self._arguments = arguments
        self._fixed = fixed
        self._copies = {i: cast("Tensor", arguments[i]).clone() for i in moving}
        self._given = [self._copies.get(i, given) for i, given in enumerate(arguments)]
        # where memory lies that outlives a call of the graph
        self._given_at = _storages(self._given)
        self._fixed_at = _storages(fixed)
        self._tape = Tape()
        # by their places in memory: what the steps read and write
        self._held: dict[int, Tensor] = {}
        # operators to call again, each before a step
        self._calls: list[tuple[int, _Call]] = []
        self._thread = threading.get_ident()
        self.why_not: str | None = None

    def of(self, compiled: Compiled) -> tuple[Recorded | None, Sequence[object]]:
        """What can be run again (None, and `why_not` says why), and the results of this call."""
        with self._loops(), self._tape.recording(), self:
            made = compiled(*self._given, *self._fixed)
        results = [self._result(value) for value in made]
        made_at = [r.value.untyped_storage().data_ptr() for r in results if isinstance(r, _Made)]
        if len(set(made_at)) < len(made_at):
            self._refuse("results share memory")
        if sum(tensor.untyped_storage().nbytes() for tensor in self._own()) > MOST_MEMORY:
            self._refuse("what it computes takes much memory")
        if self.why_not is None:
            held = [*self._own(), *self._fixed]
            steps = _Steps(self._tape, self._calls, held)
            recorded = Recorded(steps, self._given, self._copies, results)
            return recorded, [result.of(self._arguments) for result in results]
        # no step will write to what was made
        values = zip(results, made, strict=True)
        return None, [v if isinstance(r, _Made) else r.of(self._arguments) for r, v in values]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        before = len(self._tape)
        made: object = func(*args, **kwargs)
        recorded = len(self._tape) == before + 1 and not self._tape.refused
        if not func.is_view and not (func.namespace == "qpass" and recorded):
            self._tape.shorten(before)
            self._call_again(func, args, kwargs, made)
        self._hold(tree_leaves((args, kwargs, made)))
        return made

    def _call_again(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        made: object,
    ) -> None:
        """Keep a call whose results go where they went this time."""
        results: list[object] = tree_leaves(made)
        if not _UNLIKE.isdisjoint(func.tags) or not all(isinstance(r, Tensor) for r in results):
            self._refuse(f"it calls {func}, whose results may be others each time")
            return
        tensors = cast("list[Tensor]", results)
        # others were written to where they are
        known = (self._held, self._given_at, self._fixed_at)
        places = [r.untyped_storage().data_ptr() for r in tensors]
        new = [not any(place in some for some in known) for place in places]
        given = tree_map(self._source, (args, dict(kwargs)))
        self._calls.append((len(self._tape), _Call(func, given, tensors, new)))

    def _source(self, value: object) -> object:
        """Where an operator finds one of its arguments when it is called again."""
        if not isinstance(value, Tensor):
            return value
        at = self._given_at.get(value.untyped_storage().data_ptr())
        if at is None or at in self._copies:
            return value
        if (found := self._argument(value, at)) is None:
            self._refuse("an operator reads another view of an argument")
        return found

    @contextmanager
    def _loops(self) -> Generator[None]:
        """While open, the loops that the module has compiled are kept when they are called."""
        compiled = {
            name: value
            for name, value in self._module.items()
            if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, ModuleType)
            and value.__name__ == "kernel"
        }  # fmt: skip
        self._module.update({name: self._loop(value) for name, value in compiled.items()})
        try:
            yield
        finally:
            self._module.update(compiled)

    def _loop(self, loop: BuiltinFunctionType) -> Callable[..., object]:
        path = cast("ModuleType", loop.__self__).__file__
        address = ctypes.cast(ctypes.CDLL(path)["kernel"], ctypes.c_void_p).value

        def run(*arguments: object) -> object:
            # other threads may run the same module
            if threading.get_ident() == self._thread:
                self._hold(arguments)
                words = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
                numbers = [word for word in words if isinstance(word, int)]
                if len(numbers) < len(words) or not self._tape.add_call(address or 0, numbers):
                    self._refuse("a loop takes other arguments than addresses and sizes")
            return loop(*arguments)

        return run

    def _hold(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._held.setdefault(value.untyped_storage().data_ptr(), value)

    def _own(self) -> list[Tensor]:
        """What was made, by one tensor for each memory: all that is not given."""
        given = _storages([*self._arguments, *self._fixed])
        return [tensor for place, tensor in self._held.items() if place not in given]

    def _result(self, value: object) -> _Constant | _Argument | _Made:
        if not isinstance(value, Tensor):
            return _Constant(value)
        place = value.untyped_storage().data_ptr()
        at = self._given_at.get(place)
        if at is not None and (found := self._argument(value, at)) is not None:
            return found
        if at is not None or place in self._fixed_at or value.requires_grad:
            self._refuse("a result is another view of an argument")
        elif value.clone().stride() != value.stride():
            self._refuse("a result is not dense")
        return _Made(value)

    def _argument(self, value: Tensor, at: int) -> _Argument | None:
        """A view of the memory of an argument."""
        given = cast("Tensor", self._given[at])
        if value is given:
            return _Argument(at, None)
        if value.dtype is not given.dtype or value.requires_grad:
            return None
        offset = int(value.storage_offset() - given.storage_offset())
        return _Argument(at, (value.shape, value.stride(), offset))

    def _refuse(self, why: str) -> None:
        self.why_not = self.why_not or why


def _storages(values: Sequence[object]) -> dict[int, int]:
    """Where memory begins, and which of the values first has it."""
    found: dict[int, int] = {}
    for at, value in enumerate(values):
        # what is empty lies nowhere
        if isinstance(value, Tensor) and (place := value.untyped_storage().data_ptr()):
            found.setdefault(place, at)
    return found


@final
@dataclass(frozen=True, slots=True)
class _Constant:
    value: object

    def of(self, arguments: Sequence[object]) -> object:
        del arguments
        return self.value


@final
@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument, or a view of it: its sizes, strides, and how much later it begins."""

    at: int
    view: tuple[Sequence[int], Sequence[int], int] | None

    def of(self, arguments: Sequence[object]) -> object:
        argument = cast("Tensor", arguments[self.at])
        if self.view is None:
            return argument
        sizes, strides, offset = self.view
        return argument.as_strided(sizes, strides, argument.storage_offset() + offset)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """What the steps write anew each time."""

    value: Tensor

    def of(self, arguments: Sequence[object]) -> object:
        del arguments
        return self.value.clone()


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """An operator, what it is given, and where its results are; those that are `new` go there."""

    func: OpOverload
    given: object
    results: Sequence[Tensor]
    new: Sequence[bool]

    def run(self, arguments: Sequence[object]) -> None:
        """Call the operator on what the graph is given this time."""

        def found(value: object) -> object:
            return value.of(arguments) if isinstance(value, _Argument) else value

        args, kwargs = cast("tuple[Any, Any]", tree_map(found, self.given))
        made = cast("list[Tensor]", tree_leaves(self.func(*args, **kwargs)))
        for result, value, new in zip(self.results, made, self.new, strict=True):
            if new:
                result.copy_(value)


@final
class _Steps:
    """Steps of a tape, with calls before some of them, and the memory that both need."""

    def __init__(
        self, tape: Tape, calls: Sequence[tuple[int, _Call]], held: Sequence[Tensor]
    ) -> None:
        self._tape = tape
        self._calls = calls
        self._end = len(tape)
        self._held = held

    def run(self, arguments: Sequence[object]) -> None:
        """Do all of it; raises `StateError` where a step fails."""
        begin = 0
        if self._calls:
            with torch.no_grad():
                for at, call in self._calls:
                    self._tape.run(begin, at)
                    call.run(arguments)
                    begin = at
        self._tape.run(begin, self._end)


@final
class Recorded:
    """Steps, and the places of the arguments that they were made for.

    Arguments are not kept alive: whoever brings them again has them.
    """

    def __init__(
        self,
        steps: _Steps,
        given: Sequence[object],
        copies: Mapping[int, Tensor],
        results: Sequence[_Constant | _Argument | _Made],
    ) -> None:
        self._steps = steps
        self._places = [g.data_ptr() if isinstance(g, Tensor) else g for g in given]
        self._copies = [(i, tensor, tensor.data_ptr()) for i, tensor in copies.items()]
        self._results = results

    def fits(self, places: Sequence[object], arguments: Sequence[object]) -> bool:
        """Whether the steps may run for `arguments`, which lie at `places`."""
        now = list(places)
        for at, copy, place in self._copies:
            given = cast("Tensor", arguments[at])
            if given.shape != copy.shape or given.dtype != copy.dtype or not is_short(given):
                return False
            now[at] = place
        return now == self._places

    def run(self, places: Sequence[object], arguments: Sequence[object]) -> list[object]:
        """Run the steps; raises `StateError` where one fails."""
        for at, copy, place in self._copies:
            ctypes.memmove(place, cast("int", places[at]), copy.nbytes)
        self._steps.run(arguments)
        return [result.of(arguments) for result in self._results]

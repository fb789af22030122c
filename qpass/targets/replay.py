"""A compiled graph that does again what it did, without asking how.

Between the operators of a graph that writes one token lie microseconds of Python, of dispatch and
of allocation each, which add up to as much as the operators take. So, as CUDA graphs are recorded,
one call is: the steps of the operators and of the loops that inductor compiled, with the addresses
that they read and write. Later calls run the steps, if all that the graph is given lies where it
lay; short inputs that are new every time are copied to one place. Operators that are not qpass's
own are called again; a graph with what cannot be repeated, as random numbers, runs as compiled.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor, fx

from qpass.errors import StateError
from qpass.ir import read
from qpass.targets.recording import Compiled, Finder, Globals, Recorded, Recording, is_short

log = logging.getLogger("qpass")

# products are short where rows are few, and calls between them are noticed where they are many
FEW_ROWS, MANY_PRODUCTS = 8, 8
# recordings before any has paid; one pays with so many calls
RECORDINGS, CALLS = 4, 16

# recording changes a module of inductor's, which other threads may run
_ONE = threading.Lock()


def writes_tokens(nodes: Iterable[fx.Node]) -> bool:
    """Whether a graph has many products, all of few rows, as when a language model decodes.

    Its inputs are of fixed sizes: dynamo then holds them to what they were when it was recorded.
    """
    nodes = list(nodes)
    rows = [_rows(node.all_input_nodes[0]) for node in nodes if _is_product(node)]
    if len(rows) < MANY_PRODUCTS or not all(m is not None and m <= FEW_ROWS for m in rows):
        return False
    return all(_is_fixed(node.meta.get("val")) for node in nodes if node.op == "placeholder")


def _is_fixed(value: object) -> bool:
    if isinstance(value, Tensor):
        return all(map(_is_fixed, (*value.shape, *value.stride())))
    return not isinstance(value, torch.SymInt)


def _is_product(node: fx.Node) -> bool:
    op = read.operator(node)
    return op is not None and op._schema.name.startswith("qpass::linear")


def _rows(x: fx.Node) -> int | None:
    """The rows of a value `[..., features]`; None where they are not fixed."""
    shape = read.static_shape(x)
    return None if shape is None else math.prod(shape[:-1])


@final
class Replay:
    """`compiled`, called with `fixed` after the arguments that are given.

    Once several calls in a row find their arguments in the same places, one is recorded. `written`
    are the positions of arguments that the graph writes to.
    """

    def __init__(
        self, compiled: Compiled, fixed: Sequence[Tensor], written: frozenset[int]
    ) -> None:
        self._compiled = compiled
        self._fixed = fixed
        self._written = written
        self._lock = threading.Lock()
        self._module: Globals | None = None
        self._last: list[object] = []
        self._moving: set[int] = set()
        self._recorded: Recorded | None = None
        self._credit = RECORDINGS * CALLS

    def __call__(self, *arguments: object) -> Sequence[object]:
        # another thread may be at it, with what the steps write
        if self._credit < CALLS or not self._lock.acquire(blocking=False):
            return self._compiled(*arguments, *self._fixed)
        try:
            return self._run(arguments)
        finally:
            self._lock.release()

    def _run(self, arguments: tuple[object, ...]) -> Sequence[object]:
        places = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        if (recorded := self._recorded) is not None and recorded.fits(places, arguments):
            try:
                found = recorded.run(places, arguments)
            except StateError as error:
                # compiled, it says what is wrong in its own words
                log.debug("%s", error)
                return self._compiled(*arguments, *self._fixed)
            self._credit = min(self._credit + 1, RECORDINGS * CALLS)
            return found
        last, self._last = self._last, places
        if len(last) == len(places):
            moved = [i for i, (a, b) in enumerate(zip(last, places, strict=True)) if a != b]
            if all(self._may_move(i, arguments) for i in moved):
                self._moving.update(moved)
                return self._record(arguments)
        return self._compiled(*arguments, *self._fixed)

    def _may_move(self, at: int, arguments: Sequence[object]) -> bool:
        """Whether an argument can be copied to one place whenever it comes."""
        argument = arguments[at]
        if not isinstance(argument, Tensor) or not is_short(argument):
            return False
        # nothing of it may be written to, under whatever name
        place = argument.untyped_storage().data_ptr()
        written = (arguments[i] for i in self._written)
        return all(
            not isinstance(w, Tensor) or w.untyped_storage().data_ptr() != place for w in written
        )

    def _record(self, arguments: tuple[object, ...]) -> Sequence[object]:
        if not _ONE.acquire(blocking=False):
            return self._compiled(*arguments, *self._fixed)
        try:
            if self._module is None:
                finder = Finder()
                with finder:
                    found = self._compiled(*arguments, *self._fixed)
                self._module = finder.found()
                self._credit = 0 if self._module is None else self._credit
                return found
            self._credit -= CALLS
            self._moving = {i for i in self._moving if self._may_move(i, arguments)}
            recording = Recording(self._module, arguments, self._fixed, self._moving)
            self._recorded, found = recording.of(self._compiled)
        finally:
            _ONE.release()
        if self._recorded is None:
            # what it does, it will do again
            self._credit = 0
            log.debug("the calls between operators stay as compiled: %s", recording.why_not)
        return found

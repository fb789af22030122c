"""What operators and compiled loops did, kept to be done again in the same memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Generator, Sequence
from typing import final

from qpass.errors import StateError
from qpass.runtime import native


def available() -> bool:
    """Whether there are compiled operators, which alone can be recorded."""
    return native.load().why is None


@final
class Tape:
    """Steps in the order in which they were done.

    Whoever runs them again keeps all memory that they read and write.
    """

    def __init__(self) -> None:
        library = _library()
        self._handle: int = library.qpass_tape_new()
        weakref.finalize(self, library.qpass_tape_free, self._handle)
        # called for every token
        self._run = library.qpass_tape_run

    def __len__(self) -> int:
        return _library().qpass_tape_size(self._handle)

    @property
    def refused(self) -> bool:
        """Whether some operator did what cannot be done again."""
        return bool(_library().qpass_tape_refused(self._handle))

    @contextlib.contextmanager
    def recording(self) -> Generator[None]:
        """Keep what qpass's operators do in the calling thread."""
        _library().qpass_tape_record(self._handle)
        try:
            yield
        finally:
            _library().qpass_tape_record(None)

    def add_call(self, function: int, arguments: Sequence[int]) -> bool:
        """Add a call of a C function at an address, of addresses and sizes; False: too many."""
        words = (ctypes.c_int64 * len(arguments))(*arguments)
        return bool(_library().qpass_tape_add_call(self._handle, function, words, len(words)))

    def shorten(self, size: int) -> None:
        """Forget all steps but the first `size`, and that an operator refused."""
        _library().qpass_tape_shorten(self._handle, size)

    def run(self, begin: int, end: int) -> None:
        """Do some steps; raises `StateError` where one fails, which leaves the rest undone."""
        if (why := self._run(self._handle, begin, end)) is not None:
            raise StateError(f"a recorded step failed: {why.decode(errors='replace')}")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(native.load().path))
    handle, words = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)
    declared = {
        "new": (handle, []),
        "free": (None, [handle]),
        "record": (None, [handle]),
        "refused": (ctypes.c_int, [handle]),
        "size": (ctypes.c_int64, [handle]),
        "add_call": (ctypes.c_int, [handle, handle, words, ctypes.c_int64]),
        "shorten": (None, [handle, ctypes.c_int64]),
        "run": (ctypes.c_char_p, [handle, ctypes.c_int64, ctypes.c_int64]),
    }
    for name, (result, arguments) in declared.items():
        function = library[f"qpass_tape_{name}"]
        function.restype, function.argtypes = result, arguments
        setattr(library, f"qpass_tape_{name}", function)
    return library

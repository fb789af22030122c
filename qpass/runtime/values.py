"""Whether a tensor still has the values it had, and how their memory is given back."""

from __future__ import annotations

import ctypes
import functools
import mmap
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# its version, and where it lies
State = tuple[int, int]
# where several tensors lie, and their versions
Stamps = tuple[int, ...]

_version = operator.attrgetter("_version")


def state(tensor: Tensor) -> State:
    """What changes when the values of a tensor do; giving their memory back does not count.

    A write through `.data` is not seen, unless it moves the tensor.
    """
    now = stamp(tensor)
    freed = cast("_Freed | None", _FREED.get(tensor))
    return freed.before if freed is not None and freed.after == now else now


def stamp(tensor: Tensor) -> State:
    """The version and the place of a tensor, whatever became of its memory."""
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def stamps(tensors: Sequence[Tensor]) -> Stamps:
    """The stamps of many tensors, for comparison with earlier ones."""
    return stamp_reader(tensors)(tensors)


def stamp_reader(tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Stamps]:
    """What takes the stamps of these very tensors, fast enough for every call."""
    # tensors made in inference mode have no versions
    return _places if any(map(Tensor.is_inference, tensors)) else _places_and_versions


def _places(tensors: Sequence[Tensor]) -> Stamps:
    return tuple(map(Tensor.data_ptr, tensors))


def _places_and_versions(tensors: Sequence[Tensor]) -> Stamps:
    return (*map(Tensor.data_ptr, tensors), *map(_version, tensors))


def free(tensor: Tensor) -> None:
    """Give back the memory of a CPU tensor: it reads as zeros until it is written again.

    Shape, strides, dtype and identity stay, so that graphs compiled for it remain valid.
    """
    size = tensor.untyped_storage().nbytes()
    if is_freed(tensor) or size == 0:
        return
    before, place, length = stamp(tensor), tensor.data_ptr(), tensor.nbytes
    # pages that nobody touches take no memory; torch.zeros would touch them, and a storage of
    # length 0 makes a later read crash the process
    pages = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    empty = torch.frombuffer(pages, dtype=tensor.dtype)
    with torch.no_grad():
        tensor.data = empty.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    _page_out(place, length)
    _FREED[tensor] = _Freed(before, stamp(tensor))


def _page_out(place: int, length: int) -> None:
    """Give back pages that are still there: those of a file that other tensors keep mapped.

    No value is lost: whoever reads one of the pages again gets it from the file.
    """
    if (advise := _advise()) is None:
        return
    first = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (place + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        # memory that is gone by now is no error
        advise(first, last - first, _PAGE_OUT)


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The call to the system, where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


# of Linux 5.4 and later; others refuse it
_PAGE_OUT = 21


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's values were given back and not written again since."""
    freed = cast("_Freed | None", _FREED.get(tensor))
    return freed is not None and freed.after == stamp(tensor)


@final
@dataclass(frozen=True, slots=True)
class _Freed:
    before: State
    after: State


_FREED: WeakIdKeyDictionary = WeakIdKeyDictionary()

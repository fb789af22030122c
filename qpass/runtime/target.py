"""Which GPUs kernels are written for, as values that choices may depend on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch


@final
@dataclass(frozen=True, slots=True)
class Target:
    """One kind of GPU; the rates are data sheet numbers of a typical card, dense, for predictions.

    `shared` is the shared memory that one block may use, in bytes; `bandwidth` is in bytes a
    second. `peaks` maps the kinds of matrix products that the hardware has (`bf16`, `int8`,
    `int4`, `fp8`, `fp4`) and `fp32` arithmetic to operations a second, a multiply-add being two.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    multiprocessors: int
    bandwidth: float
    peaks: tuple[tuple[str, float], ...]
    registers: int = 65536

    @property
    def peak(self) -> Mapping[str, float]:
        """Operations a second by kind."""
        return MappingProxyType(dict(self.peaks))

    def has(self, kind: str) -> bool:
        """Whether matrix products of this kind run on hardware of their own."""
        return kind in self.peak

    def seconds(self, nbytes: float, operations: float, kind: str) -> float:
        """The least time for moving `nbytes` and doing `operations` of one kind."""
        rate = self.peak.get(kind, self.peak["fp32"])
        return max(nbytes / self.bandwidth, operations / rate)


def _peaks(**tera: float) -> tuple[tuple[str, float], ...]:
    return tuple((kind, rate * 1e12) for kind, rate in tera.items())


_KIB = 1024

TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * _KIB, 108, 2.0e12,
           _peaks(fp32=19.5, bf16=312, int8=624, int4=1248)),
    Target("sm_86", "cuda", 86, 32, 99 * _KIB, 84, 0.94e12,
           _peaks(fp32=35.6, bf16=71, int8=284, int4=568)),
    Target("sm_89", "cuda", 89, 32, 99 * _KIB, 128, 1.01e12,
           _peaks(fp32=82.6, bf16=165, int8=661, int4=1321, fp8=661)),
    Target("sm_90", "cuda", 90, 32, 227 * _KIB, 132, 3.35e12,
           _peaks(fp32=67, bf16=989, int8=1979, fp8=1979)),
    Target("sm_100", "cuda", 100, 32, 227 * _KIB, 148, 8.0e12,
           _peaks(fp32=80, bf16=2250, int8=4500, fp8=4500, fp4=9000)),
    Target("sm_120", "cuda", 120, 32, 99 * _KIB, 170, 1.79e12,
           _peaks(fp32=105, bf16=210, int8=838, fp8=838, fp4=1676)),
    Target("gfx942", "hip", "gfx942", 64, 64 * _KIB, 304, 5.3e12,
           _peaks(fp32=163, bf16=1307, int8=2615, fp8=2615)),
    Target("gfx950", "hip", "gfx950", 64, 160 * _KIB, 256, 8.0e12,
           _peaks(fp32=157, bf16=2307, int8=4614, fp8=4614, fp4=9228)),
)  # fmt: skip

_BY_NAME = {target.name: target for target in TARGETS}


def target(name: str) -> Target:
    """The target of this name."""
    return _BY_NAME[name]


@functools.cache
def target_of(index: int) -> Target | str:
    """The target that the CUDA or ROCm device number `index` is, or why it is none."""
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = str(found.gcnArchName).partition(":")[0]
        known = _BY_NAME.get(name)
    else:
        name = f"sm_{found.major}{found.minor}"
        # a newer minor version runs what the older ones of its generation run
        same = [t for t in TARGETS if t.backend == "cuda" and int(t.arch) // 10 == found.major]
        older = [t for t in same if int(t.arch) <= 10 * found.major + found.minor]
        known = older[-1] if older else None
    if known is None:
        return f"there are kernels for {', '.join(_BY_NAME)}, and this GPU is {name}"
    return dataclasses.replace(known, multiprocessors=int(found.multi_processor_count))

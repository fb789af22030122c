"""What this machine can do, as a value that choices may depend on."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import final

import torch

from qpass.runtime import native


@final
@dataclass(frozen=True, slots=True)
class Device:
    """Facts that stay the same from run to run; no timings."""

    machine: str
    system: str
    threads: int
    torch: str
    vector: str
    kernels: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """Whether compiled kernels serve the operators."""
        return bool(self.kernels)

    @property
    def integer_dot(self) -> bool:
        """Whether products of 8-bit integers run faster than float32."""
        return "avx512vnni" in self.kernels


def this_device() -> Device:
    """The machine and process that ask: CPU instructions, threads, torch, usable kernels."""
    found = native.load()
    usable = [isa for isa in found.built if found.newest is not None and isa <= found.newest]
    return Device(
        machine=platform.machine(),
        system=platform.system(),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        vector=torch.backends.cpu.get_cpu_capability(),
        kernels=tuple(isa.name.lower() for isa in usable),
    )

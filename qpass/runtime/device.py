"""What this machine can do, as a value that choices may depend on."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import Unsupported
from qpass.runtime import gpu, native


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


def graph_device(arguments: Iterable[object]) -> torch.device:
    """The one device that a graph runs on: that of its tensors, numbers on the CPU aside.

    Raises `Unsupported` for several devices and for ones that there are no operators for.
    """
    found = {a.device for a in arguments if isinstance(a, Tensor)}
    others = sorted((d for d in found if d.type != "cpu"), key=str)
    on_cpu = [a for a in arguments if isinstance(a, Tensor) and a.device.type == "cpu" and a.dim()]
    if not others:
        return torch.device("cpu")
    names = ", ".join(map(str, others))
    if len(others) > 1 or on_cpu:
        also = " and cpu" if on_cpu else ""
        raise Unsupported(
            f"the graph has tensors on {names}{also}; qpass compiles for one device\n"
            "  move the model and its inputs to the same"
        )
    if others[0].type != "cuda":
        raise Unsupported(
            f"the graph has tensors on {names}; qpass compiles for the CPU and for CUDA\n"
            '  move the model with .to("cpu"), or compile it with another backend'
        )
    gpu.register()
    return others[0]

"""What the compiler makes of a kernel for a GPU that is not there: registers, spills, code."""

from __future__ import annotations

import collections
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qpass.runtime.gpu import Build
from qpass.runtime.target import Target

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# the instructions of matrix products on tensor cores, by kind
_MMA = {
    "int8": r"IMMA\.\S*\.S8|IGMMA\S*|v_(?:mfma|smfmac|wmma)_i32_\w*i8|tcgen05\.mma\S*kind::i8",
    "int4": r"IMMA\.\S*\.S4\S*",
    "bf16": r"HMMA\.\S*|HGMMA\S*|v_(?:mfma|smfmac|wmma)_f32_\w*f16\w*|tcgen05\.mma\S*kind::f16",
    "fp8": r"QMMA\.\S*|QGMMA\S*|v_(?:mfma|smfmac|wmma)_f32_\w*fp8\w*",
    "fp4": r"OMMA\S*|mxf4\S*|v_mfma_scale\w*",
    "tf32": r"HMMA\.\S*TF32\S*|HGMMA\S*TF32\S*|v_mfma_f32_\w*xf32",
}
# warps that one multiprocessor holds at most
_RESIDENT = {"cuda": 64, "hip": 32}
# time from asking memory for bytes to having them
_LATENCY = 700e-9


@dataclass(frozen=True, slots=True)
class Compiled:
    """One build for one target."""

    registers: int
    spills: int
    shared: int
    instructions: collections.Counter[str]
    text: str

    def mma(self, kind: str) -> str | None:
        """The first instruction of products of this kind, or None."""
        found = re.search(_MMA[kind], self.text)
        return None if found is None else found.group()


def compile_build(build: Build, target: Target) -> Compiled:
    """Compile ahead of time and read the machine code."""
    function = build.function
    types = {**build.signature, **dict.fromkeys(build.constants, "constexpr")}
    order = {name: types[name] for name in function.arg_names}
    place = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = [n for n in order if order[n].startswith("*") or n in build.divisible]
    source = ASTSource(
        fn=function,
        signature=order,
        constexprs={place[name]: value for name, value in build.constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": build.warps,
        "num_stages": build.stages,
        "enable_fp_fusion": build.fusion,
    }
    there = GPUTarget(target.backend, target.arch, target.warp)
    with build.around():
        found = triton.compile(source, target=there, options=options)
    if target.backend == "hip":
        return _read_amd(found.asm["amdgcn"], found.metadata.shared)
    return _read_nvidia(found.asm["cubin"], found.asm["ptx"], found.metadata.shared)


def _read_nvidia(cubin: bytes, ptx: str, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise ValueError(f"cuobjdump reports no resources: {usage!r}")
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    spilled = sum(line.startswith(("STL", "LDL")) for line in lines)
    tensor_memory = "\n".join(re.findall(r"tcgen05\.mma\S*", ptx))
    return Compiled(
        registers=int(numbers[1]),
        spills=spilled,
        shared=shared,
        instructions=collections.Counter(lines),
        text=f"{sass}\n{tensor_memory}",
    )


def _cuobjdump(what: str, path: str) -> str:
    done = subprocess.run([str(_CUOBJDUMP), what, path], capture_output=True, text=True, check=True)
    return done.stdout


def _read_amd(assembly: str, shared: int) -> Compiled:
    counts = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)
    }
    lines = re.findall(r"^\s+([a-z]\w*)", assembly, re.MULTILINE)
    return Compiled(
        registers=counts["vgpr_count"],
        spills=counts["vgpr_spill_count"],
        shared=shared,
        instructions=collections.Counter(lines),
        text=assembly,
    )


def predicted(build: Build, found: Compiled, target: Target) -> float | None:
    """The fraction of the roofline to expect of a launch, from how much of the GPU it fills.

    Bytes in flight (16 a thread and stage) must cover the latency of memory at full bandwidth, and
    the last wave of programs may be short.
    """
    if build.cost is None or build.programs is None:
        return None
    threads = build.warps * target.warp
    by_registers = target.registers // max(1, found.registers * threads)
    by_shared = target.shared // max(1, found.shared)
    by_warps = _RESIDENT[target.backend] // build.warps
    resident = max(1, min(by_registers, by_shared, by_warps))
    slots = resident * target.multiprocessors
    waves = build.programs / slots
    full = waves / math.ceil(waves)
    busy = min(resident, max(1.0, waves * resident)) * target.multiprocessors
    in_flight = busy * threads * 16 * max(1, build.stages)
    moved = min(1.0, in_flight / (target.bandwidth * _LATENCY))
    cost = build.cost
    memory = cost.nbytes / target.bandwidth
    arithmetic = cost.operations / target.peak.get(cost.kind, target.peak["fp32"])
    floor = max(memory, arithmetic)
    return floor / (max(memory / moved, arithmetic) / full)

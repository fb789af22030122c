"""The PTX that decodes packed codes, run by a few lines of Python: every byte of every word."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu import ptx

TYPES = {"bf16": (tl.bfloat16, torch.bfloat16), "fp16": (tl.float16, torch.float16)}
MASK = 0xFFFFFFFF


def run(assembly: str, word: Tensor, dtype: torch.dtype, results: int) -> list[Tensor]:
    """The results of inline PTX whose last operand is `word`, int64 holding 32 bits."""
    held: dict[str, Tensor] = {f"${results}": word}

    def value(name: str) -> Tensor:
        return held[name] if name in held else torch.full_like(word, int(name, 0))

    def floats(bits: Tensor) -> list[Tensor]:
        halves = torch.stack((bits & 0xFFFF, bits >> 16), -1)
        return list(halves.to(torch.uint16).view(dtype).double().unbind(-1))

    for line in assembly.strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, _, rest = line.strip().partition(" ")
        into, *operands = re.split(r",\s*(?![^{]*})", rest)
        inputs = [value(operand.strip()) for operand in operands]
        if name == "mov.b32" and into.startswith("{"):
            low, high = into.strip("{} ").split(",")
            held[low.strip()], held[high.strip()] = inputs[0] & 0xFFFF, inputs[0] >> 16
        elif name == "mov.b32":
            held[into] = inputs[0]
        elif name == "and.b32":
            held[into] = inputs[0] & inputs[1]
        elif name == "shr.b32":
            held[into] = inputs[0] >> inputs[1]
        elif name == "prmt.b32":
            both = inputs[0] | inputs[1] << 32
            picks = [int(operands[2], 0) >> 4 * i & 15 for i in range(4)]
            held[into] = sum((both >> 8 * p & 255) << 8 * i for i, p in enumerate(picks))
        elif name == "lop3.b32":
            table, out = int(operands[3], 0), torch.zeros_like(word)
            for i in range(8):
                a, b, c = (
                    x if i & bit else ~x & MASK for x, bit in zip(inputs, (4, 2, 1), strict=False)
                )
                out |= (a & b & c) if table >> i & 1 else 0
            held[into] = out
        elif name.startswith("fma.rn."):
            a, b, c = (floats(x) for x in inputs)
            made = torch.stack([x * y + z for x, y, z in zip(a, b, c, strict=True)], -1)
            bits = made.to(dtype).view(torch.uint16).to(torch.int64)
            held[into] = bits[..., 0] | bits[..., 1] << 16
        else:
            raise AssertionError(f"an instruction this test does not know: {line}")
    return [held[f"${i}"].to(torch.uint16).view(dtype).double() for i in range(results)]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("zero", [0, 8])
def test_4_bit_codes_become_their_values(kind: str, zero: int) -> None:
    language, dtype = TYPES[kind]
    word = torch.arange(0, 2**32, 65521)
    got = run(ptx.decode4(language, zero), word, dtype, 8)
    for j in range(8):
        want = (word >> 8 * (j % 4) + 4 * (j // 4) & 15) - zero
        assert torch.equal(got[j], want.double()), j


@pytest.mark.parametrize("kind", TYPES)
def test_8_bit_codes_become_their_values(kind: str) -> None:
    language, dtype = TYPES[kind]
    word = torch.arange(0, 2**32, 65521)
    got = run(ptx.decode8(language), word, dtype, 4)
    for j in range(4):
        assert torch.equal(got[j], ((word >> 8 * j & 255) - 128).double()), j

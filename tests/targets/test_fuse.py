"""Do products take in the norm and the gate in front of them, and compute the same?"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qpass.capture import capture
from qpass.capture.call import Captured
from qpass.formats import QuantSpec
from qpass.ir import Program, run_passes
from qpass.ops import fused
from qpass.plan import Quantized, Recipe, Role
from qpass.plan.choose import choose
from qpass.quantize.linears import QuantizeLinears
from qpass.targets.fuse import FuseRows
from tests.captured import specimen
from tests.zoo import ZOO, randomise

INT8 = QuantSpec("int8")
ROWS = QuantSpec("int8", dynamic=True)
ROWS_ALONE, NORMED, SUMS, GATED = (
    fused.LINEAR_ROWS, fused.LINEAR_NORMED, fused.LINEAR_ADDED_NORMED, fused.LINEAR_GATED,
)  # fmt: skip
# a code on an edge, of the few that there are, may fall to the other side
LIMIT = 1e-2


def counts(program: Program) -> Counter[object]:
    return Counter(n.target for n in program.graph.nodes if n.op == "call_function")


def quantized(captured: Captured) -> Program:
    plan = choose(captured.program, Recipe.read("w8a8", rotation="off")).quantized
    return run_passes(captured.program, [QuantizeLinears(plan)])[0]


def check_same(program: Program, after: Program, given: tuple[object, ...]) -> None:
    for new, old in zip(after.run(*given), program.run(*given), strict=True):
        assert isinstance(new, Tensor)
        assert isinstance(old, Tensor)
        assert new.dtype is old.dtype
        assert (new - old).abs().max() <= LIMIT * old.abs().max()


# products alone, with a norm, with a norm and a sum, with a gate
_PRE_NORM = (2, 1, 4, 2)
FUSED = {
    **dict.fromkeys(("llama", "llama_tied", "llama_biased_eager", "qwen2", "qwen3"), _PRE_NORM),
    **dict.fromkeys(("mistral", "phi3", "nano_gpt"), _PRE_NORM),
    "gpt_neox": (2, 3, 2, 2),
    # sums are reshaped before their norms
    "opt": (2, 4, 1, 2),
    "bert": (6, 1, 1, 2),
    "vision": (3, 1, 3, 2),
    # a gate that is written out
    "gpt2": (4, 1, 4, 0),
    # norms that are written out, until they are folded
    "gemma3": (7, 0, 0, 2),
}


@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_the_zoo_computes_as_before(name: str) -> None:
    _, inputs, captured = specimen(name)
    program = quantized(captured)
    after, notes = run_passes(program, [FuseRows()])
    assert all(note.done for note in notes)
    found = counts(after)
    assert tuple(found[op] for op in (ROWS_ALONE, NORMED, SUMS, GATED)) == FUSED[name]
    assert found[torch.ops.qpass.quantize_rows.default] == 0
    assert found[torch.ops.qpass.linear.codes] == 0
    check_same(program, after, tuple(captured.flatten(inputs)))


class Block(nn.Module):
    """A linear behind what `spelling` says, over a stream of 12 channels."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.linear = nn.Linear(12, 5)
        width = 4 if spelling == "split" else 12
        self.norm = nn.LayerNorm(12) if spelling == "layer_norm" else nn.RMSNorm(width, eps=1e-3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        match self.spelling:
            case "layer_norm" | "rms_norm":
                total = x + y
                return self.linear(self.norm(total)), total * 2
            case "normed":
                return (self.linear(self.norm(x)),)
            case "reshaped":
                total = x + y
                return self.linear(self.norm(total).reshape(-1, 12)), total
            case "split":
                return (self.linear(self.norm(x.reshape(2, 3, 3, 4)).reshape(2, 3, 12)),)
            case "scaled":
                return (self.linear(self.norm(torch.add(x, y, alpha=2))),)
            case "broadcast":
                return (self.linear(self.norm(x + y[:1])),)
            case "read_again":
                normed = self.norm(x)
                return self.linear(normed), normed
            case "another_axis":
                normed = functional.rms_norm(x, [3, 12])
                return (self.linear(normed),)
            case "gate_read_again":
                gate = functional.silu(x)
                return self.linear(gate * y), gate
            case "gate_of_other_shape":
                return (self.linear(functional.silu(x[:1]) * y),)
            case "squared":
                gate = functional.silu(x)
                return (self.linear(gate * gate),)
            case "written":
                # the gate reads what is changed before its product is computed
                gate = functional.silu(x)
                x.add_(5)
                return (self.linear(gate * x),)
            case "swapped":
                return (self.linear(y * functional.gelu(x, approximate="tanh")),)
            case _:
                return (self.linear(getattr(functional, self.spelling)(x) * y),)


@pytest.mark.parametrize(
    ("spelling", "operator"),
    [
        ("layer_norm", SUMS),
        ("rms_norm", SUMS),
        ("normed", NORMED),
        ("reshaped", SUMS),
        ("split", ROWS_ALONE),
        ("scaled", NORMED),
        ("broadcast", NORMED),
        ("read_again", ROWS_ALONE),
        ("another_axis", ROWS_ALONE),
        ("silu", GATED),
        ("gelu", GATED),
        ("relu", GATED),
        ("swapped", GATED),
        ("gate_read_again", ROWS_ALONE),
        ("gate_of_other_shape", ROWS_ALONE),
        ("squared", ROWS_ALONE),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings(spelling: str, operator: object, dtype: torch.dtype) -> None:
    model = Block(spelling).eval()
    randomise(model, 0)
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 3, 12, generator=generator).to(dtype) for _ in range(2))
    captured = capture(model, (x, y))
    plan = (Quantized("linear.weight", Role.LINEAR, INT8, ROWS, "nearest"),)
    program, _ = run_passes(captured.program, [QuantizeLinears(plan)])
    after, notes = run_passes(program, [FuseRows()])
    assert len(notes) == 1
    assert counts(after)[operator] == 1
    given = tuple(captured.flatten((x, y)))
    check_same(program, after, given)


def test_what_is_written_to_is_read_in_time() -> None:
    model = Block("written").eval()
    randomise(model, 0)
    x, y = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="qpass", options={"recipe": "w8a8"})
    with torch.no_grad():
        (want,) = model(x.clone(), y)
        (got,) = compiled(x, y)
    assert (got - want).norm() <= 0.05 * want.norm()

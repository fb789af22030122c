"""Is attention the same on qpass's own operator, and does it read shared heads where they lie?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qpass.capture import capture
from qpass.ir import Program, read, run_passes
from qpass.ops.attention import ATTENTION
from qpass.ops.structure import REPEAT_HEADS
from qpass.targets.attend import LowerAttention
from qpass.verify.exact import largest_error
from tests.captured import specimen
from tests.zoo import ZOO

# float64 sums in another order
LIMIT = 1e-12


def count(program: Program, target: object) -> int:
    return sum(read.calls(node, target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_the_zoo_attends_as_before(name: str) -> None:
    _, inputs, captured = specimen(name)
    given = captured.flatten(inputs)
    want = captured.program.run(*given, widen=True)
    before = count(captured.program, torch.ops.aten.scaled_dot_product_attention.default)
    after, notes = run_passes(captured.program, [LowerAttention()])
    assert [note.why for note in notes if not note.done] == []
    assert count(after, ATTENTION) == before == 2
    assert count(after, REPEAT_HEADS) == 0
    assert largest_error(after.run(*given, widen=True), want) <= LIMIT


class Attention(nn.Module):
    """Grouped heads in the spellings of `scaled_dot_product_attention`."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        options = {
            "plain": {"enable_gqa": True},
            "mask": {"enable_gqa": True, "attn_mask": mask},
            "added": {"enable_gqa": True, "attn_mask": mask.double() * 3},
            "causal": {"enable_gqa": True, "is_causal": True},
            "scaled": {"enable_gqa": True, "scale": 0.3},
            "unscaled": {"enable_gqa": True, "scale": 0.0},
        }
        if self.spelling == "repeated":
            k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        return scaled_dot_product_attention(q, k, v, **options.get(self.spelling, {}))


def heads(h: int, t: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, h, t, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    "spelling", ["plain", "mask", "added", "causal", "scaled", "unscaled", "repeated"]
)
def test_every_spelling(spelling: str) -> None:
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[:, 0] = True
    inputs = (heads(6, 5, 4, 1), heads(2, 7, 4, 2), heads(2, 7, 3, 3), mask)
    program = capture(Attention(spelling), inputs).program
    after, _ = run_passes(program, [LowerAttention()])
    assert count(after, ATTENTION) == 1
    used = inputs[: len(program.inputs)]
    assert largest_error(after.run(*used), program.run(*used)) <= LIMIT


class Unlike(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        (((6, 5, 4), (6, 7, 4)), "it is not [batch, heads, length, width]"),
        (((2, 6, 5, 4), (2, 1, 7, 4)), "keys or values are shared by broadcasting"),
        (((3, 6, 5, 4), (1, 6, 7, 4)), "keys are shared between the entries of a batch"),
    ],
)
def test_what_stays_with_the_compiler(shapes: tuple[tuple[int, ...], ...], why: str) -> None:
    q, k = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
    program = capture(Unlike(), (q, k, k)).program
    after, notes = run_passes(program, [LowerAttention()])
    assert [note.why for note in notes] == [f"attention is left to the compiler: {why}"]
    assert count(after, ATTENTION) == 0

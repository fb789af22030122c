"""Do 4-bit floats go to a GPU as such: in modules that move there, and in compiled graphs?

What is said of a GPU is done to tensors that are not on one: only the form of the weights changes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qpass.capture.export import capture
from qpass.formats import QuantSpec
from qpass.ir import run_passes
from qpass.ops import BlocksLinear, PackedLinear
from qpass.plan import Quantized, Role
from qpass.quantize.containers import hold
from qpass.quantize.linears import QuantizeLinears
from qpass.rotations import Transform
from qpass.rounding import ROUNDINGS
from qpass.targets import layers
from qpass.targets.layers import QuantizedLinear

N, K = 19, 96
KINDS = {
    "mxfp4": QuantSpec("e2m1", 32, scale_format="e8m0", dynamic=True),
    "nvfp4": QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True, dynamic=True),
}


def weight_spec(rows: QuantSpec) -> QuantSpec:
    return QuantSpec.read({"dynamic": False}, rows)


def layer(kind: str, *, turn: bool = False) -> QuantizedLinear:
    g = torch.Generator().manual_seed(0)
    rows = KINDS[kind]
    tensor = ROUNDINGS["nearest"].round(torch.randn(N, K, generator=g), weight_spec(rows), {})
    return QuantizedLinear(
        hold(tensor), torch.randn(N, generator=g), dtype=torch.float32, activation=rows,
        spec=weight_spec(rows), transform=Transform("hadamard", K, seed=3) if turn else None,
    )  # fmt: skip


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_changes_its_form_where_it_goes(
    kind: str, turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = layer(kind, turn=turn)
    assert isinstance(here.packed, PackedLinear)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(layers, "GPU", "cpu")
    monkeypatch.setattr(layers, "HOST", "another")
    there = copy.deepcopy(here).bfloat16().float()
    assert isinstance(there.packed, BlocksLinear)
    assert there.packed_weight.nbytes == N * K // 2
    # the scales of the two forms are multiplied in another order
    assert torch.allclose(there(x), here(x), rtol=0, atol=1e-5 * float(here(x).abs().max()))
    assert torch.allclose(there.weight, here.weight, atol=1e-6)
    states = here.state_dict(), there.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert states[1][key].dtype == value.dtype
        assert torch.equal(states[1][key].view(torch.uint8), value.view(torch.uint8))
    there.load_state_dict(states[0])
    assert isinstance(there.packed, BlocksLinear)
    monkeypatch.undo()
    back = there.float()
    assert isinstance(back.packed, PackedLinear)
    assert torch.equal(back(x), here(x))


class Products(nn.Module):
    """Two products of one value and one of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
        self.third = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).relu() + self.second(x) * self.third(x.abs())


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_for_a_gpu_multiplies_blocks(kind: str) -> None:
    captured = capture(Products(), torch.randn(2, 7, 64))
    rows = KINDS[kind]
    plan = tuple(
        Quantized(f"{name}.weight", Role.LINEAR, weight_spec(rows), rows, "nearest")
        for name in ("first", "second", "third")
    )
    outputs: list[torch.Tensor] = []
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))
    for blocks in (False, True):
        program, notes = run_passes(captured.program, [QuantizeLinears(plan, blocks=blocks)])
        assert all(note.done for note in notes)
        assert all(
            ("reference" in note.why) is not blocks for note in notes if "in one" not in note.why
        )
        called = [node.target for node in program.graph.nodes if node.op == "call_function"]
        made = called.count(torch.ops.qpass.quantize_blocks.default)
        # one value is rounded once for all products that read it
        assert made == 2 * blocks
        assert torch.ops.qpass.linear.blocks in called or not blocks
        outputs += program.run(x)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)

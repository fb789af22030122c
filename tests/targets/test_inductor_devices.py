"""Does a graph that runs elsewhere get its weights there, and are they known to stay?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import qpass.targets.inductor as inductor
from qpass.ir import Program


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """Two products, a norm that is a weight as it is, and a sum with what its owner keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x, kept):
        return self.second(self.norm(self.first(x)) + kept)


class Elsewhere:
    """Stands for inductor on another device: keeps what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arguments: Sequence[Any] = ()
        self.inner: dict[str, Any] = {}
        monkeypatch.setattr(inductor, "graph_device", lambda _: torch.device("meta"))
        monkeypatch.setattr(inductor, "compile_fx", self.compile)
        monkeypatch.setattr(inductor, "compile_fx_inner", self.compile_inner)

    def compile(self, module: Any, arguments: Sequence[Any], **given: Any) -> Any:
        self.arguments = arguments
        given["inner_compile"](module, arguments, static_input_idxs=(), is_backward=False)
        return lambda *_: [torch.zeros(3, 32)]

    def compile_inner(self, module: Any, arguments: Any, **given: Any) -> None:
        self.inner = given


def test_weights_go_where_the_graph_runs_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Elsewhere(monkeypatch)
    x, kept = torch.randn(3, 32), torch.zeros(64)
    torch._dynamo.mark_static_address(kept)
    model = copy.deepcopy(Small()).eval()
    with torch.no_grad():
        torch.compile(model, backend="qpass", options={"recipe": "w8a16"})(x, kept)
    statics = there.inner["static_input_idxs"]
    moving = [a for i, a in enumerate(there.arguments) if i not in statics]
    assert [a.shape for a in moving] == [x.shape]
    packed = [a for a in there.arguments if a.device.type == "meta"]
    assert any(a.dtype is torch.uint8 for a in packed)


def test_a_graph_runs_where_its_inputs_are() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, device="meta")
    # the traced code was on a device that this machine need not have
    steps = graph.call_function(
        torch.ops.aten.arange.default, (4,), {"device": torch.device("cuda:0")}
    )
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, steps)),))
    program = Program(graph, {}, {}, {})
    (found,) = program.run(torch.full((4,), 2.0))
    assert found.tolist() == [0, 2, 4, 6]

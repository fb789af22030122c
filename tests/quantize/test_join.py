"""Do linear maps of one value run as one product, with the codes that each would have alone?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qpass.capture import capture
from qpass.formats import QuantSpec
from qpass.ir import Program, read, run_passes
from qpass.plan import Quantized, Role
from qpass.quantize.linears import QuantizeLinears
from tests.quantize.test_linears import by_hand
from tests.zoo import randomise

INT8 = QuantSpec("int8")
BLOCKS = QuantSpec("int4", block=4, scale_format="float16", symmetric=False)
ROWS = QuantSpec("int8", dynamic=True)
PRODUCTS = (torch.ops.qpass.linear.codes, torch.ops.qpass.linear.real)
SITES = ("one.weight", "two.weight", "three.weight")


class Three(nn.Module):
    """Three maps of one value, of odd sizes; the second reads the first's result too."""

    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.one, self.two, self.three = (
            nn.Linear(12, n, bias=bias) for n, bias in zip((5, 17, 3), biases, strict=True)
        )
        self.next = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one = self.one(x)
        return one.relu(), self.next(one), self.two(x).reshape(-1, 17), self.three(x)


def three(
    *biases: bool, specs: tuple[QuantSpec, ...], activation: QuantSpec | None
) -> tuple[nn.Module, Tensor, Program]:
    model = Three(biases)
    randomise(model, 0)
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))
    sites = {**dict(zip(SITES, specs, strict=True)), "next.weight": INT8}
    plan = tuple(Quantized(s, Role.LINEAR, w, activation, "nearest") for s, w in sites.items())
    program, notes = run_passes(capture(model, x).program, [QuantizeLinears(plan)])
    assert all(note.done for note in notes)
    assert {note.where for note in notes} == {*SITES, "next.weight"}
    return model, x, program


def products(program: Program) -> int:
    return sum(read.calls(n, *PRODUCTS) for n in program.graph.nodes)


@pytest.mark.parametrize("spec", [INT8, BLOCKS], ids=["int8", "int4 blocks"])
@pytest.mark.parametrize("activation", [ROWS, None], ids=["int8 rows", "float rows"])
@pytest.mark.parametrize(
    ("biases", "left"), [((True,) * 3, 2), ((False,) * 3, 2), ((True, False, True), 3)]
)
def test_maps_of_one_value_run_as_one(
    biases: tuple[bool, bool, bool], left: int, spec: QuantSpec, activation: QuantSpec | None
) -> None:
    model, x, program = three(*biases, specs=(spec,) * 3, activation=activation)
    assert products(program) == left
    got = program.run(x)
    for result, layer in ((got[0], model.one), (got[2], model.two), (got[3], model.three)):
        want = by_hand(x, layer.weight, layer.bias, spec, activation)
        want = want.relu() if layer is model.one else want
        assert (result.reshape(want.shape) - want).abs().max() <= 2e-5 * want.abs().max()


def test_maps_that_are_quantized_differently_stay_apart() -> None:
    _, _, program = three(True, True, True, specs=(INT8, BLOCKS, INT8), activation=ROWS)
    assert products(program) == 3


@pytest.mark.parametrize(
    "whole",
    [
        QuantSpec("int8", "tensor"),
        QuantSpec("e2m1", 4, scale_format="e4m3", tensor_scale=True),
    ],
    ids=str,
)
def test_one_scale_for_a_whole_weight_is_not_shared(whole: QuantSpec) -> None:
    _, _, program = three(True, True, True, specs=(whole,) * 3, activation=ROWS)
    assert products(program) == 4

"""Does the quantized program compute what quantizing each product by hand computes?"""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from qpass.analyze import find_matmuls
from qpass.capture.call import Captured
from qpass.capture.export import capture
from qpass.formats import QuantSpec
from qpass.ir import Contract, run_passes
from qpass.ops import fake_quantize
from qpass.plan import Quantized, Recipe, Role
from qpass.plan.choose import choose
from qpass.quantize.linears import QuantizeLinears
from qpass.quantize.weights import quantize_weight
from qpass.runtime import native
from tests.zoo import randomise, specimen

INT8 = QuantSpec("int8")
BLOCKS = QuantSpec("int4", block=4, scale_format="float16", symmetric=False)
ROWS = QuantSpec("int8", dynamic=True)
SMALL = [
    QuantSpec("e2m1", block=4, scale_format="e8m0"),
    QuantSpec("e2m1", block=4, scale_format="e4m3", tensor_scale=True),
    QuantSpec("int3", block=4, scale_format="float16"),
    QuantSpec("int2", block=4, scale_format="float16", symmetric=False),
    QuantSpec("int4", block=4, symmetric=False),
    QuantSpec("e4m3"),
]
SMALL_ROWS = [
    QuantSpec("e2m1", block=1, scale_format="e8m0", dynamic=True),
    QuantSpec("int4", symmetric=False, dynamic=True),
]
# sums of a few hundred float32 products in another order
CLOSE = 2e-6
# tiny random models lose much at few bits; a wrong scale or layout loses everything
LIMITS = {
    "w8a8": 0.15,
    "w4a8": 0.6,
    "w4a16-g64": 0.8,
    "w4a16-g64-asym": 0.8,
    "w3a16-g64": 1.0,
    "w4a4": 1.0,
    "mxfp4": 1.0,
    "nvfp4": 0.7,
}


class Shapes(nn.Module):
    """Two products of one value, one of them stored [in, out], a third of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 5)
        self.second = nn.Parameter(torch.empty(12, 5))
        self.offset = nn.Parameter(torch.empty(5))
        self.third = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.offset, x.reshape(-1, 12), self.second)
        return self.third(torch.relu(self.first(x) + flat.reshape(*x.shape[:-1], 5)))


def shapes() -> tuple[nn.Module, torch.Tensor]:
    model = Shapes()
    randomise(model, 0)
    return model, torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))


def by_hand(x, weight_nk, bias, spec, activation):
    """One product: round the weight, round each row of `x`, multiply in float64."""
    w = quantize_weight(weight_nk.double(), spec, "nearest").dequantize(torch.float64)
    if activation is not None and activation != ROWS:
        x = fake_quantize(x, activation)
    elif activation is not None:
        limit = 2 ** (activation.codes.bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True) / limit
        x = (x / scale).round() * scale
    return x.double() @ w.T + (0.0 if bias is None else bias.double())


@pytest.mark.parametrize("spec", [INT8, BLOCKS, *SMALL], ids=str)
@pytest.mark.parametrize("activation", [ROWS, None, *SMALL_ROWS], ids=str)
def test_products_equal_quantizing_by_hand(spec, activation):
    model, x = shapes()
    captured = capture(model, x)
    third = QuantSpec("int8")
    sites = {"first.weight": spec, "second": spec, "third.weight": third}
    plan = tuple(Quantized(s, Role.LINEAR, w, activation, "nearest") for s, w in sites.items())
    program, notes = run_passes(captured.program, [QuantizeLinears(plan)])
    assert all(note.done for note in notes)
    (got,) = program.run(x)
    one = by_hand(x, model.first.weight, model.first.bias, spec, activation)
    two = by_hand(x, model.second.T, model.offset, spec, activation)
    want = by_hand(torch.relu((one + two).float()), model.third.weight, None, third, activation)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_products_that_read_products():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    randomise(model, 0)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    captured = capture(model, x)
    plan = tuple(Quantized(f"{i}.weight", Role.LINEAR, INT8, ROWS, "nearest") for i in range(3))
    program, notes = run_passes(captured.program, [QuantizeLinears(plan)])
    assert [note.done for note in notes] == [True] * 3
    for layer in model:
        x = by_hand(x, layer.weight, layer.bias, INT8, ROWS).float()
    want = x
    (got,) = program.run(torch.randn(2, 6, generator=torch.Generator().manual_seed(1)))
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_products_of_one_value_share_its_rows():
    model, x = shapes()
    captured = capture(model, x)
    sites = ("first.weight", "second", "third.weight")
    plan = tuple(Quantized(s, Role.LINEAR, INT8, ROWS, "nearest") for s in sites)
    program, _ = run_passes(captured.program, [QuantizeLinears(plan)])
    rows = [n for n in program.graph.nodes if n.target is torch.ops.qpass.quantize_rows.default]
    # the reshaped value of the addmm is another one
    assert len(rows) == 3
    captured = captured_zoo("llama_tied")
    plan = choose(captured.program, Recipe.read("w8a8", rotation="off")).quantized
    program, _ = run_passes(captured.program, [QuantizeLinears(plan)])
    rows = [n for n in program.graph.nodes if n.target is torch.ops.qpass.quantize_rows.default]
    # q k v, o, gate up, down in each of two layers, and the head
    assert len(rows) == 2 * 4 + 1


@functools.cache
def captured_zoo(name: str) -> Captured:
    # what runs must not depend on which tests came before
    native.load()
    return capture(specimen(name).build(0), dict(specimen(name).inputs()))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt"])
@pytest.mark.parametrize("recipe", LIMITS)
def test_zoo_runs_quantized_near_float(name, recipe):
    captured = captured_zoo(name)
    plan = choose(captured.program, Recipe.read(recipe, rotation="off"))
    pass_ = QuantizeLinears(plan.quantized)
    assert pass_.contract is Contract.QUANTIZES
    program, notes = run_passes(captured.program, [pass_])
    assert notes
    assert all(note.done for note in notes), [n for n in notes if not n.done]
    assert not find_matmuls(program)
    inputs = captured.flatten(dict(specimen(name).inputs()))
    want, got = captured.program.run(*inputs), program.run(*inputs)
    error = ((got[0] - want[0]).norm() / want[0].norm()).item()
    assert 0 < error < LIMITS[recipe]


def test_float_weights_leave_the_program():
    captured = captured_zoo("llama_tied")
    plan = choose(captured.program, Recipe.read("w8a8", rotation="off"))
    program, _ = run_passes(captured.program, [QuantizeLinears(plan.quantized)])
    left = [w for w in program.weights.values() if w.source is not None]
    # gains of norms, which no product reads
    assert left
    assert all(captured.program.sources[w.source].dim() < 2 for w in left)


def test_refusals_have_reasons():
    model, x = shapes()
    captured = capture(model, x)
    choices = (
        Quantized(
            "first.weight", Role.LINEAR, INT8, QuantSpec("int8", "tensor", dynamic=True), "nearest"
        ),
        Quantized("second", Role.LINEAR, INT8, dataclasses.replace(ROWS, dynamic=False), "nearest"),
        Quantized("absent", Role.LINEAR, INT8, None, "nearest"),
    )
    program, notes = run_passes(captured.program, [QuantizeLinears(choices)])
    why = {note.where: note.why for note in notes if not note.done}
    assert "per token" in why["first.weight"]
    assert "per token" in why["second"]
    assert "no such" in why["absent"]
    assert torch.equal(program.run(x)[0], captured.program.run(x)[0])

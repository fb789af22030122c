"""Do programs run, widen, copy, print and change as they say?"""

import pytest
import torch
from torch import nn

from qpass.capture import capture
from qpass.errors import BadInput, ContractBroken
from qpass.ir import Affine, Ones, Permute, Program, ScaleAxis, Weight, Zeros, edit, read
from qpass.ir.alias import memory, written_memory
from qpass.ir.wide import grouped_mm
from tests.capture.models import Apply, noise, operators, randomised


class Casts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5))

    def forward(self, x):
        return (x.to(torch.bfloat16).float() * self.weight).half().softmax(-1, dtype=torch.float32)


def test_widened_programs_forget_every_cast():
    model, x = randomised(Casts()), noise(3, 5)
    program = capture(model, x).program
    assert torch.equal(program.run(x)[0], model(x).detach())
    want = (x.double() * model.weight.double()).softmax(-1).detach()
    (got,) = program.run(x, widen=True)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0.0)


def test_widening_leaves_integers_and_masks_alone():
    def positions(x):
        steps = torch.arange(x.shape[1])
        return x * (steps < 2).to(x.dtype), steps

    x = noise(2, 4)
    got, steps = capture(Apply(positions), x).program.run(x, widen=True)
    assert steps.dtype == torch.int64
    assert torch.equal(got[:, 2:], torch.zeros(2, 2, dtype=torch.float64))


def test_values_die_after_their_last_use_and_weights_are_made_on_demand():
    model, x = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), noise(2, 4)
    program = capture(model, x).program
    seen = []
    program.run(x, watch=lambda node, value: seen.append((read.target_name(node), value.shape)))
    assert seen == [("aten.linear", (2, 4)), ("aten.relu", (2, 4)), ("aten.linear", (2, 4))]


def test_wrong_numbers_of_inputs_are_refused():
    program = capture(nn.Linear(3, 3), noise(2, 3)).program
    with pytest.raises(BadInput, match="takes 1 inputs, got 2"):
        program.run(noise(2, 3), noise(2, 3))


def _linear() -> tuple[Program, torch.Tensor, nn.Module]:
    model = randomised(nn.Linear(3, 4, bias=False))
    return capture(model, noise(2, 3)).program, noise(2, 3), model


def test_clones_share_sources_and_nothing_else():
    program, x, model = _linear()
    copy = program.clone()
    assert copy.text() == program.text()
    assert copy.sources is program.sources
    (use,) = copy.weights
    copy.weights[use] = copy.weights[use].then(Affine(2.0, 0.0))
    torch.testing.assert_close(copy.run(x)[0], 2 * model(x).detach())
    torch.testing.assert_close(program.run(x)[0], model(x).detach())
    assert "Affine" in copy.text()
    assert "Affine" not in program.text()


def test_new_weights_and_calls():
    program, x, model = _linear()
    (linear,) = (n for n in program.graph.nodes if n.op == "call_function")
    bias = edit.add_weight(
        program,
        "bias",
        Weight(None, (Zeros((4,)), Affine(1.0, 0.5))),
        edit.fake_like(program, (4,), torch.float32),
    )
    edit.set_argument(linear, "bias", bias)
    program.lint()
    torch.testing.assert_close(program.run(x)[0], model(x).detach() + 0.5)
    assert program.text().count("weight new . Zeros . Affine") == 1


def test_an_argument_set_to_its_default_is_left_out():
    def attend(x):
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5)

    program = capture(Apply(attend), noise(2, 3, 4, 5)).program
    (node,) = (n for n in program.graph.nodes if n.op == "call_function")
    edit.set_argument(node, "scale", None)
    assert "scale=" not in program.text()
    edit.set_argument(node, "scale", 0.25)
    assert "scale=0.25" in program.text()


def test_dead_nodes_and_weights_are_erased_but_not_inputs():
    program, x, _ = _linear()
    (linear,) = (n for n in program.graph.nodes if n.op == "call_function")
    (x_node,) = program.inputs
    relu = edit.call(program, linear, torch.ops.aten.relu.default, x_node)
    edit.replace(linear, relu)
    edit.erase_dead(program)
    program.lint()
    assert program.weights == {}
    assert operators(program) == ["aten.relu"]
    assert torch.equal(program.run(x)[0], x.relu())


def test_nodes_are_found_by_name_while_the_graph_changes():
    program, _, _ = _linear()
    (linear,) = (n for n in program.graph.nodes if n.op == "call_function")
    (x_node,) = program.inputs
    assert program.node(linear.name) is linear
    relu = edit.call(program, linear, torch.ops.aten.relu.default, x_node)
    assert program.node(relu.name) is relu
    edit.replace(linear, relu)
    with pytest.raises(KeyError):
        program.node(linear.name)
    copy = program.clone()
    assert copy.node(relu.name) is not relu
    assert copy.node(relu.name).name == relu.name


def test_steps_that_change_cannot_make():
    with pytest.raises(ContractBroken, match="needs a step"):
        Weight(None).evaluate({})
    with pytest.raises(ContractBroken, match="cannot make"):
        Weight(None, (Permute((1, 0)),)).evaluate({})


def test_scaling_repeats_the_factor():
    sources = {"w": noise(4, 2), "g": noise(2, seed=3)}
    weight = Weight("w").then(ScaleAxis(Weight("g"), axis=0, repeats=2))
    want = sources["w"].double() * sources["g"].double().repeat(2)[:, None]
    assert torch.equal(weight.evaluate(sources), want)
    assert torch.equal(Weight(None, (Ones((2,)),)).evaluate({}), torch.ones(2, dtype=torch.float64))


def test_weights_are_hashable_by_what_they_are():
    a, b = (Weight("w").then(Affine(2.0, 1.0)) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Weight("w").then(Affine(2.0, 0.0))


def test_views_share_memory():
    def views(x):
        y = x + 1
        return y.view(-1).chunk(2)[0].unsqueeze(0), y.clone(), (y * 2).relu_()

    program = capture(Apply(views), noise(2, 6)).program
    first, second, _ = program.outputs
    assert memory(first) is not first
    assert read.target_name(memory(first)) == "aten.add.Tensor"
    assert memory(second) is second
    assert written_memory(program.graph) == frozenset()


# axes of the operands, and how their grouped product is written without groups
GROUPED = {
    "rows": ((12, 16), (3, 16, 8)),
    "columns": ((3, 8, 16), (16, 12)),
    "sums": ((8, 12), (12, 16)),
    "batches": ((3, 8, 16), (3, 16, 8)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_products_are_the_same_in_float64(name):
    a, b = (noise(*shape, seed=i) for i, shape in enumerate(GROUPED[name]))
    offs = None if name == "batches" else torch.tensor([4, 4, 12], dtype=torch.int32)
    want = torch.ops.aten._grouped_mm(a, b, offs)
    torch.testing.assert_close(grouped_mm(a.double(), b.double(), offs).float(), want)

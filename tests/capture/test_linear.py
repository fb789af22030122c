"""Are linear layers that are written out recognised, and nothing else?"""

import pytest
import torch
from torch import nn

from qpass.capture import capture
from qpass.ir import Permute
from tests.capture.models import noise, operators, randomised


class WrittenOut(nn.Module):
    def __init__(self, product, fan_in=6, fan_out=4, bias=True):
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.matrix = nn.Parameter(torch.empty(fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(fan_out)) if bias else None

    def forward(self, x):
        return self.product(self, x)


LAYERS = {
    "transposed": lambda m, x: x @ m.weight.T + m.bias,
    "stored_turned": lambda m, x: m.bias + x @ m.matrix,
    "flat": lambda m, x: torch.mm(x.flatten(0, 1), m.matrix).view(2, -1, 4) + m.bias,
    "linear": lambda m, x: nn.functional.linear(x, m.weight) + m.bias,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_written_out_become_linear(name):
    model, x = randomised(WrittenOut(LAYERS[name])), noise(2, 5, 6)
    program = capture(model, x).program
    assert operators(program).count("aten.linear") == 1
    assert not {"aten.matmul", "aten.mm"} & set(operators(program))
    if name != "flat":
        assert operators(program) == ["aten.linear"]
    torch.testing.assert_close(program.run(x)[0], model(x))
    owner = next(o for o in program.owners.values() if o.attribute != "bias")
    assert owner.prefix == (() if owner.attribute == "weight" else (Permute((1, 0)),))


NEAR_MISSES = {
    "scaled_bias": lambda m, x: torch.add(x @ m.matrix, m.bias, alpha=2.0),
    "product_read_twice": lambda m, x: (x @ m.matrix + m.bias) * (x @ m.matrix),
    "a_vector_of_length_one": lambda m, x: x @ m.matrix + m.bias[:1],
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_other_sums_stay(name):
    def twice(m, x):
        y = x @ m.matrix
        return (y + m.bias) * y

    product = twice if name == "product_read_twice" else NEAR_MISSES[name]
    model, x = randomised(WrittenOut(product)), noise(2, 5, 6)
    program = capture(model, x).program
    assert "aten.add.Tensor" in operators(program)
    torch.testing.assert_close(program.run(x)[0], model(x))


def test_a_vector_of_another_module_is_no_bias():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4, bias=False)
            self.shift = nn.Parameter(torch.empty(4))

        def forward(self, x):
            return self.inner(x) + self.shift

    model, x = randomised(Outer()), noise(2, 6)
    assert operators(capture(model, x).program) == ["aten.linear", "aten.add.Tensor"]


def test_products_of_values_stay():
    model, x = randomised(WrittenOut(lambda m, x: x @ x.mT)), noise(2, 5, 6)
    assert "aten.matmul" in operators(capture(model, x).program)

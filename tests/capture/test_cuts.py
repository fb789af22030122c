"""Are parts of an axis that a view had split cut out of the axis itself?"""

import pytest
import torch
from torch import nn

from qpass.capture import capture
from tests.capture.models import noise, operators, randomised

HEADS, WIDTH = 3, 4


class Fused(nn.Module):
    """One matrix makes three values, which `cut` takes apart."""

    def __init__(self, cut):
        super().__init__()
        self.all = nn.Linear(6, 3 * HEADS * WIDTH)
        self.cut = cut

    def forward(self, x):
        q, k, v = self.cut(self.all(x), *x.shape[:2])
        return q + 2 * k.sin() + 3 * v.cos()


CUTS = {
    "inside_heads": lambda y, b, t: y.view(b, t, HEADS, 3, WIDTH).unbind(3),
    "selected": lambda y, b, t: (y.view(b, t, HEADS, 3, WIDTH)[..., i, :] for i in range(3)),
    "around_heads": lambda y, b, t: y.view(b, t, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4),
    "unbound": lambda y, b, t: y.view(b, t, 3, HEADS, WIDTH).transpose(1, 3).unbind(2),
    "sliced": lambda y, b, t: (
        y.view(b, t, 3 * HEADS, WIDTH)[:, :, i * HEADS : (i + 1) * HEADS] for i in range(3)
    ),
    "listed": lambda y, b, t: (
        y.view(b, t, 3 * HEADS, WIDTH)[:, :, list(range(i * HEADS, (i + 1) * HEADS))]
        for i in range(3)
    ),
    "from_the_end": lambda y, b, t: (
        y.view(b, t, 9, WIDTH)[:, :, :-6],
        y.view(b, t, 9, WIDTH)[:, :, -6:-3],
        y.view(b, t, 9, WIDTH)[:, :, [-3, -2, -1]],
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_parts_are_cut_before_the_view(name):
    model, x = randomised(Fused(CUTS[name])), noise(2, 5, 6)
    program = capture(model, x).program
    found = operators(program)
    assert not {"aten.select.int", "aten.unbind.int", "aten.index.Tensor"} & set(found)
    assert found.count("aten.slice.Tensor") == 3
    for shape in ((2, 5, 6), (3, 4, 6)):
        x = noise(*shape)
        torch.testing.assert_close(program.run(x)[0], model(x))


STAY = {
    "whole_view_is_read": lambda y, b, t: (
        y.view(b, t, HEADS, 3, WIDTH).sin()[..., 0, :],
        *y.view(b, t, HEADS, 3, WIDTH).unbind(3)[1:],
    ),
    "a_buffer_says_where": lambda y, b, t: (
        [y.view(b, t, 9, WIDTH)[:, :, torch.tensor([0, 2, 4])]] * 3
    ),
    "last_axis": lambda y, b, t: [y.view(b, t, 12, 3)[..., i] for i in range(3)],
}


@pytest.mark.parametrize("name", STAY)
def test_other_readers_keep_the_view(name):
    model, x = randomised(Fused(STAY[name])), noise(2, 5, 6)
    program = capture(model, x).program
    torch.testing.assert_close(program.run(x)[0], model(x))
    assert {"aten.select.int", "aten.unbind.int", "aten.index.Tensor"} & set(operators(program))

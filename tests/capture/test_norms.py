"""Whether norms are recognised in every spelling, and nothing that only looks like one."""

import pytest
import torch
from torch import nn

from qpass.capture.export import capture
from tests.capture.models import assert_same, before_and_after, noise, operators, randomised

RMS, LAYER = "aten.rms_norm", "aten.layer_norm"


def _rsqrt(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


def _square(x):
    return torch.rsqrt(torch.square(x).mean(dim=-1, keepdim=True) + 1e-3) * x


def _product(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3)


def _power(x):
    return x * ((x**2).mean(2, keepdim=True) + 1e-3).pow(-0.5)


def _sum(x):
    return x * (1 / ((x * x).sum(-1, keepdim=True) / 12 + 1e-3).sqrt())


def _wide(x):
    return _rsqrt(x.float()).to(x.dtype)


def _functional(x):
    return nn.functional.rms_norm(x, (12,), eps=1e-3)


def _centred(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-3)


def _variance(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-3)


def _correction(x):
    centred = x - x.mean((-1,), keepdim=True)
    return centred / (torch.var(x, 2, correction=0, keepdim=True) + 1e-3) ** 0.5


def _dropped(x):
    return x * ((x * x).sum(-1) / 12 + 1e-3).pow(-0.5).unsqueeze(-1)


def _dropped_early(x):
    return x / torch.sqrt(x.pow(2).mean(2).unsqueeze(2) + 1e-3)


RMS_SPELLINGS = (
    *(_rsqrt, _square, _product, _power, _sum, _wide, _functional, _dropped, _dropped_early),
)
LAYER_SPELLINGS = (_centred, _variance, _correction)


class Norm(nn.Module):
    def __init__(self, core, gain):
        super().__init__()
        self.core, self.gain = core, gain
        self.weight = nn.Parameter(torch.empty(12))
        self.bias = nn.Parameter(torch.empty(12))
        self.linear = nn.Linear(12, 7)

    def forward(self, x):
        return self.linear(self.gain(self.core(x), self.weight, self.bias))


GAINS = {
    "none": lambda y, w, b: y,
    "right": lambda y, w, b: y * w,
    "left": lambda y, w, b: w * y,
    "plus_one": lambda y, w, b: (1.0 + w) * y,
    "viewed": lambda y, w, b: y * w.view(1, 1, 12),
    "wide": lambda y, w, b: (y.float() * (1 + w.float())).type_as(y),
}


CASES = [(core, "right") for core in (*RMS_SPELLINGS, *LAYER_SPELLINGS)]
CASES += [(core, gain) for core in (_wide, _centred) for gain in GAINS if gain != "right"]


@pytest.mark.parametrize(("core", "gain"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_every_spelling_is_raised_and_unchanged(core, gain, monkeypatch):
    model = randomised(Norm(core, GAINS[gain]))
    x = noise(2, 5, 12)
    plain, program = before_and_after(model, x, monkeypatch)
    expected = RMS if core in RMS_SPELLINGS else LAYER
    assert operators(program) == [expected, "aten.linear"]
    assert len(program.weights) == (2 if gain == "none" else 3)
    assert_same(program, plain, noise(3, 4, 12))


@pytest.mark.parametrize("order", ["right", "left"])
def test_layer_norm_takes_gain_and_bias(order, monkeypatch):
    def affine(y, w, b):
        return y * w + b if order == "right" else b + w * y

    model, x = randomised(Norm(_centred, affine)), noise(2, 5, 12)
    plain, program = before_and_after(model, x, monkeypatch)
    assert operators(program) == [LAYER, "aten.linear"]
    assert len(program.weights) == 4
    assert_same(program, plain, x)


def test_a_bias_behind_an_rms_norm_stays(monkeypatch):
    model, x = randomised(Norm(_rsqrt, lambda y, w, b: y * w + b)), noise(2, 5, 12)
    plain, program = before_and_after(model, x, monkeypatch)
    assert operators(program) == [RMS, "aten.add.Tensor", "aten.linear"]
    assert_same(program, plain, x)


NEAR_MISSES = {
    "other_axis": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3),
    "two_axes": lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-3),
    "epsilon_outside": lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3),
    "cubed": lambda x: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-3),
    "of_another": lambda x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-3),
    "wrong_count": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 11 + 1e-3),
    "unbiased": lambda x: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3)
    ),
    "half_centred": lambda x: (
        (x - 0.5 * x.mean(-1, keepdim=True))
        * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-3)
    ),
    "multiplied_root": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt(),
    "inverted": lambda x: (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() / x,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_with_a_reason(name):
    captured = capture(randomised(Norm(NEAR_MISSES[name], GAINS["right"])), noise(2, 5, 12))
    assert not {RMS, LAYER} & set(operators(captured.program))
    assert [note.done for note in captured.notes] == [False]
    assert captured.notes[0].why.startswith("not a norm: ")


def test_the_default_epsilon_is_written_out():
    model = randomised(Norm(lambda x: nn.functional.rms_norm(x, (12,)), GAINS["right"]))
    x = 1e-3 * noise(2, 5, 12)
    program = capture(model, x).program
    assert f"{torch.finfo(torch.float32).eps}" in program.text()
    torch.testing.assert_close(program.run(x)[0], model(x))


SEVERAL_AXES = {
    "own_gain": lambda: nn.RMSNorm((5, 12)),
    "own_gain_and_bias": lambda: nn.LayerNorm((5, 12)),
    "none": lambda: nn.LayerNorm((5, 12), elementwise_affine=False),
}


@pytest.mark.parametrize("name", SEVERAL_AXES)
def test_a_norm_over_several_axes_stays_as_it_is(name):
    model, x = randomised(Norm(SEVERAL_AXES[name](), GAINS["right"])), noise(2, 5, 12)
    program = capture(model, x).program
    assert operators(program)[1:] == ["aten.mul.Tensor", "aten.linear"]
    torch.testing.assert_close(program.run(x)[0], model(x))


def test_a_normalised_value_read_twice_keeps_its_gains_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.empty(12)), nn.Parameter(torch.empty(12))

        def forward(self, x):
            y = _rsqrt(x)
            return y * self.a, y * self.b

    program = capture(randomised(Twice()), noise(2, 5, 12)).program
    assert operators(program) == [RMS, "aten.mul.Tensor", "aten.mul.Tensor"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", ["none", "left", "wide"])
def test_norms_of_low_precision_models(dtype, gain, monkeypatch):
    model, x = randomised(Norm(_wide, GAINS[gain])).to(dtype), noise(2, 5, 12, dtype=dtype)
    plain, program = before_and_after(model, x, monkeypatch)
    assert operators(program).count(RMS) == 1
    if gain != "wide":
        assert operators(program) == [RMS, "aten.linear"]
    assert_same(program, plain, x)
    (got,), want = program.run(x), model(x)
    assert got.dtype == dtype
    # a few roundings of values of magnitude 4 to at most 8 bits
    assert (got - want).abs().max() <= 2**-5 * want.abs().max()

"""Whether rotary embeddings are recognised, and nothing that only looks like them."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qpass.capture.export import capture
from qpass.ops import structure
from tests.capture.models import Apply, assert_same, before_and_after, noise, operators

ROTARY = "qpass.rotary"
B, H, T, D = 2, 3, 5, 6


def _angles(width: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    angle = noise(B, 1, T, width, seed=7)
    return angle.cos(), angle.sin()


def _slices(x, cos, sin):
    turned = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1)
    return (x * cos) + (turned * sin)


def _chunks(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return sin * torch.cat((-b, a), dim=3) + cos * x


def _wide(x, cos, sin):
    turned = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1)
    return (x.float() * cos + turned.float() * sin).type_as(x)


def _every_two(x, cos, sin):
    turned = torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def _pairs(x, cos, sin):
    a, b = x.reshape(B, H, T, D // 2, 2).unbind(-1)
    return x * cos + torch.stack((-b, a), -1).view(B, H, T, D) * sin


def _planes(x, cos, sin):
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _planes_by_pairs(x, cos, sin):
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, sin * a + cos * b), dim=-1).flatten(3)


def _complex(x, cos, sin):
    unit = torch.complex(cos[..., : D // 2], sin[..., : D // 2])
    pairs = torch.view_as_complex(x.float().reshape(B, H, T, D // 2, 2))
    return torch.view_as_real(pairs * unit).flatten(3).type_as(x)


SPELLINGS = {
    _slices: False,
    _chunks: False,
    _wide: False,
    _planes: False,
    _every_two: True,
    _pairs: True,
    _planes_by_pairs: True,
    _complex: True,
}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_raised_and_unchanged(spelling, monkeypatch):
    values = (noise(B, H, T, D), *_angles())
    plain, program = before_and_after(Apply(spelling), values, monkeypatch)
    assert operators(program).count(ROTARY) == 1
    assert f", {SPELLINGS[spelling]})" in program.text()
    assert "aten.neg" not in operators(program)
    assert_same(program, plain, noise(B, H, T, D, seed=3), *_angles())


def test_a_part_of_the_channels_can_turn(monkeypatch):
    def partial(x, cos, sin):
        return torch.cat((_slices(x[..., :D], cos, sin), x[..., D:]), -1)

    values = (noise(B, H, T, D + 4), *_angles())
    plain, program = before_and_after(Apply(partial), values, monkeypatch)
    assert operators(program).count(ROTARY) == 1
    assert_same(program, plain, *values)


def _mixed(turn):
    return lambda x, cos, sin: x * cos + turn(x) * sin


NEAR_MISSES = {
    "wrong_order": _mixed(lambda x: torch.cat((x[..., :3], -x[..., 3:]), -1)),
    "wrong_sign": _mixed(lambda x: torch.cat((x[..., 3:], -x[..., :3]), -1)),
    "uneven": _mixed(lambda x: torch.cat((-x[..., 2:], x[..., :2]), -1)),
    "other_axis": _mixed(lambda x: torch.cat((-x[:, :, :, :3], x[:, :, :, 3:]), -1)),
    "halves_as_pairs": _mixed(lambda x: torch.stack((-x[..., 3:], x[..., :3]), -1).flatten(-2)),
    "pairs_as_halves": _mixed(lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1)),
    "subtracted": lambda x, cos, sin: x * cos - torch.cat((-x[..., 3:], x[..., :3]), -1) * sin,
    "of_another": lambda x, cos, sin: (
        (x + 1) * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin
    ),
    "uncrossed": lambda x, cos, sin: torch.cat(
        (
            x[..., :3] * cos[..., :3] - x[..., 3:] * sin[..., :3],
            x[..., :3] * cos[..., :3] + x[..., 3:] * sin[..., :3],
        ),
        -1,
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left(name):
    values = (noise(B, H, T, D), *_angles())
    assert ROTARY not in operators(capture(Apply(NEAR_MISSES[name]), values).program)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_planes(interleaved):
    x, angle = noise(B, H, T, D), noise(T, D // 2, seed=5)
    pairs = x.unflatten(-1, (D // 2, 2) if interleaved else (2, D // 2))
    a, b = pairs.unbind(-1 if interleaved else -2)
    c, s = angle.cos(), angle.sin()
    want = torch.stack((a * c - b * s, b * c + a * s), -1 if interleaved else -2).flatten(-2)
    wide = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    torch.testing.assert_close(structure.ROTARY(x, wide.cos(), wide.sin(), interleaved), want)


def test_repeat_heads_is_repeat_interleave():
    x = noise(B, H, T, D)
    assert torch.equal(structure.REPEAT_HEADS(x, 3), x.repeat_interleave(3, dim=1))
    assert structure.REPEAT_HEADS(x[:0], 3).shape == (0, 3 * H, T, D)


def test_compilers_take_the_operators_apart():
    def function(x, cos, sin):
        return structure.REPEAT_HEADS(structure.ROTARY(x, cos, sin, False), 2)

    values = (noise(B, H, T, D), *_angles())
    early = make_fx(function, pre_dispatch=True)(*values).graph
    late = make_fx(function)(*values).graph
    assert {str(n.target) for n in early.nodes} >= {"qpass.rotary.default"}
    assert not any("qpass" in str(n.target) for n in late.nodes)
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(compiled(*values), function(*values))

"""Whether attention and repeated heads are recognised, and nothing that only looks like them."""

import math

import pytest
import torch
from torch import nn

from qpass.capture.export import capture
from tests.capture.models import Apply, assert_same, before_and_after, noise, operators

SDPA = "aten.scaled_dot_product_attention"
B, H, T, S, D = 2, 3, 4, 6, 5


def _values(seed: int = 0) -> tuple[torch.Tensor, ...]:
    q, k = noise(B, H, T, D, seed=seed), noise(B, H, S, D, seed=seed + 1)
    return q, k, noise(B, H, S, D, seed=seed + 2), noise(B, 1, T, S, seed=seed + 3)


def _plain(q, k, v, m):
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def _scaled(q, k, v, m):
    return torch.matmul(torch.softmax(0.3 * torch.matmul(q, k.mT) + m, dim=3), v)


def _divided(q, k, v, m):
    scores = q @ k.permute(0, 1, 3, 2) / math.sqrt(D)
    return (m + scores).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _dropped(q, k, v, m):
    weights = nn.functional.softmax((q @ k.transpose(2, 3)) * 0.3, -1)
    return nn.functional.dropout(weights, 0.5, training=False) @ v


def _filled(q, k, v, m):
    scores = (q @ k.transpose(2, 3)).masked_fill(m > 1, float("-inf"))
    return scores.softmax(-1) @ v


def _batched(q, k, v, m):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = m.expand(B, H, T, S).flatten(0, 1)
    return torch.baddbmm(mask, q, k.mT, beta=1.0, alpha=0.3).softmax(-1).bmm(v)


def _transposed_keys(q, k, v, m):
    return torch.softmax(q @ k.reshape(B, H, D, S), -1) @ v


SPELLINGS = (_plain, _scaled, _divided, _dropped, _filled, _batched, _transposed_keys)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_raised_and_unchanged(spelling, monkeypatch):
    plain, program = before_and_after(Apply(spelling), _values(), monkeypatch)
    assert operators(program).count(SDPA) == 1
    assert not {"aten.softmax.int", "aten.matmul", "aten.bmm"} & set(operators(program))
    assert_same(program, plain, *_values(9)[: len(program.inputs)])


def test_low_precision_scores_with_a_softmax_in_float32(monkeypatch):
    values = tuple(x.bfloat16() for x in _values())
    plain, program = before_and_after(Apply(_divided), values, monkeypatch)
    assert SDPA in operators(program)
    assert program.run(*values)[0].dtype == torch.bfloat16
    assert_same(program, plain, *values)


NEAR_MISSES = {
    "over_queries": lambda q, k, v, m: torch.softmax(q @ k.mT, 2) @ v,
    "masked_before_scaling": lambda q, k, v, m: torch.softmax((q @ k.mT + m) * 0.3, -1) @ v,
    "scaled_mask": lambda q, k, v, m: torch.softmax(torch.add(q @ k.mT, m, alpha=2), -1) @ v,
    "capped": lambda q, k, v, m: torch.softmax(torch.tanh(q @ k.mT), -1) @ v,
    "finite_fill": lambda q, k, v, m: (q @ k.mT).masked_fill(m > 1, -1e4).softmax(-1) @ v,
    "shared_keys": lambda q, k, v, m: torch.softmax(q @ k[:, :1].mT, -1) @ v,
    "right_operand": lambda q, k, v, m: v.mT @ torch.softmax(q @ k.mT, -1).mT,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_with_a_reason(name):
    captured = capture(Apply(NEAR_MISSES[name]), _values())
    assert SDPA not in operators(captured.program)
    assert [note.done for note in captured.notes] == [False]


def test_returned_weights_keep_their_softmax():
    def both(q, k, v):
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights

    captured = capture(Apply(both), _values()[:3])
    assert SDPA not in operators(captured.program)
    assert "more than a product" in captured.notes[0].why


def _expanded(x):
    return x[:, :, None].expand(B, H, 2, S, D).reshape(B, 2 * H, S, D)


def _interleaved(x):
    return x.repeat_interleave(2, dim=1)


@pytest.mark.parametrize("repeat", [_expanded, _interleaved], ids=lambda f: f.__name__)
def test_repeated_heads_are_named(repeat, monkeypatch):
    x = noise(B, H, S, D)
    plain, program = before_and_after(Apply(repeat), (x,), monkeypatch)
    assert operators(program) == ["qpass.repeat_heads"]
    assert_same(program, plain, noise(B, H, S, D, seed=3))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x[:, None].expand(B, 2, H, S, D).reshape(B, 2 * H, S, D),
        lambda x: x[:, :, None].expand(B, H, 2, S, D).reshape(B, H, 2 * S, D),
        lambda x: x.repeat_interleave(2, dim=2),
    ],
    ids=["tiled", "tiled_by_expand", "other_axis", "interleaved_other_axis"],
)
def test_other_repetitions_are_left(other):
    program = capture(Apply(other), (noise(B, H, S, D),)).program
    assert "qpass.repeat_heads" not in operators(program)


def test_shared_heads_are_repeated_explicitly(monkeypatch):
    def grouped(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    values = (noise(B, 6, T, D), noise(B, 2, S, D), noise(B, 3, S, D))
    plain, program = before_and_after(Apply(grouped), values, monkeypatch)
    assert operators(program) == ["qpass.repeat_heads"] * 2 + [SDPA]
    assert "enable_gqa" not in program.text()
    assert_same(program, plain, *values)

"""With which arguments are operators that only move entries called?"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.analyze.calls import Call
from tests.analyze.draws import SIZES, Draw, axis, draws, narrowed, shape, tensor

aten = torch.ops.aten

MANY = 7  # more than any size: "to the end"


def regrouped(draw: Draw, total: int) -> list[int]:
    """A shape of that many entries."""
    sizes: list[int] = []
    while total > 1 and len(sizes) < 5:
        size = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
        sizes.append(size)
        total //= size
    return sizes if total == 1 else [*sizes, total]


@draws(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(draw: Draw, target: Any) -> Call:
    full = shape(draw, 0, 4, (*SIZES, 12))
    return Call(target, (tensor(draw, full), regrouped(draw, prod(full))))


@draws(aten.view_as.default, aten.reshape_as.default)
def _view_as(draw: Draw, target: Any) -> Call:
    full = shape(draw, 0, 4, (*SIZES, 12))
    return Call(target, (tensor(draw, full), tensor(draw, tuple(regrouped(draw, prod(full))))))


@draws(aten.expand_as.default)
def _expand_as(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    return Call(target, (tensor(draw, narrowed(draw, full)), tensor(draw, full)))


@draws(aten.unsqueeze.default)
def _unsqueeze(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    return Call(target, (tensor(draw, full), axis(draw, len(full) + 1)))


@draws(aten.squeeze.default)
def _squeeze(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)),))


@draws(aten.squeeze.dim)
def _squeeze_one(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    return Call(target, (tensor(draw, full), axis(draw, len(full))))


@draws(aten.squeeze.dims)
def _squeeze_some(draw: Draw, target: Any) -> Call:
    full = shape(draw, 2)
    return Call(target, (tensor(draw, full), [0, -1]))


@draws(aten.flatten.using_ints)
def _flatten(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    first = draw(st.integers(0, len(full) - 1))
    last = draw(st.integers(first, len(full) - 1)) - len(full)
    return Call(target, (tensor(draw, full), first, last))


@draws(aten.unflatten.int)
def _unflatten(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1, 4, (*SIZES, 12))
    dim = axis(draw, len(full))
    return Call(target, (tensor(draw, full), dim, regrouped(draw, full[dim]) or [1]))


@draws(aten.transpose.int)
def _transpose(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    return Call(target, (tensor(draw, full), axis(draw, len(full)), axis(draw, len(full))))


@draws(aten.t.default)
def _t(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw, 0, 2)),))


@draws(aten.mT.default)
def _mt(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw, 2)),))


@draws(aten.numpy_T.default)
def _numpy_t(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw, 0, 2)),))


@draws(aten.permute.default)
def _permute(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    order = draw(st.permutations(range(len(full))))
    return Call(target, (tensor(draw, full), [d - len(full) if d % 2 else d for d in order]))


@draws(aten.expand.default)
def _expand(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    some = narrowed(draw, full)
    kept = len(full) - len(some)
    size = [
        -1 if i >= kept and some[i - kept] == n and draw(st.booleans()) else n
        for i, n in enumerate(full)
    ]
    return Call(target, (tensor(draw, some), size))


@draws(aten.slice.Tensor)
def _slice(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1, 3)
    start, stop = (draw(st.sampled_from((None, 0, 1, 2, -1, -2, MANY))) for _ in range(2))
    step = draw(st.sampled_from((1, 1, 1, 2, 3)))
    return Call(target, (tensor(draw, full), axis(draw, len(full)), start, stop, step))


@draws(aten.select.int)
def _select(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    return Call(target, (tensor(draw, full), dim, axis(draw, full[dim])))


@draws(aten.split.Tensor, aten.chunk.default)
def _split(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    return Call(target, (tensor(draw, full), draw(st.integers(1, 4)), axis(draw, len(full))))


@draws(aten.split_with_sizes.default)
def _split_sizes(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    first = draw(st.integers(0, full[dim]))
    return Call(target, (tensor(draw, full), [first, full[dim] - first], dim))


@draws(aten.unbind.int)
def _unbind(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    return Call(target, (tensor(draw, full), axis(draw, len(full))))


@draws(aten.cat.default)
def _cat(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    parts: list[Tensor] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("new", "new", "again", "empty")))
        if kind == "again" and parts:
            parts.append(parts[0])
        elif kind == "empty" and parts:
            parts.append(torch.empty(0, dtype=torch.float64))
        else:
            size = list(full)
            size[dim] = draw(st.sampled_from((*SIZES, 0)))
            parts.append(tensor(draw, tuple(size)))
    return Call(target, (parts, dim))


@draws(aten.stack.default)
def _stack(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    parts = [tensor(draw, full) for _ in range(draw(st.integers(1, 3)))]
    return Call(target, (parts, axis(draw, len(full) + 1)))


@draws(aten.to.dtype)
def _convert(draw: Draw, target: Any) -> Call:
    return Call(
        target,
        (tensor(draw, shape(draw)), draw(st.sampled_from((torch.float64, torch.int64)))),
    )


@draws(aten.to.dtype_layout)
def _convert_layout(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)),), {"dtype": torch.float64})


@draws(aten.to.device)
def _move(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)), "cpu", torch.float64))


@draws(aten.dropout.default)
def _dropout(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)), 0.5, draw(st.booleans())))

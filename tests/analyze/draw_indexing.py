"""With which arguments are operators called that gather, scatter and repeat rows?"""

from __future__ import annotations

from typing import Any

import torch
import transformers.integrations.moe
from hypothesis import strategies as st
from torch import Tensor

from tests.analyze.calls import Call
from tests.analyze.draws import SIZES, Draw, axis, draws, narrowed, shape, tensor

aten = torch.ops.aten

# its import defines an operator that has a rule
__all__ = ["transformers"]


def places(draw: Draw, size: int, where: tuple[int, ...]) -> Tensor:
    """Indices into an axis of that size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randint(size, where, generator=generator)


def indices(draw: Draw, full: tuple[int, ...]) -> list[Tensor | None]:
    """Indices into some axes, by number or by a mask over one or two of them."""
    where = shape(draw, 0, 2)
    found: list[Tensor | None] = []
    while len(found) < len(full):
        n = full[len(found)]
        kind = draw(st.sampled_from(("all", "places", "places", "mask")))
        if kind == "mask" and not any(i is not None for i in found):
            mask = torch.arange(n) % 2 == 0
            return [*found, mask]
        found.append(None if kind == "all" else places(draw, n, narrowed(draw, where)))
    return found if any(i is not None for i in found) else [places(draw, full[0], where)]


@draws(aten.index.Tensor)
def _index(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1, 4)
    return Call(target, (tensor(draw, full), indices(draw, full)))


@draws(aten.index_put.default)
def _put(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    taken = indices(draw, full)
    into = tensor(draw, full)
    values = tensor(draw, narrowed(draw, tuple(aten.index.Tensor(into, taken).shape)))
    return Call(target, (into, taken, values), {"accumulate": draw(st.booleans())})


@draws(aten.index_select.default)
def _select(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    return Call(target, (tensor(draw, full), dim, places(draw, full[dim], shape(draw, 1, 1))))


@draws(aten.index_add.default)
def _add_rows(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    rows = list(full)
    rows[dim] = draw(st.sampled_from(SIZES))
    index = places(draw, full[dim], (rows[dim],))
    kwargs = {"alpha": 0.5} if draw(st.booleans()) else {}
    return Call(target, (tensor(draw, full), dim, index, tensor(draw, tuple(rows))), kwargs)


@draws(aten.repeat_interleave.self_int)
def _repeat_each(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = draw(st.sampled_from((None, *range(-len(full), len(full)))))
    return Call(target, (tensor(draw, full), draw(st.integers(1, 3)), dim))


@draws(aten.repeat.default)
def _repeat(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    more = draw(st.integers(0, 1))
    times = [draw(st.integers(1, 3)) for _ in range(len(full) + more)]
    return Call(target, (tensor(draw, full), times))


@draws(aten._grouped_mm.default, torch.ops.transformers.grouped_mm_fallback.default)
def _grouped(draw: Draw, target: Any) -> Call:
    groups, rows, taken, made = shape(draw, 4, 4)
    ends = sorted(draw(st.integers(0, rows)) for _ in range(groups - 1))
    offsets = torch.tensor([*ends, rows], dtype=torch.int32)
    return Call(target, (tensor(draw, (rows, taken)), tensor(draw, (groups, taken, made)), offsets))


@draws(aten.gather.default)
def _gather(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    index = places(draw, full[dim], full)
    return Call(target, (tensor(draw, full), dim, index))


@draws(aten.scatter_add.default, aten.scatter.src)
def _scatter(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    # replaced by several, the last would win, or any other
    order = torch.randperm(full[dim], generator=torch.Generator().manual_seed(0))
    where = [1] * len(full)
    where[dim] = -1
    index = order.view(where).expand(full).contiguous()
    return Call(target, (tensor(draw, full), dim, index, tensor(draw, full)))

"""With which arguments are linear maps along some axes called?"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from tests.analyze.calls import Call
from tests.analyze.draws import SIZES, Draw, axis, draws, narrowed, shape, tensor

aten = torch.ops.aten

ENDS = st.sampled_from((0, 1, 2))


@draws(aten.flip.default)
def _flip(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dims = draw(st.lists(st.integers(0, len(full) - 1), unique=True, max_size=2))
    return Call(target, (tensor(draw, full), [d - len(full) if d % 2 else d for d in dims]))


@draws(aten.roll.default)
def _roll(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    if draw(st.integers(0, 3)) == 3:
        return Call(target, (tensor(draw, full), [1]))
    return Call(target, (tensor(draw, full), [1], [axis(draw, len(full))]))


@draws(aten.cumsum.default)
def _cumsum(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    kind = draw(st.sampled_from((None, torch.float64, torch.int64)))
    return Call(target, (tensor(draw, full), axis(draw, len(full))), {"dtype": kind})


@draws(aten.constant_pad_nd.default, aten.pad.default)
def _pad(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    pairs = draw(st.integers(1, min(2, len(full))))
    ends = [draw(ENDS) for _ in range(2 * pairs)]
    value = draw(st.sampled_from((0, 0.5, 2.0)))
    mode = ("constant",) if target is aten.pad.default else ()
    return Call(target, (tensor(draw, full), ends, *mode, value))


@draws(
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)
def _pad_places(draw: Draw, target: Any) -> Call:
    places = int(str(target).partition("_pad")[2][0])
    full = (*shape(draw, 1, 2), *(draw(st.sampled_from((3, 5))) for _ in range(places)))
    return Call(target, (tensor(draw, full), [draw(ENDS) for _ in range(2 * places)]))


@draws(aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default)
def _pool_one(draw: Draw, target: Any) -> Call:
    full = (*shape(draw, 1, 2), draw(st.sampled_from((3, 5, 6))))
    return Call(target, (tensor(draw, full), [2]))


@draws(aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default)
def _pool_two(draw: Draw, target: Any) -> Call:
    full = (*shape(draw, 1, 2), *(draw(st.sampled_from((3, 5))) for _ in range(2)))
    return Call(target, (tensor(draw, full), [2, 2]))


@draws(aten.upsample_nearest2d.vec)
def _larger(draw: Draw, target: Any) -> Call:
    full = (*shape(draw, 2, 2), 3, 2)
    return Call(target, (tensor(draw, full), [6, 4], None))


@draws(aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec)
def _smooth(draw: Draw, target: Any) -> Call:
    full = (*shape(draw, 2, 2), 3, 2)
    return Call(target, (tensor(draw, full), [5, 3], draw(st.booleans()), None))


@draws(aten.unfold.default)
def _unfold(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    size = draw(st.integers(1, full[dim]))
    return Call(target, (tensor(draw, full), dim, size, draw(st.sampled_from((1, 2)))))


@draws(aten.slice_scatter.default)
def _put_slice(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    start = draw(st.integers(0, full[dim] - 1))
    stop = draw(st.integers(start + 1, full[dim]))
    put = list(full)
    put[dim] = stop - start
    return Call(target, (tensor(draw, full), tensor(draw, tuple(put)), dim, start, stop))


@draws(aten.select_scatter.default)
def _put_one(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dim = axis(draw, len(full))
    put = list(full)
    del put[dim]
    return Call(target, (tensor(draw, full), tensor(draw, tuple(put)), dim, 0))


@draws(aten.copy.default)
def _copy(draw: Draw, target: Any) -> Call:
    full = shape(draw, 0, 3, SIZES)
    return Call(target, (tensor(draw, full), tensor(draw, narrowed(draw, full))))

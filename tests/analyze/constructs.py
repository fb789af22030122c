"""What random programs are built of: moves, sums, norms, masks and functions of each entry."""

from __future__ import annotations

import torch
from torch import fx

from tests.analyze.random_graph import Grown, construct, shape, split_in_two

aten = torch.ops.aten

FUNCTIONS = (
    *(aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default),
    *(aten.sin.default, aten.abs.default, aten.neg.default, aten.sigmoid.default),
    *(aten.leaky_relu.default, aten.square.default, aten.softplus.default, aten.erf.default),
    *(aten.sign.default, aten.atan.default, aten.cos.default),
)


@construct("elementwise")
def function(g: Grown, x: fx.Node) -> fx.Node:
    return g.call(g.choice.choice(FUNCTIONS), x)


@construct("elementwise")
def number(g: Grown, x: fx.Node) -> fx.Node:
    how = g.choice.choice(("add", "mul", "div", "pow", "clamp", "rsub", "zero"))
    if how == "pow":
        return g.call(aten.pow.Tensor_Scalar, x, g.choice.choice((2, 3)))
    if how == "clamp":
        low, high = g.choice.choice(((0, None), (-0.5, 0.5), (None, 0), (-0.2, 1.0)))
        return g.call(aten.clamp.default, x, low, high)
    if how == "rsub":
        return g.call(aten.rsub.Scalar, x, g.choice.choice((0.0, 1.0)))
    if how == "zero":
        return g.call(aten.add.Tensor, x, 0.0)
    target = {"add": aten.add.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor}[how]
    return g.call(target, x, g.choice.choice((0.5, -2.0)))


def narrowed(g: Grown, sizes: tuple[int, ...]) -> tuple[int, ...]:
    some = tuple(1 if g.maybe(0.3) else n for n in sizes)
    return some[g.choice.randint(0, len(sizes)) :]


@construct("elementwise")
def with_weight(g: Grown, x: fx.Node) -> fx.Node:
    """A gain, a bias, a table of positions, one number for all."""
    how = g.choice.choice(("gain", "bias", "any", "scalar"))
    last = shape(x)[-1:]
    sizes = {"gain": last, "bias": last, "scalar": ()}.get(how, narrowed(g, shape(x)))
    weight = g.weight(*sizes, size=1.0)
    target = {"gain": aten.mul.Tensor, "bias": aten.add.Tensor}.get(
        how, g.choice.choice((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor))
    )
    return g.call(target, *((x, weight) if g.maybe(0.7) else (weight, x)))


@construct("elementwise")
def with_value(g: Grown, x: fx.Node) -> fx.Node | None:
    """A residual, a gate, another value that is broadcast."""

    def meets(v: fx.Node) -> bool:
        pairs = zip(reversed(shape(v)), reversed(shape(x)), strict=False)
        return all(a == b or 1 in (a, b) for a, b in pairs)

    same = g.another(lambda v: shape(v) == shape(x) and v is not x)
    other = same if same is not None and g.maybe(0.7) else g.another(meets)
    if other is None:
        return None
    how = g.choice.choice(("add", "add", "sub", "mul", "div", "maximum"))
    if how == "div":
        other = g.call(aten.add.Tensor, g.call(aten.abs.default, other), 0.5)
        return g.call(aten.div.Tensor, x, other)
    if how == "maximum":
        return g.call(aten.maximum.default, x, other)
    target = {"add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor}[how]
    return g.call(target, x, other)


@construct("elementwise")
def reduced(g: Grown, x: fx.Node) -> fx.Node | None:
    if not shape(x):
        return None
    dim, keep = g.axis(x), g.maybe(0.6)
    how = g.choice.choice(("sum", "mean", "length", "softmax", "difference", "scaled"))
    if how == "softmax":
        return g.call(aten.softmax.int, x, dim)
    if how == "length":
        return g.call(aten.linalg_vector_norm.default, x, g.choice.choice((1, 2)), [dim], keep)
    if how == "scaled":
        length = g.call(aten.linalg_vector_norm.default, x, 2, [dim], True)
        return g.call(aten.div.Tensor, x, g.call(aten.add.Tensor, length, 0.5))
    target = aten.sum.dim_IntList if how == "sum" else aten.mean.dim
    if how == "difference":
        return g.call(aten.sub.Tensor, x, g.call(target, x, [dim], True))
    return g.call(target, x, [dim], keep)


@construct("norms")
def norm(g: Grown, x: fx.Node) -> fx.Node | None:
    if not shape(x):
        return None
    several = len(shape(x)) > 1 and g.maybe(0.15)
    sizes = shape(x)[-2:] if several else shape(x)[-1:]
    gain = g.weight(*sizes, size=1.0) if g.maybe(0.6) else None
    if g.maybe():
        return g.call(aten.rms_norm.default, x, list(sizes), gain, 1e-2)
    bias = g.weight(*sizes) if gain is not None and g.maybe() else None
    return g.call(aten.layer_norm.default, x, list(sizes), gain, bias, 1e-2)


@construct("norms")
def pre_norm(g: Grown, x: fx.Node) -> fx.Node | None:
    """A norm, a layer behind it, and the stream that goes on."""
    y = norm(g, x)
    if y is None:
        return None
    width = shape(x)[-1]
    hidden = g.call(aten.linear.default, y, g.weight(5, width), g.weight(5))
    return g.call(aten.add.Tensor, x, g.call(aten.linear.default, hidden, g.weight(width, 5)))


@construct("views")
def reshaped(g: Grown, x: fx.Node) -> fx.Node | None:
    sizes = list(shape(x))
    if not sizes:
        return g.reshape(x, 1)
    dim = g.axis(x, signed=False)
    if g.maybe() or len(sizes) == 1:
        return g.reshape(x, *sizes[:dim], *split_in_two(sizes[dim], g.choice), *sizes[dim + 1 :])
    dim = g.choice.randrange(len(sizes) - 1)
    return g.reshape(x, *sizes[:dim], sizes[dim] * sizes[dim + 1], *sizes[dim + 2 :])


@construct("views")
def reordered(g: Grown, x: fx.Node) -> fx.Node | None:
    rank = len(shape(x))
    if not rank:
        return None
    how = g.choice.choice(("transpose", "permute", "unsqueeze", "squeeze", "expand"))
    if how == "transpose":
        return g.call(aten.transpose.int, x, g.axis(x), g.axis(x))
    if how == "permute":
        return g.call(aten.permute.default, x, g.choice.sample(range(rank), rank))
    if how == "squeeze":
        return g.call(aten.squeeze.default, x)
    x = g.call(aten.unsqueeze.default, x, g.choice.randint(0, rank))
    if how == "unsqueeze":
        return x
    sizes = [n if n > 1 else g.choice.choice((1, 2, 3)) for n in shape(x)]
    return g.call(aten.expand.default, x, sizes)


@construct("views")
def cut(g: Grown, x: fx.Node) -> fx.Node | list[fx.Node] | None:
    if not shape(x):
        return None
    dim = g.axis(x)
    n = shape(x)[dim]
    how = g.choice.choice(("slice", "select", "chunk", "split", "unbind", "step"))
    if how == "select":
        return g.call(aten.select.int, x, dim, g.choice.randrange(-n, n))
    if how == "step":
        return g.call(aten.slice.Tensor, x, dim, g.choice.choice((0, 1)), n, 2)
    if how == "slice":
        a, b = sorted((g.choice.randint(0, n), g.choice.randint(0, n)))
        return g.call(aten.slice.Tensor, x, dim, a, b)
    if how == "unbind":
        return g.pieces(g.call(aten.unbind.int, x, dim))
    if how == "chunk":
        return g.pieces(g.call(aten.chunk.default, x, g.choice.choice((2, 3)), dim))
    a = g.choice.randint(0, n)
    return g.pieces(g.call(aten.split_with_sizes.default, x, [a, n - a], dim))


@construct("views")
def joined(g: Grown, x: fx.Node) -> fx.Node | None:
    """Pieces in another order, two values one after another, or one above another."""
    if not shape(x):
        return None
    dim = g.axis(x, signed=False)
    if g.maybe(0.4):
        pieces = g.pieces(g.call(aten.chunk.default, x, 2, dim))
        if g.maybe():
            pieces[0] = function(g, pieces[0])
        return g.call(aten.cat.default, pieces[:: g.choice.choice((1, -1))], dim)
    other = g.another(lambda v: shape(v) == shape(x))
    if other is None:
        return None
    target = g.choice.choice((aten.cat.default, aten.stack.default))
    return g.call(target, [x, other], dim)


@construct("along")
def along(g: Grown, x: fx.Node) -> fx.Node | None:
    if not shape(x):
        return None
    dim = g.axis(x)
    n = shape(x)[dim]
    how = g.choice.choice(("flip", "roll", "cumsum", "pad", "replace", "pick"))
    if how == "flip":
        return g.call(aten.flip.default, x, [dim])
    if how == "roll":
        return g.call(aten.roll.default, x, [g.choice.choice((1, -1))], [dim])
    if how == "cumsum":
        return g.call(aten.cumsum.default, x, dim)
    if how == "pad":
        ends = [0] * (2 * g.choice.randint(0, len(shape(x)) - 1)) + [1, g.choice.choice((0, 2))]
        return g.call(aten.constant_pad_nd.default, x, ends, g.choice.choice((0, 1.5)))
    if how == "pick":
        put = g.call(aten.select.int, x, dim, g.choice.randrange(n))
        return g.call(aten.select_scatter.default, x, put, dim, g.choice.randrange(n))
    a = g.choice.randint(0, n - 1)
    put = g.call(aten.slice.Tensor, x, dim, 0, n - a)
    return g.call(aten.slice_scatter.default, x, put, dim, a, n)


@construct("along")
def pooled(g: Grown, x: fx.Node) -> fx.Node | None:
    if len(shape(x)) != 3 or shape(x)[-1] < 2:
        return None
    return g.call(aten.avg_pool1d.default, x, [2], [1])


@construct("indexing")
def picked(g: Grown, x: fx.Node) -> fx.Node | None:
    if not shape(x):
        return None
    dim = g.axis(x, signed=False)
    n = shape(x)[dim]
    index = g.constant(torch.randint(n, (3,), generator=g._noise))
    how = g.choice.choice(("select", "index", "add", "put"))
    if how == "select":
        return g.call(aten.index_select.default, x, dim, index)
    if how == "index":
        return g.call(aten.index.Tensor, x, [*[None] * dim, index])
    rows = g.call(aten.index_select.default, x, dim, index)
    if how == "add":
        return g.call(aten.index_add.default, x, dim, index, rows)
    return g.call(aten.index_put.default, x, [*[None] * dim, index], rows, True)


@construct("indexing")
def repeated(g: Grown, x: fx.Node) -> fx.Node | None:
    if not shape(x):
        return None
    if g.maybe():
        return g.call(aten.repeat_interleave.self_int, x, g.choice.choice((1, 2)), g.axis(x))
    times = [g.choice.choice((1, 1, 2)) for _ in shape(x)]
    return g.call(aten.repeat.default, x, [*[2] * g.maybe(0.2), *times])


@construct("masks")
def masked(g: Grown, x: fx.Node) -> fx.Node | None:
    mask = g.constant(g.noise(*narrowed(g, shape(x))) > 0)
    how = g.choice.choice(("fill", "where", "number", "zeros"))
    if how == "fill":
        return g.call(aten.masked_fill.Scalar, x, mask, g.choice.choice((0.0, 1.5)))
    if how == "number":
        return g.call(aten.where.ScalarOther, mask, x, g.choice.choice((0.0, -1.0)))
    if how == "zeros":
        zeros = g.call(aten.zeros_like.default, x)
        return g.call(aten.where.self, mask, zeros, x)
    other = g.another(lambda v: shape(v) == shape(x))
    return None if other is None else g.call(aten.where.self, mask, x, other)


@construct("gathers")
def gathered(g: Grown, x: fx.Node) -> fx.Node | None:
    """Rows by an index that is repeated along them or not, and rows put back."""
    sizes = shape(x)
    if len(sizes) < 2:
        return None
    dim = g.axis(x, signed=False)
    free = g.choice.choice([i for i in range(len(sizes)) if i != dim])
    own = [1 if i == free else n for i, n in enumerate(sizes)]
    index = g.constant(torch.argsort(g.noise(*own), dim=dim))
    index = g.call(aten.expand.default, index, list(sizes))
    if g.maybe(0.2):
        index = g.constant(index.meta["val"].flip(free).contiguous())
    how = g.choice.choice(("gather", "add", "put"))
    if how == "gather":
        return g.call(aten.gather.default, x, dim, index)
    other = g.another(lambda v: shape(v) == sizes)
    target = aten.scatter_add.default if how == "add" else aten.scatter.src
    return g.call(target, x, dim, index, x if other is None else other)


@construct("gathers")
def routed(g: Grown, x: fx.Node) -> fx.Node | None:
    """Some tokens pass layers and return to their places."""
    if len(shape(x)) != 3:
        return None
    b, t, width = shape(x)
    index = g.constant(torch.randint(t, (b, 2, 1), generator=g._noise))
    index = g.call(aten.expand.default, index, [b, 2, width])
    y = g.call(aten.gather.default, x, 1, index)
    y = g.call(aten.linear.default, y, g.weight(4, width))
    return g.call(
        aten.scatter_add.default, x, 1, index, g.call(aten.linear.default, y, g.weight(width, 4))
    )

"""What random programs are built of: products, attention, experts, convolutions, einsums."""

from __future__ import annotations

import functools

import torch
from torch import fx

from qpass.ops.structure import REPEAT_HEADS, ROTARY
from tests.analyze.random_graph import Grown, construct, shape

aten = torch.ops.aten


@construct("products")
def linear(g: Grown, x: fx.Node) -> fx.Node | None:
    if not shape(x):
        return None
    out, width = g.width(), shape(x)[-1]
    if g.maybe(0.2):
        # a weight that is stored the other way round, or a square one that others use
        turned = g.call(aten.t.default, g.weight(width, out))
        return g.call(aten.linear.default, x, turned)
    out = width if g.maybe(0.3) else out
    bias = g.weight(out) if g.maybe() else None
    return g.call(aten.linear.default, x, g.weight(out, width), bias)


@construct("products")
def product(g: Grown, x: fx.Node) -> fx.Node | None:
    sizes = shape(x)
    if not sizes:
        return None
    how = g.choice.choice(("right", "left", "vector", "addmm", "slice", "batch"))
    if how == "left":
        return g.call(aten.matmul.default, g.weight(3, sizes[-2]), x) if len(sizes) > 1 else None
    if how == "vector":
        return g.call(aten.matmul.default, x, g.weight(sizes[-1]))
    if how == "batch":
        if len(sizes) != 3:
            return None
        weight = g.weight(sizes[0], sizes[-1], 4)
        if g.maybe():
            return g.call(aten.bmm.default, x, weight)
        added = g.weight(*g.choice.choice(((4,), (1, 1, 4), (sizes[0], sizes[1], 4))))
        return g.call(aten.baddbmm.default, added, x, weight)
    if how == "addmm":
        flat = g.reshape(x, -1, sizes[-1])
        return g.call(aten.addmm.default, g.weight(6), flat, g.weight(sizes[-1], 6))
    weight = g.weight(sizes[-1] + 2 * (how == "slice"), 6)
    if how == "slice":
        weight = g.call(aten.slice.Tensor, weight, 0, 1, sizes[-1] + 1)
    return g.call(aten.matmul.default, x, weight)


@construct("products")
def scores(g: Grown, x: fx.Node) -> fx.Node | None:
    """Two values of one width, each row with each."""
    other = g.another(lambda v: len(shape(v)) == len(shape(x)) and shape(v)[-1:] == shape(x)[-1:])
    if other is None or len(shape(x)) < 2 or shape(other)[:-2] != shape(x)[:-2]:
        return None
    return g.call(aten.matmul.default, x, g.call(aten.transpose.int, other, -1, -2))


@construct("products")
def mlp(g: Grown, x: fx.Node) -> fx.Node | None:
    """Gate and up, in one matrix or in two."""
    if not shape(x):
        return None
    width, inner = shape(x)[-1], g.width()
    if g.maybe():
        both = g.call(aten.linear.default, x, g.weight(2 * inner, width))
        gate, up = g.pieces(g.call(aten.chunk.default, both, 2, -1))
    else:
        gate, up = (g.call(aten.linear.default, x, g.weight(inner, width)) for _ in range(2))
    gate = g.call(g.choice.choice((aten.silu.default, aten.relu.default)), gate)
    hidden = g.call(aten.mul.Tensor, gate, up)
    return g.call(aten.linear.default, hidden, g.weight(width, inner))


def heads(g: Grown, x: fx.Node, n: int, width: int) -> fx.Node:
    """A projection in heads, `[b, h, t, d]`."""
    b, t, _ = shape(x)
    bias = g.weight(n * width) if g.maybe(0.3) else None
    y = g.call(aten.linear.default, x, g.weight(n * width, shape(x)[-1]), bias)
    return g.call(aten.transpose.int, g.reshape(y, b, t, n, width), 1, 2)


@construct("attention")
def attention(g: Grown, x: fx.Node) -> fx.Node | None:
    if len(shape(x)) != 3:
        return None
    b, t, width = shape(x)
    many, few = g.choice.choice(((2, 1), (2, 2), (4, 2), (3, 3)))
    head = g.choice.choice((2, 3, 4))
    memory = g.another(lambda v: len(shape(v)) == 3 and shape(v)[0] == b) if g.maybe(0.3) else x
    memory = x if memory is None else memory
    q, k, v = heads(g, x, many, head), heads(g, memory, few, head), heads(g, memory, few, head)
    if head % 2 == 0 and g.maybe(0.3):
        q, k = rotated(g, q), rotated(g, k)
    if many != few and g.maybe():
        k, v = (g.call(REPEAT_HEADS, y, many // few) for y in (k, v))
    mask, causal, grouped = None, g.maybe(0.2), shape(k)[1] != many
    if not causal and g.maybe(0.3):
        own = g.choice.choice(((t, shape(k)[2]), (many, 1, 1), (1, shape(k)[2])))
        mask = g.weight(*own)
    y = g.call(
        aten.scaled_dot_product_attention.default,
        *(q, k, v, mask, 0.0, causal),
        enable_gqa=grouped,
    )
    y = g.reshape(g.call(aten.transpose.int, y, 1, 2), b, t, many * head)
    return g.call(aten.linear.default, y, g.weight(width, many * head))


@construct("attention")
def spelled(g: Grown, x: fx.Node) -> fx.Node | None:
    """The same by products and a softmax, perhaps over the wrong axis."""
    if len(shape(x)) != 3:
        return None
    q, k, v = (heads(g, x, 2, 3) for _ in range(3))
    weights = g.call(aten.matmul.default, q, g.call(aten.transpose.int, k, -1, -2))
    weights = g.call(aten.softmax.int, weights, g.choice.choice((-1, -1, -2, 1)))
    y = g.call(aten.matmul.default, weights, v)
    y = g.reshape(g.call(aten.transpose.int, y, 1, 2), *shape(x)[:2], 6)
    return g.call(aten.linear.default, y, g.weight(shape(x)[-1], 6))


def rotated(g: Grown, x: fx.Node) -> fx.Node:
    t, d = shape(x)[-2:]
    angles = torch.outer(torch.arange(t).double(), 0.5 ** torch.arange(d // 2).double())
    turns = torch.cat((angles, angles), -1)
    interleaved = g.maybe()
    if interleaved:
        turns = angles.repeat_interleave(2, -1)
    return g.call(ROTARY, x, g.constant(turns.cos()), g.constant(turns.sin()), interleaved)


@construct("structure")
def turned(g: Grown, x: fx.Node) -> fx.Node | None:
    """Rotary positions on a projection, read by a product with another or by a layer."""
    if len(shape(x)) != 3:
        return None
    q, k = (rotated(g, heads(g, x, 2, 4)) for _ in range(2))
    if g.maybe(0.3):
        return g.call(aten.linear.default, q, g.weight(3, 4))
    return g.call(aten.matmul.default, q, g.call(aten.transpose.int, k, -1, -2))


@construct("structure")
def several(g: Grown, x: fx.Node) -> fx.Node | None:
    """Heads that are repeated and read head by head."""
    if len(shape(x)) != 3:
        return None
    y = g.call(REPEAT_HEADS, heads(g, x, g.choice.choice((1, 2)), 3), 2)
    y = g.call(aten.transpose.int, y, 1, 2)
    y = g.reshape(y, *shape(y)[:2], shape(y)[2] * 3)
    return g.call(aten.linear.default, y, g.weight(4, shape(y)[-1]))


@construct("along")
def padded(g: Grown, x: fx.Node) -> fx.Node | None:
    """Tokens of a constant between two layers."""
    if len(shape(x)) != 3:
        return None
    y = g.call(aten.linear.default, x, g.weight(4, shape(x)[-1]))
    y = g.call(aten.constant_pad_nd.default, y, [0, 0, 1, 0], g.choice.choice((0.0, 1.5)))
    return g.call(aten.linear.default, y, g.weight(shape(x)[-1], 4))


@construct("convolutions")
def convolved(g: Grown, x: fx.Node) -> fx.Node | None:
    """Forwards or backwards, all channels at once, in groups, or each by itself."""
    if len(shape(x)) not in (3, 4):
        return None
    planes, backwards = len(shape(x)) - 2, g.maybe(0.25)
    channels, groups = shape(x)[1], 1
    if g.maybe(0.4):
        groups = g.choice.choice([n for n in range(1, channels + 1) if channels % n == 0])
    out = groups * g.choice.choice((1, 2)) if groups > 1 else g.width()
    bias = g.weight(out) if g.maybe() else None
    kernel = [g.choice.choice((1, min(2, n))) for n in shape(x)[2:]]
    ones, zeros = [1] * planes, [0] * planes
    if backwards:
        weight = g.weight(channels, out // groups, *kernel)
        back = aten.conv_transpose1d.default if planes == 1 else aten.conv_transpose2d.input
        return g.call(back, x, weight, bias, ones, zeros, zeros, groups)
    target = aten.conv1d.default if planes == 1 else aten.conv2d.default
    weight = g.weight(out, channels // groups, *kernel)
    return g.call(target, x, weight, bias, ones, zeros, ones, groups)


@construct("convolutions")
def mixed_in_groups(g: Grown, x: fx.Node) -> fx.Node | None:
    """1 x 1 between two convolutions in groups, of one weight for all groups or one for each."""
    if len(shape(x)) != 3:
        return None
    width, groups = g.choice.choice((2, 3)), g.choice.choice((2, 3))
    y = g.call(aten.conv1d.default, x, g.weight(width * groups, shape(x)[1], 1), None)
    if g.maybe():
        back = g.weight(width * groups, 2, 1)
        return g.call(aten.conv_transpose1d.default, y, back, None, [1], [0], [0], groups)
    weight = g.weight(groups * 2, width, 1)
    return g.call(aten.conv1d.default, y, weight, None, [1], [0], [1], groups)


@construct("convolutions")
def tokens_convolved(g: Grown, x: fx.Node) -> fx.Node | None:
    """Over places of `[b, t, d]`, and back, perhaps added to what it was made of."""
    if len(shape(x)) != 3:
        return None
    width = shape(x)[-1]
    y = g.call(aten.transpose.int, x, 1, 2)
    y = g.call(aten.conv1d.default, y, g.weight(width, width, 3), g.weight(width), [1], [1])
    y = g.call(aten.transpose.int, y, 1, 2)
    return g.call(aten.add.Tensor, x, y) if g.maybe() else y


EQUATIONS = (
    *("btd,de->bte", "btd,dhe->bhte", "btd,ed->bte", "btd,d->btd", "btd,t->bd", "btd->bd"),
    *("btd,edi->btei", "btd,btd->bt", "btd,bsd->bts", "btd,bse->bts", "btd,b->btd", "btd,td->btd"),
    *("btd,bd->bt", "btt->bt", "btd,->btd", "...d,de->...e", "btd,de,ef->btf", "btd,btd->btd"),
)


@construct("einsum")
def summed(g: Grown, x: fx.Node) -> fx.Node | None:
    if len(shape(x)) != 3:
        return None
    equation = g.choice.choice(EQUATIONS)
    sizes = dict(zip("btd", shape(x), strict=True)) | {"e": 3, "h": 2, "i": 4, "s": 5, "f": 2}
    terms = equation.split("->")[0].split(",")
    if terms[0] == "btt" and shape(x)[1] != shape(x)[2]:
        return None
    operands = [x]
    for term in terms[1:]:
        own = tuple(sizes[letter] for letter in term)
        value = g.another(lambda v, own=own: shape(v) == own)
        operands.append(value if value is not None and g.maybe() else g.weight(*own))
    return g.call(aten.einsum.default, equation, operands)


@construct("einsum")
def experts(g: Grown, x: fx.Node) -> fx.Node | None:
    """Stacked experts: all of them, weighed by a router, or those of an index."""
    if len(shape(x)) != 3:
        return None
    width, inner, e = shape(x)[-1], g.width(), 3
    if g.maybe(0.3):
        flat = g.reshape(x, -1, width)
        chosen = g.constant(torch.randint(e, (shape(flat)[0],), generator=g._noise))
        own = g.call(aten.index.Tensor, g.weight(e, width, inner), [chosen])
        y = g.call(aten.bmm.default, g.call(aten.unsqueeze.default, flat, 1), own)
        back = g.call(aten.index.Tensor, g.weight(e, inner, width), [chosen])
        return g.reshape(g.call(aten.bmm.default, y, back), *shape(x))
    weights = g.call(aten.linear.default, x, g.weight(e, width))
    weights = g.call(aten.softmax.int, weights, -1)
    y = g.call(aten.einsum.default, "btd,edi->btei", [x, g.weight(e, width, inner)])
    y = g.call(aten.gelu.default, y) if g.maybe() else y
    y = g.call(aten.einsum.default, "btei,eid->bted", [y, g.weight(e, inner, width)])
    return g.call(aten.einsum.default, "bted,bte->btd", [y, weights])


def across(g: Grown, x: fx.Node, how: str) -> fx.Node | None:
    """Something that mixes heads, perhaps added to what it mixes: all share one basis."""
    if len(shape(x)) != 3:
        return None
    n, width = g.choice.choice(((2, 3), (3, 2), (3, 4)))
    y = g.call(aten.transpose.int, heads(g, x, n, width), 1, 3)
    if how == "products":
        z = g.call(aten.linear.default, y, g.weight(n, n))
    elif how == "convolutions":
        z = g.reshape(g.call(aten.transpose.int, y, -1, -2), -1, n, shape(y)[2])
        z = g.call(aten.conv1d.default, z, g.weight(n, n, 1))
        z = g.call(aten.transpose.int, g.reshape(z, *shape(y)[:2], n, shape(y)[2]), -1, -2)
    elif how == "norms":
        z = g.call(aten.rms_norm.default, y, [n], None, 1e-2)
    elif how == "along":
        z = g.call(aten.cumsum.default, y, -1) if g.maybe() else g.call(aten.flip.default, y, [-1])
    elif how == "einsum":
        z = g.call(aten.einsum.default, "bdth,hi->bdti", [y, g.weight(n, n)])
    elif g.maybe():
        z = g.call(aten.softmax.int, y, -1)
    else:
        z = g.call(aten.sub.Tensor, y, g.call(aten.mean.dim, y, [-1], True))
    y = g.call(aten.add.Tensor, y, z) if g.maybe(0.7) else z
    y = g.reshape(g.call(aten.transpose.int, y, 1, 3), shape(x)[0], n, shape(x)[1], width)
    y = g.reshape(g.call(aten.transpose.int, y, 1, 2), *shape(x)[:2], n * width)
    return g.call(aten.linear.default, y, g.weight(shape(x)[-1], n * width))


for family in ("along", "convolutions", "einsum", "elementwise", "norms", "products"):
    construct(family)(functools.partial(across, how=family))


@construct("views")
def moved_between(g: Grown, x: fx.Node) -> fx.Node | None:
    """Entries that are joined, or one that is repeated, between two layers."""
    if len(shape(x)) != 3:
        return None
    b, t, width = shape(x)
    if g.maybe():
        one = g.call(aten.linear.default, x, g.weight(1, width))
        y = g.call(aten.expand.default, one, [b, t, 4])
    else:
        both = [g.call(aten.linear.default, x, g.weight(4, width)) for _ in range(2)]
        y = g.call(g.choice.choice((aten.cat.default, aten.stack.default)), both, 1)
    return g.call(aten.linear.default, y, g.weight(width, 4))

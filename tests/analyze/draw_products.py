"""With which arguments are operators that compute values called?"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from qpass.ops.structure import REPEAT_HEADS, ROTARY
from tests.analyze.calls import Call
from tests.analyze.draws import SIZES, Draw, axis, draws, narrowed, shape, tensor

aten = torch.ops.aten

NUMBERS = st.sampled_from((-2.5, 0.5, 3.0))


@draws(
    aten.silu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.cos.default,
    aten.sin.default,
    aten.abs.default,
    aten.mish.default,
    aten.selu.default,
    aten.celu.default,
    aten.square.default,
    aten.sign.default,
    aten.expm1.default,
    aten.log_sigmoid.default,
    aten.erf.default,
    aten.atan.default,
    aten.sinh.default,
    aten.asinh.default,
    aten.softshrink.default,
    aten.relu.default,
    aten.neg.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
)
def _unary(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)),))


@draws(
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.reciprocal.default,
    aten.log.default,
    aten.log1p.default,
)
def _positive(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw), positive=True),))


@draws(aten.hardswish.default, aten.hardsigmoid.default, aten.relu6.default)
def _bounded(draw: Draw, target: Any) -> Call:
    return Call(target, (9 * tensor(draw, shape(draw)),))


@draws(aten.logit.default)
def _logit(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)), 0.1))


@draws(aten.maximum.default, aten.minimum.default)
def _extreme(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    return Call(target, (tensor(draw, full), tensor(draw, narrowed(draw, full))))


@draws(aten.rsub.Scalar)
def _subtract_from(draw: Draw, target: Any) -> Call:
    number = draw(st.sampled_from((0, 1, 2.5, -1.0)))
    return Call(target, (tensor(draw, shape(draw)), number))


@draws(aten.linalg_vector_norm.default)
def _length(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dims = draw(st.lists(st.integers(0, len(full) - 1), unique=True, min_size=1, max_size=2))
    order = draw(st.sampled_from((2, 2, 1, 3.0)))
    dims = draw(st.sampled_from((None, dims, dims)))
    return Call(target, (tensor(draw, full), order, dims, draw(st.booleans())))


@draws(aten.gelu.default)
def _gelu(draw: Draw, target: Any) -> Call:
    how = draw(st.sampled_from(("none", "tanh")))
    return Call(target, (tensor(draw, shape(draw)),), {"approximate": how})


@draws(aten.softplus.default, aten.elu.default, aten.leaky_relu.default)
def _shaped(draw: Draw, target: Any) -> Call:
    options = draw(st.sampled_from(((), (0.3,))))
    return Call(target, (tensor(draw, shape(draw)), *options))


@draws(aten.clamp.default)
def _clamp(draw: Draw, target: Any) -> Call:
    low, high = draw(
        st.sampled_from(((-0.3, None), (None, 0.4), (-0.3, 0.4), (-0.4, 0.4), (0, None)))
    )
    return Call(target, (tensor(draw, shape(draw)), low, high))


@draws(aten.pow.Tensor_Scalar)
def _power(draw: Draw, target: Any) -> Call:
    exponent = draw(st.sampled_from((2, 3, 2.0, 0.5, -1.5, 0)))
    whole = float(exponent).is_integer()
    return Call(target, (tensor(draw, shape(draw), positive=not whole), exponent))


@draws(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
def _binary(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    kwargs = {}
    if target in (aten.add.Tensor, aten.sub.Tensor) and draw(st.booleans()):
        kwargs = {"alpha": draw(NUMBERS)}
    left, right = tensor(draw, full), tensor(draw, narrowed(draw, full), positive=True)
    kind = draw(st.sampled_from(("two", "swapped", "number", "twice", "integers", "mask")))
    if kind == "integers":
        right = 1 + torch.arange(right.numel()).reshape(right.shape)
    elif kind == "mask" and target in (aten.add.Tensor, aten.mul.Tensor):
        right = right > 1
    if kind == "number":
        return Call(target, (left, draw(NUMBERS)), kwargs)
    if kind == "integers" and draw(st.booleans()):
        left, right = right, 0.5 + left.abs()
    if kind == "twice" and target is not aten.div.Tensor:
        return Call(target, (left, left), kwargs)
    pair = (right, left) if kind == "swapped" and target is not aten.div.Tensor else (left, right)
    return Call(target, pair, kwargs)


@draws(aten.add_.Tensor, aten.mul_.Tensor)
def _in_place(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    return Call(target, (tensor(draw, full), tensor(draw, narrowed(draw, full))))


@draws(aten.mul.Scalar, aten.div.Scalar)
def _by_number(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)), draw(NUMBERS)))


@draws(aten.softmax.int)
def _softmax(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dtype = draw(st.sampled_from((None, torch.float64)))
    return Call(target, (tensor(draw, full), axis(draw, len(full)), dtype))


@draws(aten._softmax.default)
def _inner_softmax(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    return Call(target, (tensor(draw, full), axis(draw, len(full)), False))


@draws(aten.mean.dim, aten.sum.dim_IntList)
def _reduce(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    dims = draw(st.lists(st.integers(0, len(full) - 1), unique=True, max_size=2))
    dims = [d - len(full) if draw(st.booleans()) else d for d in dims]
    every = dims if dims else draw(st.sampled_from((None, [])))
    return Call(target, (tensor(draw, full), every), {"keepdim": draw(st.booleans())})


@draws(aten.rms_norm.default, aten.layer_norm.default)
def _norm(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    own = list(full[-draw(st.integers(1, min(2, len(full)))) :])
    names = ["weight"] if target is aten.rms_norm.default else ["weight", "bias"]
    kwargs, neutral = {}, set()
    for name in names:
        kind = draw(st.sampled_from(("absent", "given", "folded")))
        if kind == "given":
            kwargs[name] = tensor(draw, tuple(own))
        elif kind == "folded":
            kwargs[name] = torch.full(tuple(own), float(name == "weight"), dtype=torch.float64)
            neutral.add(name)
    return Call(target, (tensor(draw, full), own), kwargs | {"eps": 0.1}, frozenset(neutral))


@draws(aten.linear.default)
def _linear(draw: Draw, target: Any) -> Call:
    full = shape(draw, 1)
    if draw(st.integers(0, 5)) == 5:
        return Call(target, (tensor(draw, full), tensor(draw, full[-1:])))
    rows = draw(st.sampled_from(SIZES))
    weight = tensor(draw, (rows, full[-1]))
    bias = (tensor(draw, (rows,)),) if draw(st.booleans()) else ()
    if len(full) == 2 and full[0] == full[1] == rows and draw(st.booleans()):
        return Call(target, (weight, weight, *bias))
    return Call(target, (tensor(draw, full), weight, *bias))


@draws(aten.addmm.default)
def _addmm(draw: Draw, target: Any) -> Call:
    m, k, n = shape(draw, 3, 3)
    kwargs = {"alpha": draw(NUMBERS), "beta": draw(NUMBERS)} if draw(st.booleans()) else {}
    added = narrowed(draw, (m, n))
    return Call(target, (tensor(draw, added), tensor(draw, (m, k)), tensor(draw, (k, n))), kwargs)


@draws(aten.mm.default)
def _mm(draw: Draw, target: Any) -> Call:
    m, k, n = shape(draw, 3, 3)
    left = tensor(draw, (m, k))
    twice = m == k == n and draw(st.booleans())
    return Call(target, (left, left if twice else tensor(draw, (k, n))))


@draws(aten.bmm.default)
def _bmm(draw: Draw, target: Any) -> Call:
    b, m, k, n = shape(draw, 4, 4)
    return Call(target, (tensor(draw, (b, m, k)), tensor(draw, (b, k, n))))


@draws(aten.baddbmm.default)
def _baddbmm(draw: Draw, target: Any) -> Call:
    b, m, k, n = shape(draw, 4, 4)
    kwargs = {"alpha": draw(NUMBERS), "beta": draw(NUMBERS)} if draw(st.booleans()) else {}
    operands = (tensor(draw, s) for s in (narrowed(draw, (b, m, n)), (b, m, k), (b, k, n)))
    return Call(target, tuple(operands), kwargs)


@draws(aten.matmul.default)
def _matmul(draw: Draw, target: Any) -> Call:
    batch = shape(draw, 0, 2)
    m, k, n = shape(draw, 3, 3)
    left, right = (*narrowed(draw, batch), m, k), (*batch, k, n)
    kind = draw(st.sampled_from(("left", "right", "left vector", "right vector")))
    if kind == "right":
        left, right = (*batch, m, k), (*narrowed(draw, batch), k, n)
    if kind == "left vector":
        left = (k,)
    if kind == "right vector":
        left, right = (*batch, m, k), (k,)
    return Call(target, (tensor(draw, left), tensor(draw, right)))


@draws(aten.embedding.default)
def _embedding(draw: Draw, target: Any) -> Call:
    rows, width = shape(draw, 2, 2)
    where = shape(draw, 0, 3)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return Call(
        target, (tensor(draw, (rows, width)), torch.randint(rows, where, generator=generator))
    )


@draws(aten.scaled_dot_product_attention.default)
def _attention(draw: Draw, target: Any) -> Call:
    batch = shape(draw, 0, 2)
    s, t, e, f = shape(draw, 4, 4)
    kwargs: dict[str, Any] = {}
    if draw(st.booleans()):
        kwargs["scale"] = 0.7
    many, few = batch, batch
    if len(batch) == 2 and draw(st.booleans()):
        few = (batch[0], draw(st.sampled_from([n for n in SIZES if batch[1] % n == 0])))
        kwargs["enable_gqa"] = True
    elif draw(st.booleans()):
        few = tuple(1 if draw(st.booleans()) else n for n in batch)
    q, k, v = (tensor(draw, shape_) for shape_ in ((*many, s, e), (*few, t, e), (*few, t, f)))
    mask = draw(st.sampled_from(("none", "causal", "real", "yes or no")))
    if mask == "causal":
        kwargs["is_causal"] = True
    elif mask != "none":
        size = (*(1 if draw(st.booleans()) else n for n in batch), s, t)
        made = tensor(draw, size[draw(st.integers(0, len(batch))) :])
        # at least one key stays visible to each query
        kwargs["attn_mask"] = made if mask == "real" else (made > 0.5) | (torch.arange(t) == 0)
    return Call(target, (q, k, v), kwargs)


@draws(ROTARY)
def _rotary(draw: Draw, target: Any) -> Call:
    x = (*shape(draw, 0, 3), draw(st.sampled_from((2, 6, 12))))
    half = tensor(draw, (*narrowed(draw, x[:-1]), x[-1] // 2))
    interleaved = draw(st.booleans())
    angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    return Call(target, (tensor(draw, x), angles.cos(), angles.sin(), interleaved))


@draws(REPEAT_HEADS)
def _repeat_heads(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw, 4, 4)), draw(st.sampled_from((1, 2, 3)))))


def _convolved(draw: Draw, places: int) -> tuple[list[Tensor], int]:
    groups = draw(st.sampled_from((1, 1, 1, 2)))
    made, taken = draw(st.sampled_from(((3, 5), (6, 2), (1, 3))))
    x = (taken * groups, *((5,) * places))
    batch = () if draw(st.booleans()) else (draw(st.sampled_from(SIZES)),)
    operands = [tensor(draw, (*batch, *x)), tensor(draw, (made * groups, taken, *((2,) * places)))]
    if draw(st.booleans()):
        operands.append(tensor(draw, (made * groups,)))
    return operands, groups


@draws(
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
def _convolution(draw: Draw, target: Any) -> Call:
    operands, groups = _convolved(draw, int(str(target)[len("aten.conv")]))
    named = target._overloadname == "padding"
    padding = draw(st.sampled_from(("same", "valid") if named else (0, 1)))
    padding = padding if named else [padding]
    return Call(target, tuple(operands), {"padding": padding, "groups": groups})


@draws(
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
def _transposed_convolution(draw: Draw, target: Any) -> Call:
    (x, weight, *bias), groups = _convolved(draw, int(str(target)[len("aten.conv_transpose")]))
    # transposed weights are stored [in, out of a group]
    made, taken, *sizes = weight.shape
    kernel = tensor(draw, (taken * groups, made // groups, *sizes))
    return Call(target, (x, kernel, *bias), {"groups": groups, "stride": [2]})


@draws(aten.convolution.default)
def _inner_convolution(draw: Draw, target: Any) -> Call:
    operands, groups = _convolved(draw, 2)
    x = operands[0] if operands[0].dim() == 4 else operands[0][None]
    weight, bias = operands[1], operands[2] if len(operands) > 2 else None
    if draw(st.booleans()) and groups == 1:
        # transposed weights are stored [in, out]
        return Call(
            target,
            (x, weight.transpose(0, 1).contiguous(), bias, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
        )
    return Call(target, (x, weight, bias, [1, 2], [1, 0], [1, 1], False, [0, 0], groups))

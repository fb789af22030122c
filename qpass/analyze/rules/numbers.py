"""Numbers of entries: picked, sorted, counted and looked up by.

These rules come before all others where permutations are solved for, and say whether they apply.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from qpass.analyze.atoms import Axis, factors, find, fresh, length, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.numbers import Kind, Numbers, Order
from qpass.analyze.rules.base import find_rule, number_rule
from qpass.analyze.rules.views import COPIES, MOVES, PERMUTES, RESHAPES
from qpass.ir import read

aten = torch.ops.aten


# -- where numbers come from


@number_rule(aten.topk.default)
def _largest(node: fx.Node, c: Constraints) -> bool:
    """The largest entries of an axis, and their numbers; where entries are equal, any will do."""
    source = read.value(node, "self")
    if not _plain(source, c):
        return False
    layout = c.layout(source)
    dim = read.integer(node, "dim") % len(layout)
    values = cast("tuple[torch.Tensor, ...]", node.meta["val"])[0]
    picked = fresh(size_of(values.shape[dim]))
    if read.argument(node, "sorted") is True:
        c.pin(picked, "is sorted by size")
    elif picked:
        rows = (*layout[:dim], *layout[dim + 1 :])
        c.orders.append(Order(picked, (layout[dim],), node.name, rows))
    c.mix(layout, dim)
    out = (*layout[:dim], picked, *layout[dim + 1 :])
    c.pieces[node] = ((out, None), (out, Numbers(layout[dim], node)))
    return True


@number_rule(aten.argmax.default)
def _number_of_largest(node: fx.Node, c: Constraints) -> bool:
    source, given = read.value(node, "self"), read.argument(node, "dim")
    if not _plain(source, c) or not isinstance(given, int):
        return False
    layout = c.layout(source)
    dim = given % len(layout)
    kept = ((),) if read.argument(node, "keepdim") is True else ()
    c.mix(layout, dim)
    _give(node, (*layout[:dim], *kept, *layout[dim + 1 :]), Numbers(layout[dim], node), c)
    return True


@number_rule(aten.arange.default)
def _count_up(node: fx.Node, c: Constraints) -> bool:
    if read.is_floating(node):
        return False
    axis = fresh(size_of(read.shape(node)[0]))
    _give(node, (axis,), Numbers(axis, node, once=True), c)
    return True


@number_rule(operator.getitem)
def _take(node: fx.Node, c: Constraints) -> bool:
    source, index = cast("tuple[fx.Node, int]", node.args)
    if source not in c.pieces:
        return False
    layout, numbers = c.pieces[source][index]
    if numbers is None:
        c.give(node, layout)
    else:
        _give(node, layout, numbers, c)
    return True


# -- numbers that move, are sorted and are counted


@number_rule(*MOVES)
def _moved(node: fx.Node, c: Constraints) -> bool:
    sources = [n for n in node.all_input_nodes if read.fake(n) is not None]
    found, rule = c.numbers.get(sources[0]) if sources else None, find_rule(node.target)
    if found is None or len(sources) > 1 or rule is None or node.target is operator.getitem:
        return False
    if read.calls(node, *COPIES):
        if found.kind is Kind.MARKS and read.is_floating(node):
            c.give(node, c.layout(sources[0]))
            return True
        if read.dtype(node) is torch.bool:
            return False
        _give(node, c.layout(sources[0]), found, c)
        return True
    if not read.calls(node, *RESHAPES, *PERMUTES):
        # some of them, or some of them several times
        if found.kind is not Kind.NUMBERS:
            return False
        found = Numbers(found.axis, node)
    c.numbers[node] = found
    rule(node, c)
    return True


@number_rule(aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
def _sorted(node: fx.Node, c: Constraints) -> bool:
    source = read.value(node, "self")
    found, layout = _numbers(source, c), c.layout(source)
    if found is None or len(layout) != 1 or read.argument(node, "descending") is True:
        return False
    order = fresh(length(layout[0]))
    c.orders.append(Order(order, (found.axis, layout[0]), node.name, root=found.root))
    places = Numbers(layout[0], node, once=True)
    if read.calls(node, aten.sort.default, aten.sort.stable):
        c.pieces[node] = (((order,), found), ((order,), places))
    else:
        _give(node, (order,), places, c)
    return True


@number_rule(aten.floor_divide.default)
def _divided(node: fx.Node, c: Constraints) -> bool:
    """The numbers of entries of an axis `(n, k)`, divided by `k`, are those of `n`."""
    found, by = _numbers(read.value(node, "self"), c), read.argument(node, "other")
    if found is None or not isinstance(by, int):
        return False
    outer, rest = factors(found.axis), by
    while rest != 1 and outer:
        size = find(outer.pop()).atom.size
        if not isinstance(size, int) or rest % size:
            return False
        rest //= size
    if rest != 1:
        return False
    _give(node, c.layout(read.value(node, "self")), Numbers(tuple(outer), node), c)
    return True


@number_rule(aten.histc.default)
def _counted(node: fx.Node, c: Constraints) -> bool:
    source, bins = read.value(node, "self"), read.integer(node, "bins")
    found, layout = _numbers(source, c), c.layout(source)
    ends = read.number(node, "min"), read.number(node, "max")
    if found is None or bins != length(found.axis) or ends not in ((0, bins - 1), (0, bins)):
        return False
    for dim in range(len(layout)):
        c.mix(layout, dim)
    _give(node, (found.axis,), Numbers(found.axis, found.root, Kind.COUNTS), c)
    return True


@number_rule(aten.one_hot.default)
def _marked(node: fx.Node, c: Constraints) -> bool:
    source, count = read.value(node, "self"), read.integer(node, "num_classes")
    found = _numbers(source, c)
    if found is None or count != length(found.axis):
        return False
    out = (*c.layout(source), found.axis)
    _give(node, out, Numbers(found.axis, found.root, Kind.MARKS), c)
    return True


@number_rule(aten.sum.dim_IntList)
def _marks_counted(node: fx.Node, c: Constraints) -> bool:
    source = read.value(node, "self")
    found, layout = c.numbers.get(source), c.layout(source)
    dims = [int(cast("int", d)) % len(layout) for d in read.sizes(node, "dim")]
    left = [axis for dim, axis in enumerate(layout) if dim not in dims]
    if found is None or found.kind is not Kind.MARKS or left != [found.axis]:
        return False
    for dim in dims:
        c.mix(layout, dim)
    _give(node, left, Numbers(found.axis, found.root, Kind.COUNTS), c)
    return True


@number_rule(aten.cumsum.default)
def _ends(node: fx.Node, c: Constraints) -> bool:
    source = read.value(node, "self")
    found = c.numbers.get(source)
    if found is None or found.kind is not Kind.COUNTS or len(c.layout(source)) != 1:
        return False
    _give(node, c.layout(source), Numbers(found.axis, found.root, Kind.ENDS), c)
    return True


# -- what is looked up by number


@number_rule(aten.index.Tensor)
def _looked_up(node: fx.Node, c: Constraints) -> bool:
    indices = read.optional_values(node, "indices")
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    return len(given) == 1 and _pick(node, *given[0], c)


@number_rule(aten.index_select.default)
def _selected(node: fx.Node, c: Constraints) -> bool:
    dim = read.integer(node, "dim") % len(read.shape(read.value(node, "self")))
    return _pick(node, dim, read.value(node, "index"), c)


@number_rule(aten.embedding.default)
def _embedded(node: fx.Node, c: Constraints) -> bool:
    return _pick(node, 0, read.value(node, "indices"), c)


def _pick(node: fx.Node, dim: int, index: fx.Node, c: Constraints) -> bool:
    """The entries of an axis that numbers name."""
    source = read.value(node, "weight" if read.has(node, "weight") else "self")
    found, own = _numbers(index, c), c.numbers.get(source)
    if found is None or not (_plain(source, c) or _numbers(source, c)):
        return False
    layout = c.layout(source)
    c.tie(layout[dim], found.axis)
    out = (*layout[:dim], *c.layout(index), *layout[dim + 1 :])
    if own is None:
        c.give(node, out)
    else:
        # each number once, so they are the same numbers
        root, once = (own.root, own.once) if found.once else (node, False)
        _give(node, out, Numbers(own.axis, root, once=once), c)
    return True


@number_rule(aten.index_put.default)
def _put_back(node: fx.Node, c: Constraints) -> bool:
    """Numbers written to the places that others name: each is written once, so nothing is left."""
    indices, values = read.optional_values(node, "indices"), read.value(node, "values")
    put = _numbers(values, c)
    if len(indices) != 1 or indices[0] is None or put is None:
        return False
    found = _numbers(indices[0], c)
    if found is None or not found.once or len(c.layout(indices[0])) != 1:
        return False
    if read.argument(node, "accumulate") is True or len(c.layout(values)) != 1:
        return False
    c.tie(c.layout(values)[0], c.layout(indices[0])[0])
    _give(node, (found.axis,), Numbers(put.axis, node, once=put.once), c)
    return True


@number_rule(aten.index_add.default)
def _added(node: fx.Node, c: Constraints) -> bool:
    into, index = read.value(node, "self"), read.value(node, "index")
    source, found = read.value(node, "source"), _numbers(index, c)
    if found is None or not (_plain(into, c) and _plain(source, c)):
        return False
    own, added = c.layout(into), c.layout(source)
    dim = read.integer(node, "dim") % len(own)
    for i, (axis, other) in enumerate(zip(own, added, strict=True)):
        c.tie(axis, found.axis if i == dim else other)
    c.tie(added[dim], *c.layout(index))
    c.give(node, own)
    return True


@number_rule(aten.gather.default)
def _gathered(node: fx.Node, c: Constraints) -> bool:
    source, index = read.value(node, "self"), read.value(node, "index")
    found = _numbers(index, c)
    if found is None or not _plain(source, c):
        return False
    _across(node, source, index, found, c)
    c.give(node, c.layout(index))
    return True


@number_rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def _scattered(node: fx.Node, c: Constraints) -> bool:
    into, index = read.value(node, "self"), read.value(node, "index")
    found = _numbers(index, c)
    put = None if node.target is aten.scatter.value else read.value(node, "src")
    if found is None or not all(_plain(n, c) for n in (into, put) if n is not None):
        return False
    if node.target is aten.scatter.src and not _distinct(node, found, c):
        return False
    _across(node, into, index, found, c)
    if put is not None:
        for i, axis in enumerate(c.layout(put)):
            if read.same_size(read.shape(put)[i], read.shape(index)[i]):
                c.tie(axis, c.layout(index)[i])
            else:
                c.pin(axis, "is written in part")
                c.pin(c.layout(index)[i], "is written in part")
    c.give(node, c.layout(into))
    return True


def _distinct(node: fx.Node, found: Numbers, c: Constraints) -> bool:
    """Whether no entry is written twice, so that it does not matter which write is last."""
    index = c.layout(read.value(node, "index"))
    if not read.calls(found.root, aten.topk.default):
        return False
    (picked, _), dim = c.pieces[found.root][1], read.integer(found.root, "dim")
    return index[read.integer(node, "dim") % len(index)] == picked[dim % len(picked)]


def _across(node: fx.Node, value: fx.Node, index: fx.Node, found: Numbers, c: Constraints) -> None:
    """Tie a value to numbers that name entries along `dim`, for each entry of its other axes."""
    dim = read.integer(node, "dim") % len(read.shape(value))
    axes, own = c.layout(value), c.layout(index)
    for i, axis in enumerate(axes):
        if i == dim:
            c.tie(axis, found.axis)
        elif read.same_size(read.shape(value)[i], read.shape(index)[i]):
            c.tie(axis, own[i])
        else:
            c.pin(axis, "is looked up in part")
            c.pin(own[i], "is looked up in part")


@number_rule(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def _grouped_product(node: fx.Node, c: Constraints) -> bool:
    """Rows that are sorted by group, times the matrix of their group."""
    operands = [n for n in node.all_input_nodes if read.is_floating(n)]
    ends = [found for n in node.all_input_nodes if (found := c.numbers.get(n)) is not None]
    if [len(c.layout(n)) for n in operands] != [2, 3] or len(ends) != 1:
        return False
    rows, matrices = (c.layout(n) for n in operands)
    if ends[0].kind is not Kind.ENDS or not _in_order(rows[0], ends[0].root, c):
        return False
    c.tie(matrices[0], ends[0].axis)
    c.contract(rows, 1, matrices, 1)
    c.absorb(operands[1], 1)
    c.give(node, (rows[0], matrices[2]))
    return True


def _in_order(axis: Axis, root: fx.Node, c: Constraints) -> bool:
    """Whether the numbers of `root` are sorted along an axis."""
    (ref,) = axis or (None,)
    if ref is None:
        return False
    orders = [order for order in c.orders if order.root is root]
    return any(find(order.axis[0]).atom is find(ref).atom for order in orders if order.axis)


# -- what the rules share


def _numbers(node: fx.Node, c: Constraints) -> Numbers | None:
    found = c.numbers.get(node)
    return found if found is not None and found.kind is Kind.NUMBERS else None


def _plain(node: fx.Node, c: Constraints) -> bool:
    """Whether a value holds real numbers, and not those of entries."""
    return read.is_floating(node) and node not in c.numbers


def _give(node: fx.Node, layout: Sequence[Axis], numbers: Numbers, c: Constraints) -> None:
    c.numbers[node] = numbers
    c.give(node, layout)

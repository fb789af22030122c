"""Where the entries of a weight meet a value in products, whatever its rank and the operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import fx

from qpass.analyze.matmuls import find_matmuls
from qpass.analyze.rules.einsum import letters
from qpass.ir import Program, read

aten = torch.ops.aten

# where the axes of a weight are in a value that holds its entries; None for those that are not
Where = tuple[int | None, ...]


@final
@dataclass(frozen=True, slots=True)
class Meeting:
    """A product that sums over one axis of a weight and one of a value.

    `reads` is the axis of the use of the weight, `axis` that of the value.
    """

    node: str
    value: str
    axis: int
    use: str
    reads: int


def find_inputs(program: Program) -> dict[str, tuple[Meeting, ...]]:
    """The products that read each use of a weight, plain products of matrices among them."""
    found = find_meetings(program)
    for matmul in find_matmuls(program):
        axis = len(read.shape(program.node(matmul.value))) - 1
        meeting = Meeting(matmul.node, matmul.value, axis, matmul.use, matmul.reads)
        found[matmul.use] = (meeting,)
    return found


def find_meetings(program: Program) -> dict[str, tuple[Meeting, ...]]:
    """The products of each use of a weight which nothing else reads, nor on any other axis.

    What reads it may be a look-up or a slice, of whole rows, that such products read.
    """
    found: dict[str, tuple[Meeting, ...]] = {}
    for node in program.graph.nodes:
        if program.weight(node) is None or len(node.users) == 0 or not read.is_floating(node):
            continue
        rank = len(read.shape(node))
        meetings = _meetings(program, node, node, tuple(range(rank))) if rank > 1 else None
        if meetings and len({m.reads for m in meetings}) == 1:
            found[node.name] = tuple(meetings)
    return found


def _meetings(program: Program, use: fx.Node, held: fx.Node, where: Where) -> list[Meeting] | None:
    """The products of a value that holds entries of a weight; None if that is read otherwise."""
    found: list[Meeting] = []
    for user in held.users:
        if (moved := _moved(user, held, where)) is not None:
            meetings = _meetings(program, use, user, moved)
            if meetings is None:
                return None
            found += meetings
        elif read.calls(user, aten.sym_size.int):
            continue
        else:
            pair = _pair(user, held)
            if pair is None or pair[2] not in where or _holds(program, pair[0]):
                return None
            found.append(Meeting(user.name, pair[0].name, pair[1], use.name, where.index(pair[2])))
    return found


def _holds(program: Program, value: fx.Node) -> bool:
    """Whether a value is a weight itself."""
    return program.weight(value) is not None or not read.is_floating(value)


def _pair(node: fx.Node, weight: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What a product multiplies `weight` by, and the axes of the two that it sums over."""
    if node.all_input_nodes.count(weight) != 1:
        return None
    if read.calls(node, aten.einsum.default):
        return _summed(node, weight)
    names = _OPERANDS.get(node.target) or _OPERANDS.get(_name(node))
    if names is None:
        return None
    left, right = (read.value(node, name) for name in names)
    if left is right or weight not in (left, right):
        return None
    rank, other = len(read.shape(weight)), left if weight is right else right
    if node.target is aten.linear.default:
        return (other, len(read.shape(other)) - 1, 1) if weight is right and rank == 2 else None
    if node.target in _GROUPED or _name(node) in _GROUPED:
        plain = weight is right and rank == 3 and len(read.shape(other)) == 2
        return (other, 1, 1) if plain else None
    if weight is right:
        return (other, len(read.shape(other)) - 1, max(rank - 2, 0))
    return (other, max(len(read.shape(other)) - 2, 0), rank - 1)


_GROUPED = (aten._grouped_mm.default, "transformers::grouped_mm_fallback")

_OPERANDS: dict[object, tuple[str, str]] = {
    aten.linear.default: ("input", "weight"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"),
    aten._grouped_mm.default: ("self", "mat2"),
    "transformers::grouped_mm_fallback": ("input", "weight"),
}


def _name(node: fx.Node) -> str:
    op = read.operator(node)
    return "" if op is None else op._schema.name


def _summed(node: fx.Node, weight: fx.Node) -> tuple[fx.Node, int, int] | None:
    operands = read.values(node, "tensors")
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    equation = str(read.argument(node, "equation"))
    terms, result = letters(equation, [len(read.shape(n)) for n in operands])
    own = operands.index(weight)
    pair = summed(terms, result, own)
    return None if pair is None else (operands[1 - own], *pair)


def summed(terms: list[str], result: str, own: int) -> tuple[int, int] | None:
    """The axes, of the other operand and of the weight, that an einsum of two sums over last."""
    mine, other = terms[own], terms[1 - own]
    if any(len(set(term)) != len(term) for term in terms):
        return None
    both = [letter for letter in mine if letter in other and letter not in result]
    return (other.index(both[-1]), mine.index(both[-1])) if len(both) == 1 else None


def _moved(node: fx.Node, source: fx.Node, where: Where) -> Where | None:
    """Where the axes are in what an operator makes of `source` alone, if it moves whole rows."""
    move = _MOVES.get(node.target)
    if move is None or node.all_input_nodes[0] is not source:
        return None
    places = move(node, source)
    return None if places is None else tuple(None if i is None else places[i] for i in where)


# for each axis of what is moved its place in the result, or None
_Places = tuple[int | None, ...]


def _same(node: fx.Node, source: fx.Node) -> _Places:
    return tuple(range(len(read.shape(source))))


def _permuted(node: fx.Node, source: fx.Node) -> _Places:
    rank = len(read.shape(source))
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(cast("int", dim)) % rank for dim in read.sizes(node, "dims")]
    elif node.target in (aten.transpose.int, aten.swapaxes.default):
        first = "dim" if node.target is aten.transpose.int else "axis"
        a, b = (read.integer(node, f"{first}{side}") % rank for side in (0, 1))
        order[a], order[b] = order[b], order[a]
    elif node.target is aten.numpy_T.default:
        order.reverse()
    elif rank > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return tuple(order.index(axis) for axis in range(rank))


def _without(node: fx.Node, source: fx.Node) -> _Places:
    rank = len(read.shape(source))
    gone = read.integer(node, "dim") % rank
    return tuple(None if i == gone else i - (i > gone) for i in range(rank))


def _squeezed(node: fx.Node, source: fx.Node) -> _Places:
    axis = read.integer(node, "dim") % len(read.shape(source))
    return _without(node, source) if read.shape(source)[axis] == 1 else _same(node, source)


def _cut(node: fx.Node, source: fx.Node) -> _Places:
    rank = len(read.shape(source))
    cut = read.integer(node, "dim") % rank
    return tuple(None if i == cut else i for i in range(rank))


def _lengthened(node: fx.Node, source: fx.Node) -> _Places:
    rank = len(read.shape(source))
    new = read.integer(node, "dim") % (rank + 1)
    return tuple(i + (i >= new) for i in range(rank))


def _expanded(node: fx.Node, source: fx.Node) -> _Places:
    old, new = read.shape(source), read.shape(node)
    ahead = len(new) - len(old)
    kept = (read.same_size(size, new[i + ahead]) for i, size in enumerate(old))
    return tuple(i + ahead if same else None for i, same in enumerate(kept))


def _indexed(node: fx.Node, source: fx.Node) -> _Places | None:
    indices = read.optional_values(node, "indices")
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) != 1 or (index := indices[given[0]]) is None:
        return None
    if read.dtype(index) not in (torch.int64, torch.int32):
        return None
    at, more = given[0], len(read.shape(index)) - 1
    rank = len(read.shape(source))
    return tuple(None if i == at else i + more * (i > at) for i in range(rank))


def _picked(node: fx.Node, source: fx.Node) -> _Places | None:
    # one of the parts that an operator cut its argument into
    return tuple(range(len(read.shape(node))))


_MOVES: dict[object, Callable[[fx.Node, fx.Node], _Places | None]] = {
    **dict.fromkeys(
        (aten.to.dtype, aten.contiguous.default, aten.clone.default, aten.alias.default), _same
    ),
    **dict.fromkeys(
        (
            aten.permute.default,
            aten.transpose.int,
            aten.swapaxes.default,
            aten.t.default,
            aten.mT.default,
            aten.numpy_T.default,
        ),
        _permuted,
    ),
    **dict.fromkeys((aten.select.int, aten.unbind.int), _without),
    aten.squeeze.dim: _squeezed,
    **dict.fromkeys(
        (
            aten.slice.Tensor,
            aten.index_select.default,
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.chunk.default,
        ),
        _cut,
    ),
    aten.unsqueeze.default: _lengthened,
    aten.expand.default: _expanded,
    aten.index.Tensor: _indexed,
    operator.getitem: _picked,
}

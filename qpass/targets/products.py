"""What a product with a held operand sums over, and where an index leaves an axis of it.

A held operand is an object of a given kind that has the shape of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from qpass.analyze.meetings import summed
from qpass.analyze.rules.einsum import letters


@final
@dataclass(frozen=True, slots=True)
class Product:
    """A call of `func` that multiplies what is held, at `mine`, by a tensor, at `theirs`.

    It sums over axis `reads` of the one and `axis` of the other.
    """

    func: Any
    given: tuple[Any, ...]
    named: dict[str, Any]
    mine: int
    theirs: int
    reads: int
    axis: int

    def run(self, held: Tensor, other: Tensor) -> object:
        """The same call with these operands."""
        given = list(self.given)
        given[self.mine], given[self.theirs] = held, other
        return self.func(*given, **self.named)


# what a product is given, up to its two operands
_PRODUCTS: dict[object, tuple[str, ...]] = {
    torch.nn.functional.linear: ("input", "weight"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ("input", "other")),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), ("input", "mat2")),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ("input", "batch1", "batch2")),
}
# rows in groups, each times the matrix of its group
_GROUPED: dict[object, tuple[str, ...]] = {
    getattr(torch, "_grouped_mm", None): ("self", "mat2"),
    "transformers::grouped_mm_fallback": ("input", "weight"),
}


def find_product(
    func: Any,  # noqa: ANN401  whatever torch calls
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: type,
) -> Product | None:
    """The product that a call is, of one operand of `kind` and one tensor; None for others."""
    if func is torch.einsum:
        return _summed(args, kind)
    if func is Tensor.matmul and torch.compiler.is_dynamo_compiling():
        args = _in_order(args, kind)
    names = _PRODUCTS.get(func) or _GROUPED.get(func)
    if names is None:
        names = _GROUPED.get(getattr(func, "_qualified_op_name", ""))
    if names is None:
        return None
    given, named = list(args), dict(kwargs)
    while len(given) < len(names):
        given.append(named.pop(names[len(given)], None))
    first, second = len(names) - 2, len(names) - 1
    held = [i for i, arg in enumerate(given) if isinstance(arg, kind)]
    if held not in ([first], [second]) or any(isinstance(arg, kind) for arg in named.values()):
        return None
    mine, theirs = (second, first) if held == [second] else (first, second)
    if not isinstance(given[theirs], Tensor):
        return None
    right, rank, last = mine == second, given[mine].dim(), given[theirs].dim() - 1
    if func is torch.nn.functional.linear:
        axes = (1, last) if right and rank == 2 else None
    elif func not in _PRODUCTS:
        axes = (1, 1) if right and rank == 3 and last == 1 else None
    elif right:
        axes = (max(rank - 2, 0), last)
    else:
        axes = (rank - 1, max(last - 1, 0))
    return None if axes is None else Product(func, tuple(given), named, mine, theirs, *axes)


def _summed(args: tuple[Any, ...], kind: type) -> Product | None:
    if len(args) != 3 or isinstance(args[1], kind) == isinstance(args[2], kind):
        return None
    mine = 1 if isinstance(args[1], kind) else 2
    terms, result = letters(args[0], [operand.dim() for operand in args[1:]])
    axes = summed(terms, result, mine - 1)
    if axes is None:
        return None
    return Product(torch.einsum, args, {}, mine, 3 - mine, axes[1], axes[0])


def _in_order(args: tuple[Any, ...], kind: type) -> tuple[Any, ...]:
    """The operands of `@` as they stood: dynamo has those of `held @ x` the other way round."""
    if len(args) != 2 or isinstance(args[0], kind) or not isinstance(args[1], kind):
        return args
    x, held = args[0], args[1]
    if held.dim() < 2:  # type: ignore[attr-defined]
        return args
    plain = x.shape[-1] == held.shape[-2]
    if plain and x.shape[max(x.dim() - 2, 0)] == held.shape[-1]:
        # nothing tells which it was: this is for the interpreter
        torch._dynamo.graph_break()
    return args if plain else (held, x)


def place_behind(index: Any, axis: int, rank: int) -> int | None:  # noqa: ANN401
    """Where an axis is in what an index picks; None where the index picks on that axis."""
    items = index if isinstance(index, tuple) else (index,)
    around = [item for item in items if item is not None and item is not Ellipsis]
    tensors = [item for item in around if isinstance(item, Tensor)]
    plain = all(isinstance(item, int | slice | Tensor | torch.SymInt) for item in around)
    ranks = [item.dim() if item.dtype is torch.bool else 1 for item in tensors]
    if not plain or any(isinstance(item, bool) for item in around) or len(tensors) > 1:
        return None
    if tensors and (ranks != [1] or any(not isinstance(item, slice | Tensor) for item in around)):
        return None
    at, made = 0, 0
    for item in items:
        if item is None:
            made += 1
            continue
        many = rank - len(around) if item is Ellipsis else 1
        if at <= axis < at + many and item is not Ellipsis and item != slice(None):
            return None
        if at <= axis < at + many:
            return made + axis - at
        at += many
        if isinstance(item, Tensor):
            made += 1 if item.dtype is torch.bool else item.dim()
        elif isinstance(item, slice) or item is Ellipsis:
            made += many
    return made + axis - at

"""Which products make the codes they read themselves, with the norm or gate in front of them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.ir import Contract, Note, Pass, Program, edit, read
from qpass.ir.alias import memory, written_memory
from qpass.ops.fused import GATES, LINEAR_ADDED_NORMED, LINEAR_GATED, LINEAR_NORMED, LINEAR_ROWS

aten = torch.ops.aten
qpass = torch.ops.qpass

_NUMBERS = {name: number for number, name in enumerate(GATES)}


@final
@dataclass(frozen=True)
class FuseRows(Pass):
    """One operator for a product of codes and what is in front of it, in one pass over its rows.

    In front are the quantization with its transform, and before that a norm, with the sum that it
    reads, or a gate with the product that it is part of. What has readers elsewhere stays.
    """

    name: str = "fuse_rows"
    contract: Contract = Contract.LOWERS

    def apply(self, program: Program) -> list[Note]:
        notes: list[Note] = []
        graph = _Graph.of(program)
        for node in list(program.graph.nodes):
            if not read.calls(node, qpass.linear.codes):
                continue
            if (product := _product(node, graph)) is None:
                continue
            what = _fuse(program, product, graph)
            notes.append(Note(True, read.module_path(node) or node.name, what))
        edit.erase_dead(program)
        return notes


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Where nodes stood, and which memory is written to at some time."""

    order: Mapping[fx.Node, int]
    written: frozenset[fx.Node]

    @staticmethod
    def of(program: Program) -> _Graph:
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        return _Graph(order, written_memory(program.graph))

    def steady(self, *values: fx.Node | None) -> bool:
        """Whether values may be read later than they are."""
        return not any(v is not None and memory(v) in self.written for v in values)

    def known(self, before: fx.Node, *arguments: object) -> bool:
        """Whether everything among `arguments` is there before a node."""
        nodes = [a for a in arguments if isinstance(a, fx.Node)]
        return all(self.order.get(n, -1) < self.order[before] for n in nodes)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A product of codes, the value that these are made of, and the fused operators' arguments."""

    node: fx.Node
    x: fx.Node
    arguments: tuple[object, ...]


def _product(node: fx.Node, graph: _Graph) -> _Product | None:
    codes, scales = read.value(node, "codes"), read.value(node, "scales")
    if not (_is_part(codes, 0) and _is_part(scales, 1)):
        return None
    (rows,) = codes.all_input_nodes
    if scales.all_input_nodes != [rows] or not read.calls(rows, qpass.quantize_rows.default):
        return None
    if set(rows.users) != {codes, scales} or any(set(p.users) != {node} for p in (codes, scales)):
        return None
    x = read.value(rows, "x")
    if read.dtype(x) is not read.argument(node, "dtype") or not graph.steady(x):
        return None
    turn = (read.argument(rows, name) for name in ("bits", "signs", "factor", "power"))
    names = (
        "weight", "row_scales", "group_scales", "group_offsets", "bias",
        "bits", "in_features", "out_features",
    )  # fmt: skip
    weight = (read.argument(node, name) for name in names)
    return _Product(node, x, (*turn, *weight))


def _is_part(node: fx.Node, index: int) -> bool:
    return node.target is operator.getitem and read.plain_arguments(node)[1] == index


def _fuse(program: Program, product: _Product, graph: _Graph) -> str:
    """Put the widest operator that fits in the place of a product, and say which that is."""
    node, arguments = product.node, product.arguments
    x, lead = _reshaped(product.x)
    if len(x.users) == 1 and (norm := _norm(x, graph)) is not None:
        h = read.value(x, "input")
        terms = _terms(h, graph)
        if terms is not None and graph.known(h, *norm, *arguments):
            both = edit.call(program, h, LINEAR_ADDED_NORMED, *terms, *norm, *arguments, like=node)
            total = edit.call(program, h, operator.getitem, both, 0, like=h)
            new = edit.call(program, h, operator.getitem, both, 1, like=node)
            _replace(program, node, new, lead)
            edit.replace(h, total)
            return "one product with its norm and the sum before it"
        new = edit.call(program, node, LINEAR_NORMED, h, *norm, *arguments, like=node)
        _replace(program, node, new, lead)
        return "one product with its norm"
    if len(x.users) == 1 and (gate := _gate(x, graph)) is not None:
        new = edit.call(program, node, LINEAR_GATED, *gate, *arguments, like=node)
        _replace(program, node, new, lead)
        return "one product with its gate"
    new = edit.call(program, node, LINEAR_ROWS, product.x, *arguments, like=node)
    _replace(program, node, new, None)
    return "one product with the codes it reads"


def _reshaped(x: fx.Node) -> tuple[fx.Node, tuple[object, ...] | None]:
    """What a value has the rows of, and the leading sizes that it has instead; or the value."""
    if not read.calls(x, aten.view.default, aten.reshape.default) or len(x.users) != 1:
        return x, None
    source = read.value(x, "self")
    if not read.shape(source) or read.shape(source)[-1] != read.shape(x)[-1]:
        return x, None
    name = "size" if read.calls(x, aten.view.default) else "shape"
    return source, read.sizes(x, name)[:-1]


def _replace(
    program: Program, node: fx.Node, new: fx.Node, lead: tuple[object, ...] | None
) -> None:
    """Let `new`, with other leading sizes where these are given, take the place of `node`."""
    if lead is not None:
        sizes = [*lead, read.shape(node)[-1]]
        new = edit.call(program, node, aten.reshape.default, new, sizes, like=node)
    edit.replace(node, new)


def _norm(x: fx.Node, graph: _Graph) -> tuple[object, ...] | None:
    """Scale, shift, whether the mean is taken off, and eps of a norm of the last axis."""
    if not read.calls(x, aten.rms_norm.default, aten.layer_norm.default):
        return None
    h = read.value(x, "input")
    scale = read.optional_value(x, "weight")
    centred = read.calls(x, aten.layer_norm.default)
    shift = read.optional_value(x, "bias") if centred else None
    dtype = read.dtype(x)
    eps = read.number(x, "eps")
    if eps is None:
        assert dtype is not None
        eps = torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps
    if read.sizes(x, "normalized_shape") != (read.shape(h)[-1],):
        return None
    if any(v is not None and read.dtype(v) is not dtype for v in (h, scale, shift)):
        return None
    return (scale, shift, centred, eps) if graph.steady(h, scale, shift) else None


def _terms(h: fx.Node, graph: _Graph) -> tuple[fx.Node, fx.Node] | None:
    """The two values of one shape and type that a value is the sum of."""
    if not read.calls(h, aten.add.Tensor) or read.number(h, "alpha") != 1:
        return None
    one, two = read.optional_value(h, "self"), read.optional_value(h, "other")
    if one is None or two is None or not _alike(h, one, two) or not graph.steady(one, two):
        return None
    return one, two


def _gate(x: fx.Node, graph: _Graph) -> tuple[fx.Node, fx.Node | None, int] | None:
    """What a gate reads, what it multiplies, and which gate it is."""
    if (alone := _gate_of(x)) is not None:
        reads = read.value(x, "self")
        return (reads, None, alone) if _alike(x, reads) and graph.steady(reads) else None
    if not read.calls(x, aten.mul.Tensor):
        return None
    factors = read.optional_value(x, "self"), read.optional_value(x, "other")
    for gate, by in (factors, factors[::-1]):
        if gate is None or by is None or gate is by or len(gate.users) != 1:
            continue
        if (number := _gate_of(gate)) is None:
            continue
        reads = read.value(gate, "self")
        if _alike(x, reads, by) and graph.steady(reads, by):
            return reads, by, number
    return None


def _gate_of(node: fx.Node) -> int | None:
    if read.calls(node, aten.gelu.default):
        tanh = read.argument(node, "approximate") == "tanh"
        return _NUMBERS["gelu_tanh" if tanh else "gelu"]
    for name, target in (("silu", aten.silu.default), ("relu", aten.relu.default)):
        if read.calls(node, target):
            return _NUMBERS[name]
    return None


def _alike(x: fx.Node, *others: fx.Node) -> bool:
    """Whether values have the shape and the type of `x`."""
    return all(read.dtype(o) is read.dtype(x) and read.has_shape(o, read.shape(x)) for o in others)

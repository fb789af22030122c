"""Which matrix products and look-ups of a program run on integers, as its plan says."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls
from qpass.formats import QuantSpec, wide
from qpass.ir import Contract, Note, Pass, Program, Step, Weight, edit, read
from qpass.ops import BlocksLinear, PointsLinear, integer_rows
from qpass.ops.fake_quantize import fake_call
from qpass.ops.quantize import has_offsets, rows_call
from qpass.plan import Quantized, Role
from qpass.quantize.containers import (
    REFERENCE,
    by_reference,
    container_bits,
    hold,
    in_blocks,
    row_sums,
    unreadable,
)
from qpass.quantize.join import join_products
from qpass.rounding import ROUNDINGS
from qpass.runtime.packs import Form, Parts, prepared

aten = torch.ops.aten
qpass = torch.ops.qpass


@final
@dataclass(frozen=True, slots=True)
class AsPacked(Form):
    """The parts of a `PackedLinear`: codes, row scales, group scales, group offsets.

    Where no integers hold the weight, those of a `PointsLinear`: its points come after the codes.
    `reads` is the axis that the product sums over; `blocks` asks for the parts of a `BlocksLinear`.
    With `sums` those of rows come last.
    """

    spec: QuantSpec
    rounding: str
    reads: int
    blocks: bool = False
    sums: bool = False

    def make(self, weight: Tensor) -> Parts:
        weight_nk = weight if self.reads == 1 else weight.T
        rounded = ROUNDINGS[self.rounding].round(weight_nk, self.spec, {})
        held = hold(rounded, blocks=self.blocks)
        if isinstance(held, BlocksLinear):
            return (held.weight, held.scales, held.row_scales)
        points = (held.points,) if isinstance(held, PointsLinear) else ()
        parts = (held.weight, *points, held.row_scales, held.group_scales, held.group_offsets)
        return (*parts, row_sums(rounded)) if self.sums else parts


@final
@dataclass(frozen=True, slots=True)
class AsRows(Form):
    """Codes `[v, d]` and scales `[v]` of a table whose rows are looked up."""

    spec: QuantSpec
    rounding: str

    def make(self, weight: Tensor) -> Parts:
        tensor = ROUNDINGS[self.rounding].round(weight, self.spec, {})
        return (tensor.codes_nk, tensor.row_scales_n)


@final
@dataclass(frozen=True, slots=True)
class Prepared(Step):
    """Make one part of a prepared weight; the parts of one weight are made together, once."""

    weight: Weight
    form: Form
    part: int

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return cast("Tensor", prepared(self.weight, self.form, sources)[self.part])


@final
@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """Run planned products on packed weights and, where planned, on integer activations.

    Products of one value share the work of quantizing it, an online rotation included, and run as
    one where they are quantized alike. `blocks`: 4-bit floats are multiplied as such, as GPUs can.
    """

    choices: tuple[Quantized, ...]
    blocks: bool = False
    name: str = "quantize_linears"
    contract: Contract = Contract.QUANTIZES

    def apply(self, program: Program) -> list[Note]:
        linears = {c.site: c for c in self.choices if c.role is not Role.EMBEDDING}
        tables = {c.site: c for c in self.choices if c.role is Role.EMBEDDING}
        joined = join_products(program, linears)
        rows = _Rows(program)
        notes = [
            Note(True, site, f"{_described(linears[site])}, in one product with {first}")
            for site, first in joined.items()
        ]
        found = {(False, site) for site in joined}
        # from the end, so that the value a product reads is still the one that was found
        for matmul in reversed(find_matmuls(program)):
            site = program.site(matmul.use)
            if (choice := linears.get(site)) is not None:
                notes.append(_quantize(program, matmul, choice, rows, blocks=self.blocks))
                found.add((False, site))
        for node in list(program.graph.nodes):
            if not read.calls(node, aten.embedding.default):
                continue
            table = read.value(node, "weight")
            if program.weight(table) is None:
                continue
            site = program.site(table.name)
            if (choice := tables.get(site)) is not None:
                notes.append(_look_up(program, node, table, choice))
                found.add((True, site))
        edit.erase_dead(program)
        absent = [c.site for c in self.choices if (c.role is Role.EMBEDDING, c.site) not in found]
        return notes + [Note(False, site, "there is no such product or table") for site in absent]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Values as rows of a format: each is quantized once for all products that read it."""

    program: Program
    made: dict[tuple[fx.Node, QuantSpec], tuple[fx.Node, ...]] = field(default_factory=dict)
    rounded: dict[tuple[fx.Node, QuantSpec], fx.Node] = field(default_factory=dict)
    blocked: dict[tuple[fx.Node, QuantSpec], tuple[fx.Node, ...]] = field(default_factory=dict)

    def of(self, value: fx.Node, spec: QuantSpec) -> tuple[fx.Node, ...]:
        """The codes, scales and, if `spec` has any, offsets of `value`; a rotation is included."""
        if (value, spec) in self.made:
            return self.made[value, spec]
        x, *turn = _turn(value)
        before = edit.after(self.program, value)
        call, kind = rows_call(spec)
        all_ = edit.call(self.program, before, call, x, *kind, *turn, like=value)
        parts = [
            edit.call(self.program, before, operator.getitem, all_, i, like=value)
            for i in range(len(call._schema.returns))
        ]
        if spec.zero:
            parts.append(
                edit.call(self.program, before, aten.mul.Scalar, parts[1], -spec.zero, like=value)
            )
        return self.made.setdefault((value, spec), tuple(parts))

    def blocks(self, value: fx.Node, spec: QuantSpec) -> tuple[fx.Node, ...]:
        """Codes, scales of blocks and scales of rows; a rotation is done on the way."""
        if (value, spec) in self.blocked:
            return self.blocked[value, spec]
        x, *turn = _turn(value)
        kind = (spec.block, spec.scale_format)
        before = edit.after(self.program, value)
        made = edit.call(
            self.program, before, qpass.quantize_blocks.default, x, *kind, *turn, like=value
        )
        parts = tuple(
            edit.call(self.program, before, operator.getitem, made, i, like=value) for i in range(3)
        )
        return self.blocked.setdefault((value, spec), parts)

    def floats(self, value: fx.Node, spec: QuantSpec) -> fx.Node:
        """`value` rounded to `spec`, in a wide type; a rotation is done on the way."""
        if (value, spec) in self.rounded:
            return self.rounded[value, spec]
        x, *turn = _turn(value)
        call, kind = fake_call(spec)
        before = edit.after(self.program, value)
        new = edit.call(self.program, before, call, x, *kind, *turn, like=value)
        return self.rounded.setdefault((value, spec), new)


def _turn(value: fx.Node) -> tuple[object, ...]:
    """What a rotation turns into `value`, and its signs, factor and power; or `value` alone."""
    if not read.calls(value, qpass.hadamard.default):
        return (value,)
    signs, factor = read.value(value, "signs"), read.value(value, "factor")
    return (read.value(value, "x"), signs, factor, read.integer(value, "power"))


def _quantize(
    program: Program, matmul: Matmul, choice: Quantized, rows: _Rows, *, blocks: bool
) -> Note:
    if (why := unreadable(choice.activation)) is not None:
        return Note(False, choice.site, f"left float: {why}")
    node, value, use = (program.node(name) for name in (matmul.node, matmul.value, matmul.use))
    shape = read.static_shape(use)
    if shape is None:
        return Note(False, choice.site, "left float: its shape is symbolic")
    spec, bits = choice.activation, container_bits(choice.weight)
    blocks = blocks and in_blocks(choice.weight, spec)
    integers = spec is not None and bits is not None and integer_rows(spec)
    offset = spec is not None and integers and has_offsets(spec)
    form = AsPacked(choice.weight, choice.rounding, matmul.reads, blocks, offset)
    parts = _parts(program, use, form)
    sums = parts.pop() if offset else None
    bias = None if matmul.bias is None else _exact(program, program.node(matmul.bias))
    if blocks:
        assert spec is not None
        args = (*rows.blocks(value, spec), *parts, bias, spec.scale_format, read.dtype(node))
        edit.replace(node, edit.call(program, node, qpass.linear.blocks, *args, like=node))
        return Note(True, choice.site, _described(choice, slow=False))
    sizes = (bias,) if bits is None else (bias, bits, shape[matmul.reads], shape[matmul.writes])
    product = qpass.linear.points if bits is None else qpass.linear.real
    if spec is None:
        new = edit.call(program, node, product, value, *parts, *sizes, like=node)
    elif integers:
        codes, scales, *offsets = rows.of(value, spec)
        dtype = read.dtype(node)
        assert dtype is not None
        args = (codes, scales, *parts, *sizes, wide(dtype) if offsets else dtype)
        new = edit.call(program, node, qpass.linear.codes, *args, like=node)
        if offsets:
            more = edit.call(program, node, aten.mul.Tensor, offsets[0], sums, like=node)
            new = edit.call(program, node, aten.add.Tensor, new, more, like=node)
            new = edit.call(program, node, aten.to.dtype, new, dtype, like=node)
    else:
        new = edit.call(program, node, product, rows.floats(value, spec), *parts, *sizes, like=node)
        if read.dtype(node) not in (torch.float32, torch.float64):
            new = edit.call(program, node, aten.to.dtype, new, read.dtype(node), like=node)
    edit.replace(node, new)
    return Note(True, choice.site, _described(choice))


def _exact(program: Program, bias: fx.Node) -> fx.Node:
    """A bias as exact as the sums it is added to: one that a pass has changed is not rounded."""
    weight, like = program.weights[bias.name], read.fake(bias)
    if not weight.steps or like is None or like.dtype not in (torch.bfloat16, torch.float16):
        return bias
    return edit.derive_use(program, bias, weight, like.float(), program.owners.get(bias.name))


def _look_up(program: Program, node: fx.Node, table: fx.Node, choice: Quantized) -> Note:
    spec = choice.weight
    if spec.grouped or spec.codes.code_dtype is not torch.int8:
        why = "tables are looked up as integers with one scale for each row"
        return Note(False, choice.site, f"left float: {why}")
    parts = _parts(program, table, AsRows(spec, choice.rounding))
    indices = read.value(node, "indices")
    args = (indices, *parts, read.dtype(node))
    edit.replace(node, edit.call(program, node, qpass.embedding.default, *args, like=node))
    return Note(True, choice.site, _described(choice))


def _parts(program: Program, use: fx.Node, form: Form) -> list[fx.Node | None]:
    """A placeholder for each tensor of the prepared weight, in the order operators take them."""
    weight, owner = program.weights[use.name], program.owners.get(use.name)
    made: list[fx.Node | None] = []
    for i, part in enumerate(prepared(weight, form, program.sources)):
        if part is None:
            made.append(None)
            continue
        like = edit.fake_like(program, tuple(part.shape), part.dtype)
        step = Weight(None, (Prepared(weight, form, i),))
        made.append(edit.add_weight(program, f"{use.name}_{i}", step, like, owner))
    return made


def _described(choice: Quantized, *, slow: bool = True) -> str:
    kept = "float" if choice.activation is None else choice.activation.format
    slow = slow and by_reference(choice.weight, choice.activation)
    how = f", {REFERENCE}" if slow else ""
    return f"weight {choice.weight.format}, activations {kept}{how}"

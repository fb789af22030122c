"""Which layers take the place of a module's own, and how they are built from a program."""

# N out_features, K in_features

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx, nn

from qpass.analyze import Matmul, find_matmuls, find_tables
from qpass.errors import Unsupported
from qpass.formats import QuantizedTensor, wide
from qpass.ir import Note, Owner, Program, Weight, pieces, read
from qpass.ops import plain_rows
from qpass.plan import Plan, Quantized
from qpass.quantize.containers import REFERENCE, by_reference, hold, stored_as, unreadable
from qpass.rotations import Kronecker, Transform
from qpass.rounding import ROUNDINGS, round_parts
from qpass.targets.layers import QuantizedLinear, RotatedLinear
from qpass.targets.numbers import by_name
from qpass.targets.replaceable import refusals
from qpass.targets.stored import stored_axis
from qpass.targets.tables import QuantizedEmbedding
from qpass.transform.turn import SignsOf, turn_of

# makes codes of a float64 weight [N, K], given some rows after the other
Encode = Callable[[Quantized, Iterable[Tensor]], QuantizedTensor]
# told how many of a number of layers are made
Advance = Callable[[int, int], None]


def unseen(made: int, total: int) -> None:
    """Nobody is told."""


def nearest(entry: Quantized, parts_nk: Iterable[Tensor]) -> QuantizedTensor:
    """Codes by the entry's own rounding, where that needs no statistics."""
    return round_parts(ROUNDINGS[entry.rounding], parts_nk, entry.weight, {})


def build_layers(
    model: nn.Module,
    before: Program,
    after: Program,
    plan: Plan,
    encode: Encode,
    notes: list[Note],
    advance: Advance,
) -> dict[str, nn.Module]:
    """A layer for each module whose input is transformed or whose weight is quantized, by path."""
    entries = {entry.site: entry for entry in plan.quantized}
    nodes = {node.name: node for node in after.graph.nodes}
    wants: dict[str, dict[_Wanted, str]] = {}
    for product in (*find_matmuls(after), *find_tables(after)):
        use = product if isinstance(product, str) else product.use
        if (owner := after.owners.get(use)) is None:
            continue
        wanted = _Wanted.of(after, product, nodes, entries.get(after.site(use)))
        wants.setdefault(owner.module, {}).setdefault(wanted, use)
    wants = {path: every for path, every in wants.items() if any(w.changes for w in every)}
    refused = refusals(model, before) if wants else {}
    made: dict[str, nn.Module] = {}
    for path, every in wants.items():
        wanted, use = next(iter(every.items()))
        why = refused.get(use)
        turns = any(w.transform is not None for w in every)
        if turns and isinstance(model.get_submodule(path), RotatedLinear):
            why = "its input is transformed already"
        elif why is not None and all(w.entry is None for w in every):
            # its weights are read by stand-ins
            continue
        elif len(every) > 1:
            # a module may hold several matrices, as long as nothing takes its place
            raise Unsupported(
                f"{path}: is called twice and would have to differ between its calls\n"
                "  leave its input and output unrotated"
            )
        if why is not None:
            raise Unsupported(
                f"{after.site(use)}: its module cannot be replaced: {why}\n"
                "  leave it float, and its input unrotated"
            )
        advance(len(made), len(wants))
        made[path] = _layer(model, after, after.owners[use], wanted, encode)
        notes.append(Note(True, after.site(use), wanted.text()))
    advance(len(made), len(wants))
    return made


@final
@dataclass(frozen=True, slots=True)
class _Wanted:
    """What decides a layer; calls of one module must agree on it."""

    weight: Weight
    bias: Weight | None
    reads: int
    table: bool
    entry: Quantized | None
    transform: Transform | Kronecker | None

    @staticmethod
    def of(
        after: Program,
        product: Matmul | str,
        nodes: Mapping[str, fx.Node],
        entry: Quantized | None,
    ) -> _Wanted:
        if isinstance(product, str):
            return _Wanted(after.weights[product], None, 1, True, entry, None)
        weight = after.weights[product.use]
        bias = None if product.bias is None else after.weights[product.bias]
        transform = _transform(after, nodes[product.value])
        return _Wanted(weight, bias, product.reads, False, entry, transform)

    @property
    def changes(self) -> bool:
        """Whether the module has to be replaced at all."""
        return self.entry is not None or self.transform is not None

    def text(self) -> str:
        online = "" if self.transform is None else f"{self.transform.rotation} online"
        if self.entry is None:
            return online
        spec, activation = self.entry.weight, self.entry.activation
        stored = f"{spec.format}, block {spec.block}" + ("" if spec.symmetric else ", asymmetric")
        rows = "" if activation is None else f", rows {activation.format}"
        slow = f", {REFERENCE}" if by_reference(spec, activation) else ""
        return stored + rows + slow + (f", {online}" if online else "")


def _layer(
    model: nn.Module, after: Program, owner: Owner, wanted: _Wanted, encode: Encode
) -> nn.Module:
    module = model.get_submodule(owner.module)
    stored = held(module)[owner.attribute]
    assert stored is not None
    transform = wanted.transform
    transposed = stored_axis(owner, wanted.reads) == 0
    if isinstance(module, RotatedLinear):
        transform, transposed = module.online.transform, module.transposed
    bias = None if wanted.bias is None else wanted.bias.evaluate(after.sources)
    if wanted.entry is None:
        assert transform is not None
        value = wanted.weight.evaluate(after.sources)
        return RotatedLinear(
            (value if wanted.reads == 1 else value.mT.contiguous()).to(stored.dtype),
            None if bias is None else bias.to(stored.dtype),
            transform=by_name(transform, owner.path),
            transposed=transposed,
            requires_grad=stored.requires_grad,
        )
    entry = wanted.entry
    codes = encode(entry, pieces.along_outputs(wanted.weight, after.sources, wanted.reads))
    if wanted.table:
        return _embedding(module, owner, codes, stored.dtype)
    rows = entry.activation
    if (why := unreadable(rows)) is not None:
        raise Unsupported(f"{entry.site}: {why}; set activation.dynamic = true")
    kernel = rows is not None and plain_rows(rows) and not by_reference(entry.weight, rows)
    return QuantizedLinear(
        hold(codes),
        None if bias is None else bias.to(wide(stored.dtype)),
        dtype=stored.dtype,
        activation_bits=rows.codes.bits if rows is not None and kernel else None,
        activation=None if kernel else rows,
        transform=transform,
        transposed=transposed,
        spec=stored_as(entry.weight, codes.shape[1]),
    )


def _embedding(
    module: nn.Module, owner: Owner, codes: QuantizedTensor, dtype: torch.dtype
) -> QuantizedEmbedding:
    if codes.group_scales_ng is not None or codes.codes_nk.dtype is not torch.int8:
        raise Unsupported(
            f"{owner.path}: a table is stored as int8 codes with one scale a row, not {codes.spec}"
        )
    padding = module.padding_idx if isinstance(module, nn.Embedding) else None
    return QuantizedEmbedding(codes.codes_nk, codes.row_scales_n, dtype=dtype, padding_idx=padding)


def _transform(after: Program, value: fx.Node) -> Transform | Kronecker | None:
    """The transform that was inserted in front of a product, unless another module has it."""
    turn = turn_of(value)
    if not read.calls(value, torch.ops.qpass.hadamard.default) or (turn and turn.made):
        return None
    return transform_of(after, value)


def transform_of(after: Program, node: fx.Node) -> Transform | Kronecker | None:
    """What a transform that a pass inserted is called; None for one that the model had."""
    weight = after.weight(read.value(node, "signs"))
    first = weight.steps[0] if weight is not None and weight.steps else None
    return first.transform if isinstance(first, SignsOf) else None


def held(module: nn.Module) -> dict[str, Tensor | None]:
    """The tensors that a module holds itself, absent ones included."""
    return {**module._parameters, **module._buffers}

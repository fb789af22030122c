"""Which gains behind products can move into the weights that make what they multiply."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.analyze import Matmul, find_gain, find_matmuls
from qpass.ir import Contract, Note, Ones, Pass, Program, ScaleAxis, Weight, read

aten = torch.ops.aten

# what may stand between a product and its gain: the same rows in another shape or type
_ROWS = (
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """A gain, the product that it scales, and the values from that product on, by name."""

    gain: fx.Node
    matmul: Matmul
    values: tuple[str, ...]


@final
@dataclass(frozen=True)
class FoldScales(Pass):
    """Move the gain behind a product into its weight: `g (W x + b) = (g W) x + g b`.

    So a residual branch that is scaled by a learned vector no longer holds the stream that it is
    added to. `products` are the nodes that multiply by a gain, by name; None means all.
    """

    products: frozenset[str] | None = None
    name: str = "fold_scales"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        notes: list[Note] = []
        matmuls = {m.node: m for m in find_matmuls(program)}
        for node in program.graph.nodes:
            if self.products is not None and node.name not in self.products:
                continue
            found = find_scale(program, node, matmuls)
            if found is None:
                continue
            where = program.site(found.gain.name)
            uses = [found.gain.name, found.matmul.use, found.matmul.bias]
            if (shared := _shared(program, uses)) is not None:
                notes.append(Note(False, where, f"{shared} is used in several places"))
                continue
            _fold(program, found)
            notes.append(Note(True, where, f"folded into {program.site(found.matmul.use)}"))
        return notes


def find_scale(program: Program, node: fx.Node, matmuls: dict[str, Matmul]) -> Scale | None:
    """The gain by which a node scales what a product makes for it alone; None for other nodes."""
    found = find_gain(program, node)
    if found is None or _is_new(program.weights[found.gain.name]):
        return None
    value, values = found.value, list[str]()
    while len(value.users) == 1:
        values.append(value.name)
        if (matmul := matmuls.get(value.name)) is not None:
            return Scale(found.gain, matmul, tuple(values))
        if not read.calls(value, *_ROWS):
            return None
        source = value.all_input_nodes[0]
        if read.fake(source) is None or not read.is_floating(source):
            return None
        if not read.same_size(read.shape(source)[-1], read.shape(value)[-1]):
            return None
        value = source
    return None


def _fold(program: Program, scale: Scale) -> None:
    weights, matmul = program.weights, scale.matmul
    factor = weights[scale.gain.name]
    weights[matmul.use] = weights[matmul.use].then(ScaleAxis(factor, matmul.writes))
    if matmul.bias is not None:
        weights[matmul.bias] = weights[matmul.bias].then(ScaleAxis(factor, 0))
    length = int(read.shape(scale.gain)[0])
    weights[scale.gain.name] = Weight(None, (Ones((length,)),))


def _is_new(weight: Weight) -> bool:
    return bool(weight.steps) and isinstance(weight.steps[-1], Ones)


def _shared(program: Program, uses: list[str | None]) -> str | None:
    """A stored tensor among those of `uses` that is used elsewhere too."""
    paths = Counter(owner.path for owner in program.owners.values())
    sources = Counter(weight.source for weight in program.weights.values())
    for use in uses:
        owner, source = program.owners.get(use or ""), program.weights[use].source if use else None
        if owner is not None and paths[owner.path] > 1:
            return owner.path
        if source is not None and sources[source] > 1:
            return source
    return None

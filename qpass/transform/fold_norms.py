"""Which gains and biases of norms can move into the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.analyze import MOVES, Matmul, Region, Site, find_matmuls, find_regions
from qpass.ir import (
    AddProduct,
    Block,
    Contract,
    Note,
    Ones,
    Owner,
    Pass,
    Program,
    ScaleAxis,
    Weight,
    Zeros,
    edit,
    read,
)
from qpass.rotations import Group

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class FoldNorms(Pass):
    """Move each norm's gain and bias into all its readers: `W (g x + b) = (W g) x + W b`.

    A gain is a diagonal change of basis of the norm's output, so the readers are those of its
    DIAGONAL region; a norm with any other reader keeps its gain, with the reason. `norms` are the
    nodes that are looked at, by name; None means all.
    """

    norms: frozenset[str] | None = None
    name: str = "fold_norms"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        regions = {
            site.use: region
            for region in find_regions(program, Group.DIAGONAL)
            for site in region.sites
        }
        matmuls = {m.use: m for m in find_matmuls(program)}
        notes: list[Note] = []
        for norm in list(program.graph.nodes):
            if not is_norm(norm) or (self.norms is not None and norm.name not in self.norms):
                continue
            gain, bias = _affine(program, norm)
            if gain is None and bias is None:
                continue
            if any(len(read.shape(use)) != 1 for use in (gain, bias) if use is not None):
                why = "its gain or bias spans several axes"
                notes.append(Note(done=False, where=_where(program, norm), why=why))
                continue
            region = regions.get((gain or bias or norm).name)
            readers = _readers(program, region, gain, bias, matmuls, _moved(norm))
            if isinstance(readers, str):
                notes.append(Note(done=False, where=_where(program, norm), why=readers))
                continue
            _fold(program, gain, bias, readers, matmuls)
            notes.append(Note(True, _where(program, norm), f"folded into {len(readers)} readers"))
        return notes


def is_norm(node: fx.Node) -> bool:
    """Whether a node is a norm whose gain and bias `FoldNorms` may move."""
    return read.calls(node, aten.rms_norm.default, aten.layer_norm.default)


def _affine(program: Program, norm: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    gain = read.optional_value(norm, "weight")
    layered = read.calls(norm, aten.layer_norm.default)
    bias = read.optional_value(norm, "bias") if layered else None
    return _unfolded(program, gain), _unfolded(program, bias)


def _unfolded(program: Program, use: fx.Node | None) -> fx.Node | None:
    weight = program.weight(use)
    done = weight is None or (weight.steps and isinstance(weight.steps[-1], Ones | Zeros))
    return None if done else use


def _readers(
    program: Program,
    region: Region | None,
    gain: fx.Node | None,
    bias: fx.Node | None,
    matmuls: dict[str, Matmul],
    moved: frozenset[str],
) -> tuple[Site, ...] | str:
    """The weights that read a norm, or why it cannot be folded into them."""
    if region is None:
        return "its gain is split over several axes"
    if region.pins:
        return f"its output keeps its basis: {region.pins[0].why} ({region.pins[0].where})"
    own = {use.name for use in (gain, bias) if use is not None}
    (dual,) = {site.dual for site in region.sites if site.use in own}
    readers: list[Site] = []
    for site in region.sites:
        whole = read.shape(program.node(site.use))[site.axis] == region.width
        if not whole or site.block != Block.whole(region.width):
            return f"{site.use} holds it only in part"
        if site.use in own:
            continue
        if site.dual is dual:
            return f"{site.use} is written into the same values"
        if bias is not None and (why := _refuses_bias(site, matmuls, moved)) is not None:
            return why
        readers.append(site)
    return tuple(readers)


def _refuses_bias(site: Site, matmuls: dict[str, Matmul], moved: frozenset[str]) -> str | None:
    reader = matmuls.get(site.use)
    if reader is None or site.axis != reader.reads:
        return f"its bias would have to be added where {site.use} is read"
    if not reader.takes_bias:
        return f"{reader.node} cannot add the norm's bias"
    if reader.value not in moved:
        return f"its bias does not reach {reader.node} unchanged"
    return None


def _moved(value: fx.Node) -> frozenset[str]:
    """The values that hold entries of `value` and nothing else."""
    found, pending = {value.name}, [value]
    while pending:
        moved = [user for user in pending.pop().users if read.calls(user, *MOVES)]
        found |= {node.name for node in moved}
        pending += moved
    return frozenset(found)


def _fold(
    program: Program,
    gain: fx.Node | None,
    bias: fx.Node | None,
    readers: tuple[Site, ...],
    matmuls: dict[str, Matmul],
) -> None:
    for site in readers:
        weight = program.weights[site.use]
        if bias is not None:
            reader = matmuls[site.use]
            product = AddProduct(weight, program.weights[bias.name], transposed=reader.reads == 1)
            added = reader.bias or _new_bias(program, reader)
            program.weights[added] = program.weights[added].then(product)
        if gain is not None:
            factor = program.weights[gain.name]
            program.weights[site.use] = weight.then(ScaleAxis(factor, site.axis))
    if gain is not None:
        program.weights[gain.name] = Weight(None, (Ones(_lengths(gain)),))
    if bias is not None:
        program.weights[bias.name] = Weight(None, (Zeros(_lengths(bias)),))


def _new_bias(program: Program, reader: Matmul) -> str:
    node = program.node(reader.node)
    use = program.node(reader.use)
    like = read.fake(use)
    assert like is not None
    length = int(like.shape[reader.writes])
    owner = program.owners.get(reader.use)
    made = edit.add_weight(
        program,
        f"{reader.use}_bias",
        Weight(None, (Zeros((length,)),)),
        like.new_empty((length,)),
        Owner(owner.module, "bias") if owner is not None else None,
    )
    edit.set_argument(node, "bias", made)
    return made.name


def _lengths(use: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in read.shape(use))


def _where(program: Program, norm: fx.Node) -> str:
    return read.module_path(norm) or norm.name

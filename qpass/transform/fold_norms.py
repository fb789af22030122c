"""Which gains and biases of norms can move into the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.analyze import MOVES, Matmul, Region, Site, find_gain, find_matmuls, find_regions
from qpass.ir import (
    AddProduct,
    Block,
    Contract,
    Note,
    Ones,
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
    DIAGONAL region; a norm with any other reader keeps its gain, with the reason. A gain by itself,
    as after a norm that was written in a way of its own, moves alike. `norms` are the nodes that
    are looked at, by name; None means all.
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
        folds: dict[fx.Node, _Fold | str] = {}
        for norm in program.graph.nodes:
            if self.norms is not None and norm.name not in self.norms:
                continue
            if scaled_value(program, norm) is None:
                continue
            gain, bias = _affine(program, norm)
            if gain is not None or bias is not None:
                region = regions.get((gain or bias or norm).name)
                folds[norm] = _fold(program, norm, region, gain, bias, matmuls)
        _decline_split(program, folds)
        notes: list[Note] = []
        for norm, fold in folds.items():
            where = read.module_path(norm) or norm.name
            if isinstance(fold, str) and not _is_norm(norm):
                continue
            if isinstance(fold, str):
                notes.append(Note(done=False, where=where, why=fold))
                continue
            fold.carry_out(program, matmuls)
            notes.append(Note(True, where, f"folded into {len(fold.readers)} readers"))
        return notes


def scaled_value(program: Program, node: fx.Node) -> fx.Node | None:
    """What a node scales, if it is a norm or a gain that `FoldNorms` may move; None if neither."""
    if _is_norm(node):
        return read.value(node, "input")
    found = find_gain(program, node)
    return None if found is None else found.value


def _is_norm(node: fx.Node) -> bool:
    return read.calls(node, aten.rms_norm.default, aten.layer_norm.default)


def _affine(program: Program, norm: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    if (found := find_gain(program, norm)) is not None:
        return _unfolded(program, found.gain), None
    gain = read.optional_value(norm, "weight")
    layered = read.calls(norm, aten.layer_norm.default)
    bias = read.optional_value(norm, "bias") if layered else None
    return _unfolded(program, gain), _unfolded(program, bias)


def _unfolded(program: Program, use: fx.Node | None) -> fx.Node | None:
    weight = program.weight(use)
    done = weight is None or (weight.steps and isinstance(weight.steps[-1], Ones | Zeros))
    return None if done else use


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Fold:
    """A norm's gain and bias, and the weights that take them."""

    gain: fx.Node | None
    bias: fx.Node | None
    readers: tuple[Site, ...]

    def changes(self, program: Program) -> dict[str, object]:
        """What happens to each use of a weight; equal for uses that stay equal."""
        taken = [None if n is None else program.weights[n.name] for n in (self.gain, self.bias)]
        made: dict[str, object] = {site.use: (site.axis, *taken) for site in self.readers}
        return made | {n.name: "gone" for n in (self.gain, self.bias) if n is not None}

    def carry_out(self, program: Program, matmuls: dict[str, Matmul]) -> None:
        for site in self.readers:
            weight = program.weights[site.use]
            if self.bias is not None:
                reader = matmuls[site.use]
                vector = program.weights[self.bias.name]
                product = AddProduct(weight, vector, transposed=reader.reads == 1)
                added = reader.bias or _new_bias(program, reader)
                program.weights[added] = program.weights[added].then(product)
            if self.gain is not None:
                factor = program.weights[self.gain.name]
                program.weights[site.use] = weight.then(ScaleAxis(factor, site.axis))
        if self.gain is not None:
            program.weights[self.gain.name] = Weight(None, (Ones(_lengths(self.gain)),))
        if self.bias is not None:
            program.weights[self.bias.name] = Weight(None, (Zeros(_lengths(self.bias)),))


def _fold(
    program: Program,
    norm: fx.Node,
    region: Region | None,
    gain: fx.Node | None,
    bias: fx.Node | None,
    matmuls: dict[str, Matmul],
) -> _Fold | str:
    """How a norm folds into the weights that read it, or why it cannot."""
    if any(len(read.shape(use)) != 1 for use in (gain, bias) if use is not None):
        return "its gain or bias spans several axes"
    if region is None:
        return "its gain is split over several axes"
    if region.pins:
        return f"its output keeps its basis: {region.pins[0].why} ({region.pins[0].where})"
    own = {use.name for use in (gain, bias) if use is not None}
    (dual,) = {site.dual for site in region.sites if site.use in own}
    moved = _moved(norm)
    readers: list[Site] = []
    for site in region.sites:
        whole = read.shape(program.node(site.use))[site.axis] == region.width
        if not whole or site.block != Block.whole(region.width):
            return f"{program.site(site.use)} holds it only in part"
        if site.use in own:
            continue
        if site.dual is dual:
            return f"{program.site(site.use)} is written into the same values"
        if bias is not None and (why := _refuses_bias(program, site, matmuls, moved)) is not None:
            return why
        readers.append(site)
    return _Fold(gain, bias, tuple(readers))


def _decline_split(program: Program, folds: dict[fx.Node, _Fold | str]) -> None:
    """Decline folds after which a stored tensor would need another value for each of its uses."""
    uses: dict[str, list[str]] = {}
    for use, owner in program.owners.items():
        uses.setdefault(owner.path, []).append(use)
    shared = {path: names for path, names in uses.items() if len(names) > 1}
    while True:
        made = {n: f.changes(program) for n, f in folds.items() if isinstance(f, _Fold)}
        changed = {use: change for one in made.values() for use, change in one.items()}
        split = {
            use: path
            for path, names in shared.items()
            if len({changed.get(use) for use in names}) > 1
            for use in names
        }
        found = {n: path for n, one in made.items() for u, path in split.items() if u in one}
        if not found:
            return
        for norm, path in found.items():
            folds[norm] = f"{path} is used twice and would change in one place only"


def _refuses_bias(
    program: Program, site: Site, matmuls: dict[str, Matmul], moved: frozenset[str]
) -> str | None:
    reader, owner = matmuls.get(site.use), program.owners.get(site.use)
    if reader is None or site.axis != reader.reads:
        return f"its bias would have to be added where {site.use} is read"
    if not reader.takes_bias:
        return f"{reader.node} cannot add the norm's bias"
    if reader.value not in moved:
        return f"its bias does not reach {reader.node} unchanged"
    if reader.bias is None and owner is not None and owner.module in program.rigid:
        return f"{owner.module or 'the model'} adds no bias that it does not have yet"
    return None


def _moved(value: fx.Node) -> frozenset[str]:
    """The values that hold entries of `value` and nothing else."""
    found, pending = {value.name}, [value]
    while pending:
        moved = [user for user in pending.pop().users if read.calls(user, *MOVES)]
        found |= {node.name for node in moved}
        pending += moved
    return frozenset(found)


def _new_bias(program: Program, reader: Matmul) -> str:
    length = int(read.shape(program.node(reader.use))[reader.writes])
    return edit.add_bias(program, reader.node, reader.use, length)


def _lengths(use: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in read.shape(use))

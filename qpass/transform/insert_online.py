"""Insert a transform and its inverse on an edge: one half is folded, the other stays online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import fx

from qpass.analyze import find_convolutions, find_inputs
from qpass.ir import Block, ChangeBasis, Contract, Note, Pass, Program, edit, read
from qpass.plan import Online
from qpass.rotations import Kronecker
from qpass.transform.turn import turned_along


@final
@dataclass(frozen=True)
class InsertOnline(Pass):
    """Rotate the input of chosen products while they run; products of one value share the work.

    That of a convolution is turned along its channels.
    """

    choices: tuple[Online, ...]
    name: str = "insert_online"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        # a layer that is called twice is one site with two uses, and changes in both
        sites: dict[str, list[tuple[_Input, ...]]] = {}
        for use, inputs in _inputs(program).items():
            sites.setdefault(program.site(use), []).append(inputs)
        made: dict[tuple[object, ...], fx.Node] = {}
        return [
            _insert(program, inputs, choice, made)
            for choice in self.choices
            for inputs in sites.get(choice.site, [()])
        ]


@final
@dataclass(frozen=True, slots=True)
class _Input:
    """An axis of a value that is summed over with `block` of an axis of a weight.

    The value's has `groups` such blocks.
    """

    reader: str
    value: str
    axis: int
    groups: int
    use: str
    reads: int
    block: Block


def _inputs(program: Program) -> dict[str, tuple[_Input, ...]]:
    """What each weight of a product meets, by use."""
    found: dict[str, tuple[_Input, ...]] = {}
    for use, meetings in find_inputs(program).items():
        shape = read.shape(program.node(use))
        found[use] = tuple(
            _Input(m.node, m.value, m.axis, 1, use, m.reads, Block.whole(int(shape[m.reads])))
            for m in meetings
        )
    for c in find_convolutions(program):
        axis = len(read.shape(program.node(c.value))) + c.channel
        each = _Input(c.reader, c.value, axis, c.groups, c.use, c.reads, c.block)
        found[c.use] = (*found.get(c.use, ()), each)
    return found


def _insert(
    program: Program,
    inputs: tuple[_Input, ...],
    choice: Online,
    made: dict[tuple[object, ...], fx.Node],
) -> Note:
    if not inputs:
        return Note(False, choice.site, "there is no such matrix product")
    transform, first = choice.transform, inputs[0]
    width = first.block.width
    if width != transform.width:
        return Note(False, choice.site, f"its input is {width} wide, not {transform.width}")
    if transform.fast() is None:
        return Note(False, choice.site, f"{transform.rotation} has no fast form")
    for each in inputs:
        key = (each.value, each.axis, each.groups, transform)
        value = program.node(each.value)
        if key not in made:
            made[key] = turned_along(program, value, transform, each.axis, each.groups)
        edit.redirect(program.node(each.reader), value, made[key])
    # for what is orthogonal both powers are the same
    power = -1 if isinstance(transform, Kronecker) else 1
    step = ChangeBasis(transform, first.reads, first.block, power=power)
    program.weights[first.use] = program.weights[first.use].then(step)
    return Note(True, choice.site, f"{transform.rotation} online")

"""Insert a transform and its inverse on an edge: one half is folded, the other stays online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import fx

from qpass.analyze import Meeting, find_inputs
from qpass.ir import Block, ChangeBasis, Contract, Note, Pass, Program, edit, read
from qpass.plan import Online
from qpass.rotations import Transform
from qpass.transform.turn import turned_along


@final
@dataclass(frozen=True)
class InsertOnline(Pass):
    """Rotate the input of chosen products while they run; products of one value share the work."""

    choices: tuple[Online, ...]
    name: str = "insert_online"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        # a layer that is called twice is one site with two uses, and changes in both
        sites: dict[str, list[tuple[Meeting, ...]]] = {}
        for use, meetings in find_inputs(program).items():
            sites.setdefault(program.site(use), []).append(meetings)
        made: dict[tuple[str, int, Transform], fx.Node] = {}
        return [
            _insert(program, meetings, choice, made)
            for choice in self.choices
            for meetings in sites.get(choice.site, [()])
        ]


def _insert(
    program: Program,
    meetings: tuple[Meeting, ...],
    choice: Online,
    made: dict[tuple[str, int, Transform], fx.Node],
) -> Note:
    if not meetings:
        return Note(False, choice.site, "there is no such matrix product")
    transform, (use, reads) = choice.transform, (meetings[0].use, meetings[0].reads)
    width = read.shape(program.node(use))[reads]
    if width != transform.width:
        return Note(False, choice.site, f"its input is {width} wide, not {transform.width}")
    if transform.fast() is None:
        return Note(False, choice.site, f"{transform.rotation} has no fast form")
    for meeting in meetings:
        product, value = program.node(meeting.node), program.node(meeting.value)
        key = (meeting.value, meeting.axis, transform)
        if key not in made:
            made[key] = turned_along(program, value, transform, meeting.axis)
        edit.redirect(product, value, made[key])
    step = ChangeBasis(transform, reads, Block.whole(transform.width))
    program.weights[use] = program.weights[use].then(step)
    return Note(True, choice.site, f"{transform.rotation} online")

"""Insert a transform and its inverse on an edge: one half is folded, the other stays online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import fx

from qpass.analyze import Matmul, find_matmuls
from qpass.ir import Block, ChangeBasis, Contract, Note, Pass, Program, edit, read
from qpass.plan import Online
from qpass.rotations import Transform
from qpass.transform.turn import turned


@final
@dataclass(frozen=True)
class InsertOnline(Pass):
    """Rotate the input of chosen products while they run; products of one value share the work."""

    choices: tuple[Online, ...]
    name: str = "insert_online"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        # a layer that is called twice is one site with two products, and changes in both
        matmuls: dict[str, list[Matmul | None]] = {}
        for matmul in find_matmuls(program):
            matmuls.setdefault(program.site(matmul.use), []).append(matmul)
        made: dict[tuple[str, Transform], fx.Node] = {}
        return [
            self._insert(program, matmul, choice, made)
            for choice in self.choices
            for matmul in matmuls.get(choice.site, [None])
        ]

    def _insert(
        self,
        program: Program,
        matmul: Matmul | None,
        choice: Online,
        made: dict[tuple[str, Transform], fx.Node],
    ) -> Note:
        if matmul is None:
            return Note(False, choice.site, "there is no such matrix product")
        transform = choice.transform
        width = read.shape(program.node(matmul.use))[matmul.reads]
        if width != transform.width:
            return Note(False, choice.site, f"its input is {width} wide, not {transform.width}")
        if transform.fast() is None:
            return Note(False, choice.site, f"{transform.rotation} has no fast form")
        product, value = program.node(matmul.node), program.node(matmul.value)
        key = (matmul.value, transform)
        if key not in made:
            made[key] = turned(program, value, transform)
        edit.redirect(product, value, made[key])
        step = ChangeBasis(transform, matmul.reads, Block.whole(transform.width))
        program.weights[matmul.use] = program.weights[matmul.use].then(step)
        return Note(True, choice.site, f"{transform.rotation} online")

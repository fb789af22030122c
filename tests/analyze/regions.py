"""How is a region of a program changed by an element of a group, and does that keep its output?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qpass.analyze import Region
from qpass.ir import Block, Program, Step
from qpass.rotations import Group
from tests.analyze.changes import matrices, raised

# a sound change of these models measures below 1e-12, an unsound one above 1e-4
LIMIT = 1e-9

PLANES = (Group.PLANE_ROTATIONS, Group.PLANE_SCALES, Group.ROPE_PLANES)


@dataclass(frozen=True, eq=False)
class Changed(Step):
    """The coordinates of `block` on `axis`, changed by one matrix per head."""

    matrices_hnn: Tensor
    axis: int
    block: Block

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert weight is not None
        moved = weight.movedim(self.axis, -1).clone()
        for row in self.block.indices():
            for at, matrix in zip(row, self.matrices_hnn, strict=True):
                moved[..., at] = moved[..., at] @ matrix
        return moved.movedim(-1, self.axis)


def fits(region: Region, group: Group) -> bool:
    """Whether the group has elements of the region's width."""
    return group not in PLANES or region.width % 2 == 0


def copied(program: Program) -> Program:
    """A program whose weights change apart from those of this one."""
    return Program(program.graph, dict(program.weights), program.sources, program.owners)


def change(program: Program, region: Region, seed: int, group: Group | None = None) -> None:
    """Change a region in all the weights that absorb it, by random elements of its group."""
    matrices_hnn = matrices(group or region.group, region.width, region.heads, seed)
    for site in region.sites:
        own = raised(matrices_hnn, site.power)
        program.weights[site.use] = program.weights[site.use].then(
            Changed(own if site.block.head is not None else own[:1], site.axis, site.block)
        )


def differs(got: object, want: Tensor) -> bool:
    assert isinstance(got, Tensor)
    return not bool((got - want).abs().max() <= LIMIT * want.abs().max())


def changes_output(
    program: Program, regions: Iterable[Region], inputs: tuple[object, ...], want: Tensor
) -> bool:
    """Whether the first output is another once all these regions are changed."""
    changed = copied(program)
    for seed, region in enumerate(regions):
        change(changed, region, seed)
    return differs(changed.run(*inputs, widen=True)[0], want)

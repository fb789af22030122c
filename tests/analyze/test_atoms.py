"""Do axes that are cut and tied stay what they are made of?"""

from __future__ import annotations

from qpass.analyze.atoms import cut, fresh, length, placements, tie


def test_an_axis_cut_as_a_whole_is_itself():
    axis = fresh(3)
    tie(axis, cut(axis, 0, 3))
    assert length(axis) == 3
    assert len(list(placements(axis))) == 1


def test_an_axis_tied_to_its_pieces_has_those_pieces():
    axis, first, second = fresh(5), fresh(2), fresh(3)
    tie(cut(axis, 0, 2), first)
    tie(cut(axis, 2, 5), second)
    tie(cut(axis, 0, 5), axis)
    assert [(p.offset, p.leaf.atom.size) for p in placements(axis)] == [(0, 2), (2, 3)]

"""Is what doors say of a value what happened to it, for every value of every model?"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx

from qpass.analyze import find_matmuls
from qpass.capture.export import capture
from qpass.errors import Unsupported
from qpass.ir import Block, ChangeBasis, Program, run_passes
from qpass.plan import Recipe
from qpass.plan.choose import choose
from qpass.rotations import Transform
from qpass.targets.changes import (
    DIFFER,
    SAME,
    Carried,
    Change,
    Door,
    merged,
    read_doors,
    write_doors,
)
from qpass.targets.doors import find_changes, find_doors, folded_name, is_folded
from qpass.targets.replaceable import refusals
from qpass.transform import FoldNorms, rewrite
from tests.zoo import ZOO, Specimen

# float64 throughout, casts widened
EXACT = 1e-9


@functools.cache
def changed(entry: Specimen) -> tuple[Program, Program, tuple[object, ...]]:
    """A model before and after every rotation that can be had, and a call of it."""
    model, inputs = entry.build(0), entry.inputs()
    captured = capture(model, inputs)
    folded, _ = run_passes(captured.program, [FoldNorms()])
    recipe = Recipe("rotate", rotation="on", head="float", embedding="float")
    refused = refusals(model, captured.program)
    plan = choose(folded, recipe, refusals=refused, stored=True)
    return captured.program, rewrite(folded, plan).program, captured.flatten(inputs)


def values(program: Program, inputs: tuple[object, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found[node.name] = value

    program.run(*inputs, widen=True, watch=watch)
    return found


def relative(want: Tensor, got: Tensor) -> float:
    finite = want.isfinite()
    if not finite.any():
        return 0.0
    return float((want - got)[finite].abs().max() / want[finite].abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_value_comes_back(entry: Specimen) -> None:
    before, after, inputs = changed(entry)
    changes = find_changes(before, after, generation=0)
    kept = {
        f"{owner.module}.{folded_name(owner, 0)}": before.weights[use].evaluate(before.sources)
        for use, owner in before.owners.items()
        if is_folded(before.weights[use], after.weights.get(use))
    }
    old, new = values(before, inputs), values(after, inputs)
    assert old.keys() <= new.keys()
    moved = 0
    for name, want in old.items():
        change = changes.get(name, SAME)
        if change.unclear is None:
            assert relative(want, change.undo(new[name], kept.__getitem__)) <= EXACT, name
            assert relative(new[name], change.redo(want, kept.__getitem__)) <= EXACT, name
            moved += relative(want, new[name]) > EXACT
    # values that cannot be told are few: those inside of attention, head by head
    unclear = [name for name, change in changes.items() if change.unclear is not None]
    assert len(unclear) <= len(old) // 4
    assert moved > 0


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_most_modules_can_show_what_they_were(entry: Specimen) -> None:
    before, after, _ = changed(entry)
    doors = find_doors(before, after, generation=0)
    products = {before.owners[m.use].module for m in find_matmuls(before) if m.use in before.owners}
    assert products <= {door.module for door in doors}
    [root] = [door for door in doors if door.module == ""]
    assert not root.changed
    dark = [d.module for d in doors if any(c.change.unclear for c in (*d.ins, *d.outs))]
    # what takes two values of one shape that changed differently
    assert len(dark) <= 2
    assert read_doors(write_doors(doors)) == doors


BASIS = ChangeBasis(Transform("hadamard", 4), -1, Block.whole(4))
TURNED = Change((BASIS,))


def test_a_tensor_is_known_by_its_shape() -> None:
    door = Door("m", (Carried(3, 4, TURNED), Carried(4, None, SAME)), (Carried(3, 4, SAME, 2),))
    assert door.changed

    def find(*shape: int, any_rank: bool = False) -> Change | None:
        return door.find(torch.ones(shape), leaving=False, any_rank=any_rank)

    assert find(1, 2, 4) == TURNED
    assert find(1, 2, 3, 4) == SAME
    assert find(2, 4) is None
    assert find(2, 4, any_rank=True) == TURNED
    assert find(2, 5, any_rank=True) is None
    assert door.find(torch.ones(1, 2, 4), leaving=True, any_rank=False) == SAME
    assert door.wide(torch.ones(4), leaving=False)
    assert not door.wide(torch.ones(4), leaving=True)
    assert door.count(3, 4) == 2


def test_names_of_one_module_are_merged() -> None:
    one = Door("a", (Carried(3, 4, TURNED), Carried(2, 4, SAME)), ())
    two = Door("b", (Carried(3, 4, SAME), Carried(2, 4, SAME)), ())
    assert merged([]) is None
    assert merged([one]) == one
    both = merged([one, two])
    assert both is not None
    assert both.ins == (Carried(3, 4, DIFFER), Carried(2, 4, SAME))


def test_a_gain_of_zero_cannot_be_put_back_in() -> None:
    change = Change(gain="gain")
    gain = {"gain": torch.tensor([1.0, 0.0, 2.0])}
    assert torch.equal(change.undo(torch.ones(3), gain.__getitem__), gain["gain"])
    with pytest.raises(Unsupported, match="zero"):
        change.redo(torch.ones(3), gain.__getitem__)

"""Do given numbers change every region of their group, exactly, and nothing else?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qpass
from qpass.analyze import Region, find_regions
from qpass.errors import BadInput, QpassError
from qpass.ir import ChangeBasis
from qpass.plan import Changed, Plan, Recipe, Rotated
from qpass.rotations import Element, Group, Key, lift, sample
from qpass.transform import carry_out, rewrite
from qpass.verify.exact import ExactCheck
from tests.captured import folded
from tests.zoo import specimen, tokens

LIMIT = 1e-9
# norms and softmax of these models compute in float32 when they run themselves
EAGER = 1e-5
MODELS = ("llama", "gpt2", "opt", "qwen3", "bert", "vision", "nano_gpt")
GROUPS = (
    Group.POSITIVE_DIAGONAL,
    Group.SIGNS,
    Group.DIAGONAL,
    Group.PERMUTATION,
    Group.GENERAL,
)
INPUTS = {"input_ids": tokens()}


def element(region: Region, seed: int = 0) -> Element:
    """A random element of a region's group, another matrix for each head."""
    drawn = [
        sample(region.group, region.width, Key(f"{region.name}/{h}", seed))
        for h in range(region.heads)
    ]
    T = torch.stack(drawn)
    if region.group is Group.PERMUTATION:
        return Element.of("permutation", T.argmax(1))
    if region.group is Group.GENERAL:
        return Element.of("general", T)
    return Element.of("diagonal", torch.stack([t.diagonal() for t in T]))


def rotations(plan: Plan, seed: int = 0) -> Plan:
    """The same plan with numbers of its own for what is folded."""
    found: list[Rotated] = []
    for r in plan.rotated:
        t = r.transform
        keys = [Key(f"{r.region}/{h}", seed) for h in range(t.heads)]
        R = torch.stack([sample(Group.ORTHOGONAL, t.width, key) for key in keys])
        R = torch.stack([lift(each) for each in R]) if t.lifted else R
        found.append(Rotated(r.region, Element.of("orthogonal", R, lifted=t.lifted)))
    return replace(plan, rotated=tuple(found))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_every_free_region_takes_an_element(name: str, group: Group) -> None:
    entry = folded(name)
    regions = [r for r in find_regions(entry.folded, group) if r.free]
    changed = tuple(Changed(r.name, group, element(r)) for r in regions)
    done = rewrite(entry.folded, Plan(Recipe("given"), changed=changed))
    assert all(note.done for note in done.notes), [n for n in done.notes if not n.done]
    assert done.plan.changed == tuple(sorted(changed, key=lambda c: c.region))
    assert ExactCheck(entry.inputs).error(entry.folded, done.program) <= LIMIT
    touched = {s.use for r in regions for s in r.sites}
    for use, weight in done.program.weights.items():
        steps = [s for s in weight.steps if isinstance(s, ChangeBasis)]
        assert bool(steps) == (use in touched)


def test_some_regions_are_free_under_each_group() -> None:
    for group in GROUPS:
        assert any(r.free for name in MODELS for r in find_regions(folded(name).folded, group))


@pytest.mark.parametrize("name", MODELS)
def test_rotations_by_numbers_fold_like_named_ones(name: str) -> None:
    model, other = specimen(name).build(0), specimen(name).build(0)
    inputs = dict(specimen(name).inputs())
    named = qpass.rotate(model, inputs).plan
    plan = rotations(named)
    if not plan.rotated:
        pytest.skip("nothing folds")
    report = qpass.rotate(other, inputs, plan=plan)
    assert report.plan.rotated == plan.rotated
    assert report.max_error <= LIMIT
    assert report.eager_error <= EAGER


def test_a_saved_plan_is_carried_out_and_a_model_saved(tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        return specimen("llama").build(0).float()

    plan = rotations(qpass.rotate(build(), INPUTS, "w8a8").plan)
    gained = next(
        r
        for r in find_regions(folded("llama").folded, Group.DIAGONAL)
        if r.free and "up_proj" in r.name
    )
    plan = replace(plan, changed=(Changed(gained.name, Group.DIAGONAL, element(gained)),))
    plan.save(tmp_path / "plan.json")
    model = build()
    want = model(**INPUTS).logits
    report = qpass.rotate(model, INPUTS, plan=tmp_path / "plan.json")
    assert report.plan.changed == plan.changed
    assert (model(**INPUTS).logits - want).abs().max() <= EAGER * want.abs().max()
    shown, had = (m(**INPUTS, output_hidden_states=True).hidden_states for m in (model, build()))
    for got, wanted in zip(shown, had, strict=True):
        assert (got - wanted).abs().max() <= EAGER * wanted.abs().max()
    qpass.save(model, tmp_path / "saved")
    again = qpass.load(tmp_path / "saved")
    assert torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)
    # a checkpoint holds no numbers: what would need them is refused, never wrong
    with pytest.raises(QpassError, match="are not here"):
        again(**INPUTS, output_hidden_states=True)


def test_a_compiled_model_takes_a_plan_with_numbers(tmp_path: Path) -> None:
    model = specimen("llama").build(0).float()
    recipe = Recipe.read("w8a16", rotation="on")
    fast = torch.compile(
        model, backend="qpass", options={"recipe": recipe, "save_plan": tmp_path / "plan.json"}
    )
    with torch.no_grad():
        near = fast(**INPUTS).logits
    torch._dynamo.reset()
    plan = rotations(Plan.load(tmp_path / "plan.json"))
    assert plan.rotated
    plan.save(tmp_path / "given.json")
    options = {"plan": tmp_path / "given.json", "strict": True}
    with torch.no_grad():
        got = torch.compile(model, backend="qpass", options=options)(**INPUTS).logits
        want = model(**INPUTS).logits
    torch._dynamo.reset()
    scale = want.abs().max()
    assert (got - want).abs().max() <= 0.1 * scale
    assert not torch.equal(got, near)


def first(name: str, group: Group, *, free: bool) -> Region:
    return next(r for r in find_regions(folded(name).folded, group) if r.free is free)


def test_what_a_region_does_not_allow_is_refused() -> None:
    stream = max(qpass.rotate(specimen("gpt2").build(0), INPUTS).plan.rotated, key=_width)
    width = stream.transform.width
    R = sample(Group.ORTHOGONAL, width, Key("any", 0))
    refused: list[tuple[str, Plan, str]] = [
        ("gpt2", Plan(Recipe("g"), (Rotated(stream.region, Element.of("orthogonal", R)),)), "lift"),
    ]
    # scales of either sign where a region admits positive ones, and where it is pinned
    positive = first("opt", Group.POSITIVE_DIAGONAL, free=True)
    scales = sample(Group.DIAGONAL, positive.width, Key("any", 0)).diagonal()
    signed = Element.of("diagonal", scales)
    pinned = first("opt", Group.DIAGONAL, free=False)
    for region, given, why in (
        (positive, signed, "invertible diagonals, not of the positive"),
        (pinned, Element.of("diagonal", torch.full((pinned.width,), 2.0)), "cannot change by"),
        (positive, Element.of("diagonal", torch.ones(positive.width + 1)), "the region is"),
        (positive, Element.of("general", R[:8, :8] + 2 * torch.eye(8)), "the region is"),
    ):
        changed = (Changed(region.name, region.group, given),)
        refused.append(("opt", Plan(Recipe("g"), changed=changed), why))
    for name, plan, why in refused:
        with pytest.raises(BadInput, match=why):
            qpass.rotate(specimen(name).build(0), INPUTS, plan=plan)
        entry = folded(name)
        assert carry_out(entry.program, entry.folded, plan).plan.changed in ((), plan.changed)


def _width(choice: Rotated) -> int:
    return choice.transform.width

"""Do the exact passes change nothing, and do something, on every model of the zoo?"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from qpass.ir import ChangeBasis, Note, Ones, Program, run_passes
from qpass.plan import Plan, Recipe
from qpass.plan.choose import choose
from qpass.transform import InsertOnline, RotateRegions
from tests.captured import folded
from tests.zoo import ZOO

# a correct rewrite of these models measures below 1e-14; a wrong one above 1e-3
LIMIT = 1e-12

# regions rotated, online transforms, norms that keep a gain: what each model is known to allow
EXPECTED = {
    "llama": (3, 2, 0),
    "llama_tied": (3, 2, 0),
    "llama_biased_eager": (3, 2, 0),
    "qwen2": (3, 2, 0),
    "qwen3": (3, 2, 4),
    "mistral": (3, 2, 0),
    "phi3": (3, 2, 0),
    "gemma3": (2, 13, 8),
    "gpt2": (3, 2, 0),
    "opt": (3, 2, 0),
    "gpt_neox": (3, 2, 0),
    "bert": (2, 12, 4),
    "nano_gpt": (3, 2, 0),
    "vision": (3, 2, 0),
}


@dataclass(frozen=True, eq=False)
class Stages:
    """A model before and after each exact pass, with its outputs in float64."""

    plan: Plan
    programs: tuple[Program, ...]
    outputs: tuple[torch.Tensor, ...]
    notes: tuple[Note, ...]


@functools.cache
def stages(name: str) -> Stages:
    found = folded(name)
    plan = choose(found.folded, Recipe("rotated", rotation="on", residual="haar", value="haar"))
    rotated, more = run_passes(found.folded, [RotateRegions(plan.rotated)])
    online, last = run_passes(rotated, [InsertOnline(plan.online)])
    programs = (found.program, found.folded, rotated, online)
    made = [p.run(*found.inputs, widen=True)[0] for p in programs[1:]]
    return Stages(plan, programs, (found.output, *made), (*found.notes, *more, *last))


@pytest.mark.parametrize("name", [s.name for s in ZOO])
def test_every_pass_is_exact(name: str) -> None:
    want, *made = stages(name).outputs
    for got in made:
        assert (got - want).abs().max() <= LIMIT * want.abs().max()


@pytest.mark.parametrize("name", [s.name for s in ZOO])
def test_what_each_model_allows(name: str) -> None:
    found = stages(name)
    kept = [n for n in found.notes if not n.done]
    assert (len(found.plan.rotated), len(found.plan.online), len(kept)) == EXPECTED[name]


def test_every_linear_of_a_llama_reads_rotated_values() -> None:
    program = stages("llama").programs[-1]
    steps = {
        program.site(use): [type(s) for s in w.steps]
        for use, w in program.weights.items()
        if use in program.owners
    }
    assert all(
        ChangeBasis in s for site, s in steps.items() if "norm" not in site and "freq" not in site
    )
    assert all(Ones in s for site, s in steps.items() if "norm" in site)


def test_tied_weights_change_apart() -> None:
    program = stages("llama_tied").programs[-1]
    found = {program.site(use): weight for use, weight in program.weights.items()}
    table, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert table.source == head.source
    assert table.steps != head.steps


def test_a_forgotten_inverse_is_seen() -> None:
    found = stages("llama")
    broken = found.programs[2].clone()
    use = next(
        u for u, w in broken.weights.items() if any(isinstance(s, ChangeBasis) for s in w.steps)
    )
    weight = broken.weights[use]
    broken.weights[use] = type(weight)(weight.source, weight.steps[:-1])
    (got,) = broken.run(*folded("llama").inputs, widen=True)
    want = found.outputs[0]
    assert (got - want).abs().max() > 1e-3 * want.abs().max()

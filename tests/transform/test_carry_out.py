"""Do norms keep their gains where nothing that they normalise changes basis?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import qpass
from qpass.formats import QuantSpec
from qpass.ir import Ones, Program, Zeros, run_passes
from qpass.plan import Plan, Recipe
from qpass.plan.choose import choose
from qpass.rounding import ROUNDINGS
from qpass.transform import FoldNorms, carry_out
from qpass.verify.exact import PASS_LIMIT, ExactCheck
from tests.captured import specimen
from tests.zoo import specimen as built

NAMES = ("llama", "gpt2", "gpt_neox", "nano_gpt")
# of what the products of a two-layer model read, float32
CLOSE = 1e-5


def planned(program: Program) -> tuple[Program, Plan]:
    folded, _ = run_passes(program, [FoldNorms()])
    return folded, choose(folded, Recipe("test", rotation="on"))


def gone(program: Program) -> int:
    """How many gains and biases have moved away."""
    return sum(
        weight.source is None and isinstance(weight.steps[-1], Ones | Zeros)
        for weight in program.weights.values()
        if weight.steps
    )


@pytest.mark.parametrize("name", NAMES)
def test_gains_move_only_where_the_stream_turns(name: str) -> None:
    _, inputs, captured = specimen(name)
    program = captured.program
    folded, plan = planned(program)
    stream = max(plan.rotated, key=lambda choice: choice.transform.width)
    heads = tuple(choice for choice in plan.rotated if choice is not stream)
    assert heads
    check = ExactCheck(captured.flatten(inputs))
    for rotated, moved in ((plan.rotated, gone(folded)), (heads, 0), ((stream,), gone(folded))):
        done = carry_out(program, folded, replace(plan, rotated=rotated))
        assert gone(done.program) == moved
        assert [note.why for note in done.notes if not note.done] == []
        assert check.error(program, done.program) <= PASS_LIMIT
    bare = carry_out(program, folded, replace(plan, rotated=(), online=()))
    assert bare.program is program


def on_grid(weight_nk: Tensor, spec: QuantSpec) -> Tensor:
    return ROUNDINGS["nearest"].round(weight_nk, spec, {}).dequantize(torch.float32)


@pytest.mark.parametrize("rotation", ["off", "auto"])
def test_weights_on_the_grid_keep_their_numbers(rotation: str) -> None:
    # whatever the gains of the norms in front of them
    spec = QuantSpec("int4", 16, scale_format="float16", symmetric=False)
    chosen = built("llama")
    model, inputs = chosen.build(0).float(), chosen.inputs()
    linears = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with torch.no_grad():
        for layer in linears.values():
            layer.weight.copy_(on_grid(layer.weight, spec))
    before = {path: layer.weight.detach().clone() for path, layer in linears.items()}
    want = model(**inputs).logits
    recipe = Recipe("grid", spec, None, rotation=rotation, head="float", embedding="float")
    got = qpass.quantize(model, recipe, inputs=inputs)(**inputs).logits
    for path in set(before) - {"lm_head"}:
        assert torch.equal(model.get_submodule(path).weight, before[path]), path
    assert (got - want).abs().max() <= CLOSE * want.abs().max()

"""Does a compiled language model compute what `qpass.quantize` makes of it, cache and all?

One test runs the real inductor; the many cases are in `test_compile.py`, without it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import qpass
import qpass.backend
import qpass.targets.inductor
from qpass.plan import Plan
from tests.surface.changed import llama
from tests.zoo import tokens

RECIPE = "w8a8"
# a cache keeps its basis and a graph boundary too, so the two scopes rotate different edges: twice
# the rounding of one, measured 0.038 and 0.045
NEAR = 0.1
# without rotations the codes are the same; float32 sums around them in another order
SAME = 1e-5


def compiler() -> str | None:
    """Why there is no C++ compiler for inductor, or None."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return f"inductor needs a C++ compiler: {error}"
    return None


needs_compiler = pytest.mark.skipif(compiler() is not None, reason=str(compiler()))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """The backend, with the number of graphs it was given."""

    def __init__(self, **options: object) -> None:
        self.options = options
        self.graphs = 0

    def __call__(self, gm, example_inputs):
        self.graphs += 1
        return qpass.backend.backend(gm, example_inputs, options=self.options)


def model(*, tied: bool = True) -> hf.PreTrainedModel:
    return llama(tie_word_embeddings=tied)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def quantized(changed: nn.Module) -> torch.Tensor:
    """The last logits of a copy that is quantized whole."""
    whole = qpass.quantize(copy.deepcopy(changed), RECIPE, inputs={"input_ids": tokens()})
    with torch.no_grad():
        return whole(tokens(), use_cache=False).logits[:, -1]


def written(compiled: hf.PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a greedy continuation with a static cache, and the logits of the first."""
    with torch.no_grad():
        found = compiled.generate(
            tokens(),
            cache_implementation="static",
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return found.sequences, found.logits[0]


@needs_compiler
def test_a_language_model_computes_and_writes_what_quantize_makes_of_it() -> None:
    compiled = model()
    counting = Counting(recipe=RECIPE)
    compiled.compile(backend=counting)
    first, logits = written(compiled)
    assert error(logits, quantized(model())) < NEAR
    graphs = counting.graphs
    again, _ = written(compiled)
    assert torch.equal(first, again)
    with torch.no_grad():
        compiled.model.layers[1].mlp.down_proj.weight.mul_(-1)
        compiled.model.norm.weight.add_(1)
    changed = model()
    changed.load_state_dict(compiled.state_dict())
    _, after = written(compiled)
    # the weights were packed again, and nothing was compiled for it
    assert error(after, quantized(changed)) < NEAR
    assert error(after, logits) > 1
    assert graphs == counting.graphs == 2


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", lambda graph, *_, **__: graph)


@pytest.mark.usefixtures("no_inductor")
def test_both_scopes_choose_the_same_codes() -> None:
    recipe = {"recipe": RECIPE, "rotation": "off"}
    compiled, whole = model(), qpass.quantize(model(), recipe, inputs={"input_ids": tokens()})
    compiled.compile(backend=Counting(recipe=recipe))
    with torch.no_grad():
        want = whole(tokens(), use_cache=False).logits
        assert error(compiled(tokens(), use_cache=False).logits, want) < SAME


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_saved_while_compiling_gives_the_same_model(tmp_path: Path, *, tied: bool) -> None:
    recipe = {"recipe": "w8a16", "rotation": "on"}
    compiled = model(tied=tied)
    compiled.compile(backend=Counting(recipe=recipe, save_plan=tmp_path / "plan.json"))
    tokens_out, logits = written(compiled)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.rotated
    assert plan.online
    same = qpass.quantize(model(tied=tied), plan=plan, inputs={"input_ids": tokens()})
    found, again = written(same)
    # the codes are the same, the activations float
    assert error(again, logits) < SAME
    assert torch.equal(found, tokens_out)


@pytest.mark.usefixtures("no_inductor")
def test_layers_compiled_alone_still_rotate_inside(tmp_path: Path) -> None:
    compiled = model()
    counting = Counting(recipe=RECIPE, save_plan=tmp_path / "plan.json")
    for layer in compiled.model.layers:
        layer.compile(backend=counting)
    with torch.no_grad():
        want = model()(tokens(), use_cache=False).logits
        assert 0 < error(compiled(tokens(), use_cache=False).logits, want) < NEAR
    plan = Plan.load(tmp_path / "plan.json")
    # the stream keeps the basis in which it comes and goes, so every product turns its own input
    assert {o.site for o in plan.online} == {q.site for q in plan.quantized}
    assert len(plan.online) == 7
    assert counting.graphs == 1

"""Where folding is impossible: do fewer transforms run than there are inputs, and exactly so?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from qpass.capture import capture
from qpass.ir import Program, run_passes
from qpass.plan import Plan, Recipe
from qpass.plan.choose import choose
from qpass.report.coverage import find_coverage, online_widths
from qpass.transform import FoldNorms, carry_out
from qpass.verify.exact import PASS_LIMIT, ExactCheck
from tests import zoo
from tests.zoo import _GATED, POSITIONS, VOCABULARY, randomise, tiny, tokens

WIDTH = 24
RECIPE = Recipe("pairs", rounding="nearest")


class Block(nn.Module):
    """A pre-norm MLP whose result is scaled by a learned vector, or whose norm is modulated."""

    def __init__(self, norm: nn.Module, *, scaled: bool, modulated: bool) -> None:
        super().__init__()
        self.norm = norm
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH)) if scaled else None
        self.shift = nn.Linear(WIDTH, 2 * WIDTH) if modulated else None

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        y = self.norm(x)
        if self.shift is not None:
            scale, shift = self.shift(given).unsqueeze(1).chunk(2, -1)
            y = y * (1 + scale) + shift
        y = self.down(nn.functional.gelu(self.up(y)))
        return x + (y if self.scale is None else y * self.scale)


class Stack(nn.Module):
    """Blocks between a linear and what is returned: the last state, or every one."""

    def __init__(
        self,
        norm: Callable[[], nn.Module],
        *,
        layers: int = 3,
        scaled: tuple[int, ...] = (),
        modulated: bool = False,
        every: bool = False,
    ) -> None:
        super().__init__()
        self.inp = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(
            Block(norm(), scaled=i in scaled, modulated=modulated) for i in range(layers)
        )
        self.every = every

    def forward(self, x: Tensor, given: Tensor) -> Tensor | tuple[Tensor, ...]:
        states = [self.inp(x)]
        for block in self.blocks:
            states.append(block(states[-1], given))
        return tuple(states) if self.every else states[-1]


def stack(norm: Callable[[], nn.Module], **options) -> tuple[nn.Module, Mapping[str, Tensor]]:
    model = Stack(norm, **options).double().eval()
    randomise(model, 0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return model, {"x": x, "given": torch.randn(2, WIDTH, generator=generator).double()}


def rms() -> nn.Module:
    return nn.RMSNorm(WIDTH)


def layer() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def bare() -> nn.Module:
    return nn.LayerNorm(WIDTH, elementwise_affine=False)


def language(config: hf.PretrainedConfig) -> tuple[nn.Module, Mapping[str, Tensor]]:
    return tiny(config, kind=hf.AutoModel), {"input_ids": tokens()}


GPT2 = hf.GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=POSITIONS,
    n_embd=36,
    n_head=3,
    n_layer=2,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)

# transforms without pairs and with them: each is one per value that products read, at most
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Mapping[str, Tensor]]], int, int]] = {
    "last state": (lambda: stack(rms), 7, 5),
    "last state of layer norms": (lambda: stack(layer), 7, 5),
    "every state": (lambda: stack(rms, every=True, layers=2), 5, 5),
    "one learned multiplier": (lambda: stack(rms, scaled=(1,)), 7, 6),
    "multipliers everywhere": (lambda: stack(rms, scaled=(0, 1, 2)), 7, 7),
    "modulated norms": (lambda: stack(bare, modulated=True), 8, 8),
    "a base model": (lambda: language(hf.LlamaConfig(**_GATED)), 6, 3),
    "a base model of layer norms": (lambda: language(GPT2), 6, 3),
    "norms behind each half": (
        lambda: language(
            hf.Gemma3TextConfig(
                **_GATED, head_dim=8, layer_types=["sliding_attention", "full_attention"]
            )
        ),
        6,
        6,
    ),
}


def programs(
    name: str,
) -> tuple[Program, Program, Plan, Plan, ExactCheck]:
    """A model's program, the same with norms folded, and its plans without pairs and with them."""
    model, inputs = CASES[name][0]()
    captured = capture(model, inputs)
    folded, _ = run_passes(captured.program, [FoldNorms()])
    plans = [choose(folded, RECIPE, pairs=pairs) for pairs in (False, True)]
    return captured.program, folded, plans[0], plans[1], ExactCheck(captured.flatten(inputs))


@pytest.mark.parametrize("name", CASES)
def test_pairs_cost_no_more_and_are_exact(name: str) -> None:
    program, folded, plain, paired, check = programs(name)
    _, before, after = CASES[name]
    without = carry_out(program, folded, plain, check)
    done = carry_out(program, folded, paired, check)
    assert done.plan.paired == paired.paired
    assert check.error(program, done.program) <= PASS_LIMIT
    counts = tuple(len(online_widths(p)) for p in (without.program, done.program))
    assert counts == (before, after)
    assert bool(paired.paired) is (after < before)
    # the same products read rotated inputs
    declined = (find_coverage(p).declined for p in (without.program, done.program))
    assert len(set(declined)) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_saved_plan_makes_the_same_program(name: str) -> None:
    program, folded, _, paired, _ = programs(name)
    read = Plan.read(paired.json())
    assert read == paired
    texts = [carry_out(program, folded, plan).program.text() for plan in (paired, read)]
    assert texts[0] == texts[1]


def test_a_forgotten_half_is_undone() -> None:
    program, folded, _, paired, check = programs("a base model")
    (choice,) = paired.paired
    # a writer that does not turn although what reads it does: its value is turned, which is exact
    fewer = replace(choice, turned=choice.turned[1:])
    done = carry_out(program, folded, replace(paired, paired=(fewer,)), check)
    assert done.plan.paired == (fewer,)
    assert check.error(program, done.program) <= PASS_LIMIT
    # a transform that is not the one of the weights
    weights = done.program.weights
    use = next(u for u in weights if program.site(u).endswith("up_proj.weight"))
    broken = done.program.clone()
    broken.weights[use] = program.weights[use]
    assert check.error(program, broken) > 1e-3


@pytest.mark.parametrize("entry", zoo.ZOO, ids=lambda entry: entry.name)
def test_models_that_fold_have_no_pairs(entry) -> None:
    from tests.captured import folded

    found = folded(entry.name)
    plan, paired = (choose(found.folded, RECIPE, pairs=pairs) for pairs in (False, True))
    if entry.name not in ("bert", "gemma3"):
        assert paired == plan
    for choice in (plan, paired):
        assert choice.recipe == RECIPE


def test_pairs_are_made_only_where_rotations_are_asked_for() -> None:
    _, folded, *_ = programs("a base model")
    assert choose(folded, replace(RECIPE, rotation="off"), pairs=True).paired == ()
    # no fast form, so nothing can run with the model
    assert choose(folded, replace(RECIPE, online="haar"), pairs=True).paired == ()

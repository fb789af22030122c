"""Models of the zoo that have been rounded, ready to be refined, and a small one for whole runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpass.analyze import find_heads, find_matmuls
from qpass.calibrate import Codes
from qpass.formats import QuantSpec
from qpass.plan import Plan, Quantized, Recipe, Role
from qpass.plan.refiner import Refining
from qpass.refine.pair import Pair
from qpass.rounding import ROUNDINGS
from tests.calibrate.test_rounded import batches
from tests.captured import folded, specimen

INT3 = QuantSpec("int3", "channel")
INT8_TOKENS = QuantSpec("int8", dynamic=True)


def refining(
    name: str,
    weight: QuantSpec = INT3,
    *,
    activation: QuantSpec | None = None,
    count: int = 5,
    weigh_tokens: bool = True,
) -> Refining:
    """All products but heads rounded to nearest, and some batches."""
    reference = folded(name).folded
    matmuls = find_matmuls(reference)
    heads = find_heads(reference, matmuls)
    codes, entries = Codes(), dict[str, Quantized]()
    for m in matmuls:
        site = reference.site(m.use)
        if m.node in heads or site in entries:
            continue
        value = reference.weights[m.use].evaluate(reference.sources)
        value_nk = value if m.reads == 1 else value.mT.contiguous()
        codes.put(site, ROUNDINGS["nearest"].round(value_nk, weight, {}))
        entries[site] = Quantized(site, Role.LINEAR, weight, activation, "nearest")
    recipe = Recipe("test", weight=weight, activation=activation, weigh_tokens=weigh_tokens)
    captured = specimen(name)[2]
    flat = [captured.flatten(batch) for batch in batches(name, count)]
    plan = Plan(recipe, quantized=tuple(entries.values()))
    return Refining(reference.clone(), reference, plan, flat, [None] * count, codes)


def bytes_of(task: Refining) -> dict[str, list[int]]:
    """Everything that a refinement may have changed."""
    found: dict[str, Tensor] = {}
    for entry in task.plan.quantized:
        codes = task.codes.get(entry.site)
        assert codes is not None
        found[entry.site] = codes.dequantize(torch.float32)
    for use, weight in task.program.weights.items():
        if weight != task.reference.weights.get(use):
            found[use] = weight.evaluate(task.program.sources)
    return {k: v.contiguous().view(torch.uint8).reshape(-1).tolist() for k, v in found.items()}


def lost(task: Refining, unseen: int = 4) -> float:
    """The relative squared error of the first output on batches that come after the task's."""
    name = next(n for n in ("gpt2", "llama", "bert", "vision", "gpt_neox") if _is(n, task))
    captured, count = specimen(name)[2], len(task.batches)
    flat = [captured.flatten(batch) for batch in batches(name, count + unseen)[count:]]
    new = Refining(task.program, task.reference, task.plan, flat, [None] * unseen, task.codes)
    pair = Pair(new)
    wants = pair.float.advance(task.reference.outputs[0].name)
    gots = pair.quantized.advance(task.program.outputs[0].name)
    error = sum(float((g - w).square().sum()) for g, w in zip(gots, wants, strict=True))
    return error / sum(float(w.square().sum()) for w in wants)


def _is(name: str, task: Refining) -> bool:
    return folded(name).folded is task.reference


class Small(nn.Module):
    """Two residual layers with norms."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(3 * width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.tanh(up(norm(x))))
        return x


def rows(count: int = 6, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(1 + torch.randn(count, 60, width, generator=generator))

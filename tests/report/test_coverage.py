"""Does every weight of a product count once, by how its input is rotated, and with a reason?"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import qpass
from qpass.plan import Recipe
from qpass.plan.choose import choose
from qpass.report.coverage import find_coverage, online_widths
from qpass.transform import rewrite
from tests import zoo
from tests.captured import folded
from tests.zoo import _GATED, tiny, tokens


def entries(model: nn.Module, *names: str) -> int:
    """The entries of the linears and experts whose paths end with one of `names`."""
    return sum(
        p.numel()
        for path, p in model.named_parameters()
        if p.dim() > 1 and path.removesuffix(".weight").endswith(names)
    )


@pytest.mark.parametrize("name", [entry.name for entry in zoo.ZOO])
def test_fractions_sum_to_one_and_what_is_declined_has_a_reason(name: str) -> None:
    program = folded(name).folded
    plan = choose(program, Recipe("all"))
    after = rewrite(program, plan).program
    coverage = find_coverage(after)
    assert sum(coverage) == pytest.approx(1)
    assert coverage.online > 0
    assert bool(online_widths(after)) is bool(plan.online)
    off = choose(program, Recipe("none", rotation="off"))
    assert find_coverage(rewrite(program, off).program) == (0, 0, 1)


def test_a_decoder_reads_all_but_the_inner_width_by_folding() -> None:
    model, inputs = zoo.specimen("llama").build(0), zoo.specimen("llama").inputs()
    inner = entries(model, "down_proj")
    total = entries(model, "_proj", "lm_head")
    found = qpass.inspect(model, inputs)
    report = qpass.rotate(model, inputs)
    assert found.coverage == report.coverage
    assert report.coverage.online == pytest.approx(inner / total)
    assert report.coverage.folded == pytest.approx(1 - inner / total)
    # one for each layer
    assert report.online == found.online == (80, 80)
    for text in (str(report), str(found)):
        assert "2 x 80" in text
        assert f"{report.coverage.online:.4g}" in text


def test_products_of_one_value_share_a_transform() -> None:
    program = folded("bert").folded
    plan = choose(program, Recipe("all"))
    # q, k and v of two layers read two values
    assert len(plan.online) > len(online_widths(rewrite(program, plan).program))


def test_experts_count() -> None:
    config = hf.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2)
    model, inputs = tiny(config, dtype=torch.float32), {"input_ids": tokens()}
    experts = entries(model, "experts.down_proj")
    assert experts
    total = entries(model, "_proj", "lm_head", "gate")
    report = qpass.rotate(model, inputs)
    assert report.coverage.online == pytest.approx(experts / total)
    assert report.coverage.declined == 0
    online = {o.site for o in report.plan.online}
    assert online == {f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)}


def test_a_part_of_an_input_counts_as_a_part() -> None:
    class Joined(nn.Module):
        """Half of what `last` reads comes from a linear, the other half from outside."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.last(torch.cat((self.first(x), y), -1))

    model = Joined().double()
    zoo.randomise(model, 0)
    report = qpass.rotate(model, (torch.randn(3, 6).double(), torch.randn(3, 8).double()))
    assert report.max_error < 1e-12
    half, whole = 8 * 5, 16 * 5 + 6 * 8
    assert report.coverage.folded == pytest.approx(half / whole)
    assert sum(report.coverage) == pytest.approx(1)

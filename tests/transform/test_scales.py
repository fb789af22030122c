"""Do learned multipliers of residual branches move into the products in front of them?"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.capture import capture
from qpass.errors import QpassError
from qpass.ir import Ones, run_passes
from qpass.plan import Plan, Recipe
from qpass.transform import FoldNorms, FoldScales, carry_out
from tests.zoo import randomise, tiny

WIDTH, EXACT = 12, 1e-12


class Branch(nn.Module):
    """A branch with a multiplier of its own behind its last product."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=how != "no bias")
        self.scale, self.how = nn.Parameter(torch.ones(WIDTH)), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(nn.functional.gelu(self.up(self.norm(x))))
        if self.how == "reshaped":
            y = (self.scale * y.flatten(0, 1)).view_as(x)
        elif self.how == "read twice":
            y = y * self.scale + y
        elif self.how == "squared":
            y = y * y * self.scale
        else:
            y = self.scale * y
        return x + y


def net(how: str) -> nn.Module:
    made = nn.Sequential(nn.Linear(5, WIDTH), Branch(how), Branch(how), nn.Linear(WIDTH, 7))
    if how == "shared":
        made[2] = made[1]
    made = made.double().eval()
    randomise(made, 0)
    return made


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("how", ["plain", "no bias", "reshaped"])
@torch.no_grad()
def test_the_stream_turns_and_nothing_changes(how: str) -> None:
    model, x = net(how), values(2, 3, 5)
    fresh, other = copy.deepcopy(model), values(4, 6, 5)
    report = qpass.rotate(model, x)
    stream = [r for r in report.plan.rotated if r.transform.width == WIDTH]
    assert len(stream) == 1
    assert report.max_error <= EXACT
    assert report.plan.paired == ()
    for branch in (model[1], model[2]):
        assert torch.equal(branch.scale, torch.ones_like(branch.scale))
    want = fresh(other)
    assert (model(other) - want).abs().max() <= EXACT * want.abs().max()
    # what was scaled is not shown as it was, so it is not shown at all
    model[1].down.register_forward_hook(lambda *_: None)
    with pytest.raises(QpassError, match="gain behind it"):
        model(other)


@pytest.mark.parametrize("how", ["read twice", "squared", "shared"])
@torch.no_grad()
def test_a_gain_that_meets_something_else_stays(how: str) -> None:
    model, x = net(how), values(2, 3, 5)
    captured = capture(model, x)
    folded, notes = run_passes(captured.program, [FoldNorms(), FoldScales()])
    assert not any(note.done and note.where.endswith("scale") for note in notes)
    gains = [w for u, w in folded.weights.items() if folded.site(u).endswith("scale")]
    assert gains
    assert not any(w.steps and isinstance(w.steps[-1], Ones) for w in gains)
    want = model(x)
    report = qpass.rotate(model, x)
    assert report.max_error <= EXACT
    assert (model(x) - want).abs().max() <= EXACT * want.abs().max()


@torch.no_grad()
def test_gains_stay_where_nothing_turns() -> None:
    model, x = net("plain"), values(2, 3, 5)
    program = capture(model, x).program
    folded, _ = run_passes(program, [FoldNorms(), FoldScales()])
    assert carry_out(program, folded, Plan(Recipe("none"))).program is program


@torch.no_grad()
def test_a_vision_model_with_layer_scales_folds() -> None:
    config = hf.Dinov2Config(
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=8,
        patch_size=4,
    )
    model = tiny(config, kind=hf.AutoModel)
    x = {"pixel_values": values(2, 3, 8, 8)}
    want = model(**x).last_hidden_state
    report = qpass.rotate(model, x)
    assert report.max_error <= EXACT
    # the channels of the image, one to turn back in front of the last norm, and the inner widths
    assert report.online == (3, 36, 72, 72)
    assert report.coverage.folded > 0.6
    got = model(**x).last_hidden_state
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()

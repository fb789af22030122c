"""Do learned rotations work on an encoder-decoder, and say why where nothing can turn?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qpass.plan.chooser import CHOOSERS, Task
from qpass.rotations import Element, Group, contains
from qpass.search import kurtail, whole
from qpass.search.holdout import Holdout
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.architectures.catalogue import architecture
from tests.architectures.models import subject
from tests.search.driver import W4A4, score_under_clips, task_of

EXACT = 1e-9
# what each looks at on held-out data
JUDGES = {
    "learned": score_under_clips,
    "kurtail": lambda given, plan: Holdout(given).score(plan),
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    """As many as show that it learns."""
    monkeypatch.setattr(whole, "MOST_STEPS", 5)
    monkeypatch.setattr(kurtail, "STEPS", 10)


def calls(name: str) -> Task:
    tiny = subject(architecture(name))
    model = tiny.model.float().eval()
    model.config.use_cache = False

    def single(given: dict[str, object]) -> dict[str, Tensor]:
        return {
            key: value.float() if value.is_floating_point() else value
            for key, value in given.items()
            if isinstance(value, Tensor)
        }

    first = single(dict(tiny.first))
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            k: v + 0.1 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for k, v in first.items()
        }
        for _ in range(4)
    ]
    return task_of(model, first, W4A4, data)


@pytest.mark.parametrize("method", JUDGES)
def test_an_encoder_decoder_learns_in_its_groups(method: str) -> None:
    given = calls("t5")
    assert len(given.plan.rotated) > 2
    plan, notes = CHOOSERS[method].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert JUDGES[method](given, plan) <= JUDGES[method](given, given.plan)
    assert (plan != given.plan) is notes[0].done
    for choice in plan.rotated:
        if isinstance(choice.transform, Element):
            group = Group.ORTHOGONAL_ONES if choice.transform.lifted else Group.ORTHOGONAL
            assert all(contains(group, each) for each in choice.transform.matrix())


@pytest.mark.parametrize("method", JUDGES)
def test_where_no_region_is_free_one_line_says_so(method: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    inputs = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    given = task_of(model, {"input": inputs[0]}, W4A4, [{"input": x} for x in inputs])
    plan, notes = CHOOSERS[method].choose(given)
    assert plan == given.plan
    assert not notes[0].done
    assert "can turn" in notes[0].why
    assert "\n" not in notes[0].why

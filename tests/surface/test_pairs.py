"""Does one plan with pairs serve compiled graphs and modules alike?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import qpass
import qpass.targets.inductor
from qpass.plan import Plan, Recipe
from tests.zoo import _GATED, tiny, tokens


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", lambda graph, *_, **__: graph)
    yield
    torch._dynamo.reset()


def test_a_plan_with_pairs_serves_graph_and_module_alike(no_inductor: None, tmp_path: Path) -> None:
    model, again = (tiny(hf.LlamaConfig(**_GATED), kind=hf.AutoModel) for _ in range(2))
    path, x = tmp_path / "plan.json", tokens()
    recipe = Recipe("rotated", head="float", embedding="float")
    with torch.no_grad():
        want = model(x).last_hidden_state
        compiled = torch.compile(
            model, backend="qpass", options={"recipe": recipe, "save_plan": path}
        )
        got = compiled(x).last_hidden_state
    plan = Plan.load(path)
    (choice,) = plan.paired
    assert "1 instead of 4" in choice.why
    # what is left: the inner width, and what heads pass on, as a cache may hold their values
    assert {o.site.split(".")[-2] for o in plan.online} == {"down_proj", "o_proj"}
    report = qpass.rotate(again, {"input_ids": x}, plan=path)
    assert report.plan.paired == plan.paired
    with torch.no_grad():
        other = again(x).last_hidden_state
    for found in (got, other):
        assert (found - want).abs().max() < 1e-5 * want.abs().max()

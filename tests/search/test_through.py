"""Are gradients through stretches those of the whole program at once?"""

from __future__ import annotations

import pytest
import torch

from qpass.analyze import find_matmuls
from qpass.calibrate import backward
from qpass.calibrate.outputs import Outputs
from qpass.search.through import Through
from tests.captured import folded, specimen
from tests.search.driver import batch

MODELS = ("llama", "gpt2", "bert", "vision", "gemma3", "gpt_neox")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_stretches_are_those_of_the_whole(name: str, monkeypatch) -> None:
    monkeypatch.setattr(backward, "TOGETHER", 2)
    program, inputs = folded(name).folded, folded(name).inputs
    products = find_matmuls(program)
    uses = {m.use for m in products}
    _, given, captured = specimen(name)
    other = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in captured.flatten(batch(given, 1))
    ]
    want = [t.detach() if isinstance(t, torch.Tensor) else t for t in program.run(*other)]
    compared = Outputs(program)

    def gradients(run) -> dict[str, torch.Tensor]:
        leaves = {u: program.value(program.node(u)).requires_grad_() for u in sorted(uses)}
        # two uses of one stored tensor are two leaves
        loss = compared.distance(run(leaves), want)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    through = Through(program, {m.node for m in products})
    assert len(through._parts) > 1
    got = gradients(lambda w: through.outputs(inputs, w.get))
    whole = gradients(lambda w: program.run(*inputs, weights=w, gradients=True))
    for use, gradient in whole.items():
        torch.testing.assert_close(got[use], gradient, rtol=1e-5, atol=1e-7)
    assert any(bool(g.any()) for g in whole.values())
    with torch.no_grad():
        for got, value in zip(through.outputs(inputs, {}.get), program.run(*inputs), strict=True):
            torch.testing.assert_close(got, value)

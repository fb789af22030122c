"""Is the divergence of a few likely choices that of all, and how far below it otherwise?"""

from __future__ import annotations

import pytest
import torch

from qpass.calibrate.outputs import Outputs
from qpass.search import divergence
from qpass.search.divergence import Likeliest, Wanted
from tests.captured import folded, specimen
from tests.search.driver import batch


def scores(seed: int, size: float = 3.0) -> torch.Tensor:
    return size * torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(seed))


def exact(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    log_p, log_q = want.log_softmax(-1), got.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("choices", [40, 10, 3, 1])
def test_fewer_choices_bound_it_from_below(monkeypatch, choices: int) -> None:
    monkeypatch.setattr(divergence, "CHOICES", choices)
    want, got = scores(0), scores(0) + scores(1, 0.3)
    found, all_ = Likeliest.of(want).divergence(got), exact(want, got)
    if choices == 40:
        torch.testing.assert_close(found, all_)
    else:
        assert 0.2 * all_ < found < all_
    assert abs(float(Likeliest.of(want).divergence(want + 1.5))) < 1e-5


def test_its_gradient_is_that_of_the_divergence(monkeypatch) -> None:
    monkeypatch.setattr(divergence, "CHOICES", 30)
    want, got = scores(0), (scores(0) + scores(1, 0.3)).requires_grad_()
    (few,) = torch.autograd.grad(Likeliest.of(want).divergence(got), got)
    (all_,) = torch.autograd.grad(exact(want, got), got)
    assert torch.cosine_similarity(few.flatten(), all_.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", ["llama", "bert", "vision"])
def test_it_is_the_distance_that_choices_are_made_by(name: str) -> None:
    _, given, captured = specimen(name)
    program = folded(name).program
    batches = [captured.flatten(batch(given, seed)) for seed in range(3)]
    batches = [
        [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in b]
        for b in batches
    ]
    wanted, compared = Wanted(program, batches), Outputs(program)
    outputs = [program.run(*b) for b in batches]
    torch.testing.assert_close(
        wanted.loss(1, outputs[2]), compared.distance(outputs[2], outputs[1]), rtol=1e-4, atol=1e-6
    )
    assert abs(float(wanted.loss(0, outputs[0]))) < 1e-6

"""Is the error of a replaced module the one its definition says, in any basis?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qpass import quantize
from qpass.formats import QuantSpec
from qpass.ir import Block, ChangeBasis
from qpass.rotations import Transform
from qpass.verify import evaluate
from qpass.verify.sites import POSITIONS, state_megabytes
from tests.zoo import specimen

V, N = 9, 6


class Rounded(nn.Module):
    """A linear layer with another weight: stands for a quantized one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(V, N, dtype=torch.float64)
        self.first = nn.Linear(N, N, bias=False, dtype=torch.float64)
        self.second = nn.Linear(N, N, bias=False, dtype=torch.float64)
        self.head = nn.Linear(N, V, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.second(self.first(self.embed(input_ids)).tanh()))


def ids(b: int, t: int) -> Tensor:
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(1))


def test_error_of_a_replaced_module() -> None:
    reference = Net()
    model = copy.deepcopy(reference)
    model.first = Rounded(reference.first.weight * 1.25)
    found = evaluate(model, reference, [ids(2, 5), ids(1, 7)])
    assert [site.path for site in found.sites] == ["first"]
    assert found.sites[0].error == pytest.approx(0.25, rel=1e-12)


def test_a_model_without_replaced_modules_has_no_sites() -> None:
    assert evaluate(Net(), Net(), [ids(1, 5)]).sites == ()


def test_hooks_are_gone_after() -> None:
    reference = Net()
    model = copy.deepcopy(reference)
    model.first = Rounded(reference.first.weight)
    evaluate(model, reference, [ids(1, 5)])
    assert not any(m._forward_hooks for net in (model, reference) for m in net.modules())


def test_the_sample_begins_at_the_first_position_and_skips_padding() -> None:
    reference = Net()
    model = copy.deepcopy(reference)
    odd = reference.first.weight.clone()
    model.first = Rounded(odd)
    t = 2 * POSITIONS
    batch = ids(1, t)
    batch[0, 0] = V - 1
    batch[0, 1:] = batch[0, 1:].clamp(max=V - 2)
    with torch.no_grad():
        # only the token at position 0 is embedded differently, and only there is the output wrong
        model.embed.weight[V - 1] *= 2
    found = evaluate(model, reference, [batch])
    assert found.sites[0].error is not None
    assert found.sites[0].error > 0.05
    mask = torch.ones(1, t, dtype=torch.int64)
    mask[0, 0] = 0
    masked = evaluate(model, reference, [{"input_ids": batch, "attention_mask": mask}])
    assert masked.sites[0].error == 0.0


def test_outputs_in_another_basis_are_compared_in_it() -> None:
    reference = Net()
    step = ChangeBasis(Transform("hadamard", N, seed=3), -1, Block.whole(N))
    model = copy.deepcopy(reference)
    # a writer multiplies its output axis by R, its reader the matching input axis
    model.second = Rounded(step.apply(reference.second.weight.detach().T, {}).T * 1.5)
    model.head = Rounded(step.apply(reference.head.weight.detach(), {}) / 1.5)
    apart = {site.path: site.error for site in evaluate(model, reference, [ids(2, 6)]).sites}
    bases = {"second": (step,)}
    found = evaluate(model, reference, [ids(2, 6)], bases=bases)
    aligned = {site.path: site.error for site in found.sites}
    assert found.kl.value == pytest.approx(0, abs=1e-12)
    assert apart["second"] > 0.6
    assert aligned["second"] == pytest.approx(0.5, rel=1e-12)
    assert aligned["head"] == pytest.approx(0, abs=1e-12)


class Uncalled(nn.Module):
    """A module whose weight the parent reads directly."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())


class Functional(Net):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids) @ self.first.weight.T
        return self.head(self.second(x.tanh()))


def test_what_cannot_be_measured_says_why() -> None:
    reference = Functional()
    model = copy.deepcopy(reference)
    model.first = Uncalled(reference.first.weight)
    (site,) = evaluate(model, reference, [ids(1, 5)]).sites
    assert site.error is None
    assert "not called" in site.why


def test_only_the_innermost_replaced_modules_count() -> None:
    class Other(Net):
        pass

    reference, model = Net(), Other()
    model.load_state_dict(reference.state_dict())
    model.second = Rounded(reference.second.weight)
    assert [site.path for site in evaluate(model, reference, [ids(1, 5)]).sites] == ["second"]


def test_shared_weights_are_stored_once() -> None:
    net = Net()
    untied = state_megabytes(net)
    assert untied == pytest.approx((2 * V * N + 2 * N * N) * 8 / 1e6)
    net.head.weight = net.embed.weight
    assert state_megabytes(net) == pytest.approx(untied - V * N * 8 / 1e6)
    found = evaluate(net, Net(), [ids(1, 5)])
    assert (found.megabytes, found.reference_megabytes) == (state_megabytes(net), untied)


@pytest.mark.parametrize(
    "weight",
    [
        QuantSpec("int4"),
        QuantSpec("int3", 16),
        QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sizes_of_quantized_models_are_those_of_what_they_save(
    name: str, weight: QuantSpec
) -> None:
    case = specimen(name)
    model = case.build(0).float()
    quantize(model, {"weight": weight, "rounding": "nearest"}, inputs=dict(case.inputs()))
    saved = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    assert state_megabytes(model) == pytest.approx(sum(saved.values()) / 1e6)

"""Are channels turned in front of convolutions, exactly, and does all that a module can do work?"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qpass
import qpass.targets.inductor
from qpass.capture import capture
from qpass.ops.hadamard import HADAMARD
from qpass.targets.channels import TurnedChannels
from qpass.targets.replaceable import refusals
from tests.zoo import randomise

LIMIT = 1e-9


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Residual(nn.Module):
    """Two convolutions with batch norms and a skip that is another convolution."""

    def __init__(self, channels: int = 6, out: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # as code around a convolution may ask
        y = functional.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
        return functional.relu(self.bn2(self.conv2(y)) + self.skip(x))


class UpAndDown(nn.Module):
    """Down, up by a transposed convolution, and what was there before joined to it."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=groups)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.first(x))
        y = functional.silu(self.down(x))
        return self.last(torch.cat([functional.silu(self.up(y)), x], 1))


class Separable(nn.Module):
    """Depthwise, then 1 x 1, as in a mobile network."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.point = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(functional.relu6(self.depth(x)))


class Signals(nn.Module):
    """Convolutions over time, some in groups, padded in several ways, one called twice."""

    def __init__(self) -> None:
        super().__init__()
        modes = ("zeros", "reflect", "replicate", "circular")
        self.convs = nn.ModuleList(
            nn.Conv1d(12, 12, 3, padding=2, groups=g, padding_mode=mode)
            for g, mode in zip((1, 2, 3, 4), modes, strict=True)
        )
        self.back = nn.ConvTranspose1d(12, 9, 4, stride=2, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = functional.gelu(conv(x))
        return self.back(functional.gelu(self.convs[1](x)))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 6, 2, padding="same", padding_mode="replicate")
        self.second = nn.ConvTranspose3d(6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(functional.relu(self.first(x)))


class Next(nn.Module):
    """Depthwise 7 x 7, then a norm and linear layers over channels that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 10, 2, stride=2)
        self.depth = nn.Conv2d(10, 10, 7, padding=3, groups=10)
        self.norm, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 20), nn.Linear(20, 10)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.down(functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.head(x + y)


IMAGE, LARGER = (2, 6, 8, 8), (1, 6, 12, 10)
# a model, its first call, a call of other sizes, how many convolutions turn their channels
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], int]] = {
    "residual": (Residual, IMAGE, LARGER, 3),
    "up and down": (UpAndDown, IMAGE, LARGER, 4),
    "up in groups": (lambda: UpAndDown(4), IMAGE, LARGER, 4),
    "separable": (Separable, IMAGE, LARGER, 1),
    "signals": (Signals, (2, 12, 9), (3, 12, 14), 5),
    "volumes": (Volumes, (2, 4, 3, 4, 5), (1, 4, 5, 3, 3), 2),
    "next": (Next, IMAGE, LARGER, 2),
}
every = pytest.mark.parametrize("name", CASES)


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, first, second, _ = CASES[name]
    model = build().double().eval()
    randomise(model, 0)
    return model, seeded(*first), seeded(*second)


def turned(model: nn.Module) -> dict[str, TurnedChannels]:
    return {path: m for path, m in model.named_modules() if isinstance(m, TurnedChannels)}


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module, *calls: Tensor) -> float:
    found = [(one(x), other(x)) for x in calls]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in found)


@every
def test_channels_turn_and_nothing_else_changes(name: str) -> None:
    model, x, other = made(name)
    ref = copy.deepcopy(model)
    report = qpass.rotate(model, x)
    assert len(turned(model)) == CASES[name][3]
    assert report.max_error <= LIMIT
    assert report.coverage.declined == 0
    assert report.coverage.online > 0
    assert distance(model, ref, x, other) <= LIMIT
    assert distance(copy.deepcopy(model), ref, x) <= LIMIT
    # what a convolution is asked for is what it was, though its weight is for turned channels
    for path, layer in turned(model).items():
        before = ref.get_submodule(path)
        assert not torch.allclose(layer.inner.weight, before.weight)
        assert torch.allclose(layer.weight, before.weight)
        assert layer.bias is layer.inner.bias
        assert (layer.stride, layer.groups) == (before.stride, before.groups)
        assert layer.in_channels == layer.split * layer.transform.width


@every
def test_turned_channels_are_saved(name: str, tmp_path) -> None:
    model, x, _ = made(name)
    ref = copy.deepcopy(model)
    qpass.rotate(model, x)
    qpass.save(model, tmp_path / "saved")
    loaded = qpass.load(tmp_path / "saved", model=made(name)[0])
    assert turned(loaded).keys() == turned(model).keys()
    assert distance(loaded, ref, x) <= LIMIT
    assert distance(loaded, model, x) <= LIMIT


@every
def test_a_second_run_leaves_turned_channels_as_they_are(name: str) -> None:
    model, x, _ = made(name)
    ref = copy.deepcopy(model)
    first = qpass.rotate(model, x)
    second = qpass.rotate(model, x)
    assert second.plan.online == ()
    assert second.coverage == pytest.approx(first.coverage)
    # which layers read one value and could share its transform is no longer to be seen
    assert set(second.online) == set(first.online)
    assert distance(model, ref, x) <= LIMIT


@pytest.mark.parametrize("name", ["residual", "up in groups", "signals"])
def test_turned_channels_compile_and_export(name: str, tmp_path) -> None:
    model, x, _ = made(name)
    model, x = model.float(), x.float()
    ref = copy.deepcopy(model)
    qpass.rotate(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert distance(compiled, ref, x) <= 1e-4
    exported = torch.export.export(model, (x,)).module()
    assert distance(exported, ref, x) <= 1e-4
    report = qpass.export_onnx(model, x, tmp_path / "model.onnx")
    assert report.parity.error <= 1e-4


def test_gradients_pass_through_turned_channels() -> None:
    model, x, _ = made("up in groups")
    ref = copy.deepcopy(model)
    qpass.rotate(model, x)
    given = [x.clone().requires_grad_() for _ in range(2)]
    for one, each in zip((model, ref), given, strict=True):
        one(each).square().sum().backward()
    assert torch.allclose(given[0].grad, given[1].grad)
    assert all(p.grad is not None for p in model.parameters())


@every
def test_a_plan_turns_channels_in_a_compiled_graph(name: str, tmp_path) -> None:
    model, x, _ = made(name)
    ref = copy.deepcopy(model)
    report = qpass.rotate(copy.deepcopy(model), x)
    plan = report.plan
    plan.save(tmp_path / "plan.json")
    again = copy.deepcopy(model)
    assert qpass.rotate(again, x, plan=tmp_path / "plan.json").plan == plan
    assert distance(again, ref, x) <= LIMIT
    seen = graphs(model, x, {"plan": str(tmp_path / "plan.json")})
    assert sum(n.target is HADAMARD for n in seen) == len(report.online)
    assert distance(model, ref, x) <= LIMIT


def graphs(model: nn.Module, x: Tensor, options: dict[str, object]) -> list[torch.fx.Node]:
    """The nodes of the graph that is left to inductor; the model runs it as it is."""
    seen: list[torch.fx.Node] = []

    def run_graph(graph, inputs, config_patches=None):
        seen.extend(graph.graph.nodes)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qpass.targets.inductor, "compile_fx", run_graph)
        torch._dynamo.reset()
        model.compile(backend="qpass", options=options)
        with torch.no_grad():
            model(x)
    return seen


def test_what_quantizes_no_convolution_turns_no_channels() -> None:
    model, x, _ = made("next")
    ref = copy.deepcopy(model)
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "on"}, inputs=x)
    assert not turned(model)
    nodes = graphs(ref, x, {"recipe": {"recipe": "w8a8", "rotation": "on"}})
    assert nodes
    assert all(n.target is not HADAMARD for n in nodes)


def test_a_model_with_turned_channels_is_quantized() -> None:
    model, x, _ = made("next")
    ref = copy.deepcopy(model)
    qpass.rotate(model, x)
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "on"}, inputs=x)
    assert turned(model)
    assert distance(model, ref, x) <= 0.1


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(5, 6, 3, 3))
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.conv2d(functional.pad(x, (1, 1, 1, 1)), self.kernel)
        return self.last(functional.relu(y).mean((2, 3)))


class Scaled(nn.Conv2d):
    """A convolution that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(min=0))


class Skipping(nn.Conv2d):
    """A convolution with a path around it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Causal(nn.Conv1d):
    """A convolution of what came before, with a mask that is convolved, too."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = 0.5 * super().forward(functional.pad(x, (2, 0)))
        return (y, None) if mask is None else (y * mask.unsqueeze(1), mask.flip(-1))


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Causal(6, 8, 3), Causal(8, 5, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y, mask = self.first(x=x, mask=mask)
        return self.second(functional.silu(y), mask)[0]


class Standardised(nn.Conv2d):
    """A convolution whose weight is computed when it is used."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Otherwise(nn.Conv2d):
    """A convolution that is not the same where no graph looks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if torch.compiler.is_compiling() else x.abs())


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Functional, "its input is not rotated: it is computed in the model's own forward"),
        (
            lambda: nn.Sequential(Scaled(6, 5, 3)),
            "its input is not rotated: 0 makes what it convolves",
        ),
        (
            lambda: nn.Sequential(Skipping(6, 6, 1)),
            "its input is not rotated: 0 does not only convolve what it is given",
        ),
    ],
)
def test_what_no_module_can_hold_is_declined(build: Callable[[], nn.Module], why: str) -> None:
    model, x = build().double().eval(), seeded(*IMAGE)
    randomise(model, 0)
    ref = copy.deepcopy(model)
    report = qpass.rotate(model, x)
    assert not turned(model)
    assert any(d.why.startswith(why) for d in report.declined), report.declined
    assert report.coverage.declined > 0
    assert distance(model, ref, x) <= LIMIT
    # a graph holds it all the same
    found = qpass.inspect(model, x)
    assert any(p.why.startswith(why) for p in found.products)


def test_a_computed_weight_is_left_alone() -> None:
    model, x = nn.Sequential(Standardised(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)), seeded(*IMAGE)
    model = model.double().eval()
    ref = copy.deepcopy(model)
    qpass.rotate(model, x)
    assert turned(model).keys() == {"2"}
    assert distance(model, ref, x) <= LIMIT


def test_a_module_that_is_no_plain_convolution_is_declined() -> None:
    model, x = nn.Sequential(Otherwise(6, 5, 3)).double().eval(), seeded(*IMAGE)
    program = capture(model, x).program
    (why,) = refusals(model, program).values()
    assert "does not compute a plain convolution" in why


def test_one_channel_to_a_group_is_said_and_does_not_count() -> None:
    model, x, _ = made("separable")
    report = qpass.rotate(model, x)
    assert {d.where: d.why for d in report.declined}["depth.weight"].endswith("nothing to mix")
    assert report.coverage == (0.0, 1.0, 0.0)


def test_weights_that_are_tied_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)).double().eval()
    model[2].weight = model[0].weight
    ref, x = copy.deepcopy(model), seeded(*IMAGE)
    qpass.rotate(model, x)
    assert len(turned(model)) == 2
    assert model[0].inner.weight is model[2].inner.weight
    assert distance(model, ref, x) <= LIMIT


@pytest.mark.parametrize("masked", [True, False])
def test_what_else_a_convolution_takes_and_makes_is_left_alone(*, masked: bool) -> None:
    model = Recorder().double().eval()
    randomise(model, 0)
    ref = copy.deepcopy(model)
    # as many places as channels
    x, mask = seeded(2, 6, 6), seeded(2, 6)
    qpass.rotate(model, (x, mask) if masked else x)
    assert turned(model).keys() == {"first", "second"}
    with torch.no_grad():
        for call in ((x, mask), (x,), (x[:1], mask[:1])):
            assert torch.allclose(model(*call), ref(*call), rtol=0, atol=LIMIT)

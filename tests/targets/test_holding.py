"""Can a transform stand in front of a product that lies at no module boundary?"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qpass
from qpass.errors import BadInput, Unsupported
from qpass.targets.holding import holdings
from tests.zoo import randomise

WIDTH, INNER, EXPERTS = 8, 12, 3
EXACT = 1e-12


class Block(nn.Module):
    """What the models here share: a stream, and a product with `down` that no module does alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Parameter(torch.zeros(self.shape()))

    def shape(self) -> tuple[int, ...]:
        return (WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(functional.silu(self.up(self.norm(x))))

    def mixed(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Functional(Block):
    def mixed(self, h: Tensor) -> Tensor:
        return functional.linear(h, self.down)


class Transposed(Block):
    def mixed(self, h: Tensor) -> Tensor:
        return h.matmul(self.down.t())


class OnTheLeft(Block):
    def mixed(self, h: Tensor) -> Tensor:
        return (self.down @ h.mT).mT


class Stacked(Block):
    def shape(self) -> tuple[int, ...]:
        return (EXPERTS, WIDTH, INNER)

    def mixed(self, h: Tensor) -> Tensor:
        return sum(functional.linear(h, self.down[e]) for e in range(EXPERTS)) * 1.0


class Sent(Stacked):
    """Rows go to the matrix that their first entry asks for: sizes depend on data."""

    def mixed(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, INNER)
        which = (flat[:, 0] > 0).long() + (flat[:, 1] > 0).long()
        out = flat.new_zeros(len(flat), WIDTH)
        for e, matrix in enumerate(self.down):
            at = torch.where(which == e)[0]
            out = out.index_add(0, at, flat[at] @ matrix.T)
        return out.reshape(*h.shape[:-1], WIDTH)


class LookedUp(Stacked):
    def mixed(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, INNER)
        matrices = self.down[(flat[:, 0] > 0).long()]
        return torch.bmm(matrices, flat.unsqueeze(-1)).squeeze(-1).reshape(*h.shape[:-1], WIDTH)


class Summed(Stacked):
    def mixed(self, h: Tensor) -> Tensor:
        return torch.einsum("bti,edi->btd", h, self.down)


class Heads(Block):
    """One axis goes in, and two come out."""

    def shape(self) -> tuple[int, ...]:
        return (INNER, 2, WIDTH // 2)

    def mixed(self, h: Tensor) -> Tensor:
        return torch.einsum("bti,ihd->bthd", h, self.down).flatten(-2)


class Typed(Block):
    """A product in another type than the weight's."""

    def mixed(self, h: Tensor) -> Tensor:
        weight = self.down.type(torch.float64).to(h.device)
        return functional.linear(h.type(torch.float64), weight)


class Columns(Block):
    """`[in, out]`, with a bias that the product adds."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def shape(self) -> tuple[int, ...]:
        return (INNER, WIDTH)

    def mixed(self, h: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, h.reshape(-1, INNER), self.down)
        return flat.reshape(*h.shape[:-1], WIDTH)


class Scored(nn.Module):
    """A router whose own forward also makes weights of its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, INNER))

    def forward(self, h: Tensor) -> Tensor:
        return functional.linear(h, self.weight).softmax(-1)


class Routed(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Scored()

    def mixed(self, h: Tensor) -> Tensor:
        return torch.einsum("bte,bti,edi->btd", self.gate(h), h, self.down)


HELD = (Functional, Transposed, OnTheLeft, Stacked, Sent, LookedUp, Summed, Heads, Typed, Columns)


def made(kind: type[nn.Module]) -> nn.Module:
    model = kind().double()
    randomise(model, 0)
    return model.eval()


def given(batch: int = 2, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", HELD)
def test_the_product_reads_a_transformed_value(kind: type[nn.Module], tmp_path) -> None:
    model, ref = made(kind), made(kind)
    report = qpass.rotate(model, given())
    assert [o.site for o in report.plan.online if o.site == "down"] == ["down"]
    assert [h.site for h in holdings(model)] == ["down"]
    changed = model._parameters["down"]
    assert changed is not None
    assert (changed - ref.down).abs().max() > 0.1
    # any number of rows, and on copies of every kind
    qpass.save(model, tmp_path / "saved")
    loaded = qpass.load(tmp_path / "saved", made(kind))
    others = [copy.deepcopy(model), loaded, pickle.loads(pickle.dumps(model))]
    for x in (given(), given(3, 7), given(1, 1)):
        want = ref(x)
        for each in (model, *others):
            assert (each(x) - want).abs().max() <= EXACT * want.abs().max()
    assert type(model).__name__ == kind.__name__
    assert isinstance(model, kind)
    # a second trace sees the transform, and the model may change again
    again = qpass.rotate(model, given())
    assert not [o for o in again.plan.online if o.site == "down"]
    assert (model(given()) - ref(given())).abs().max() <= EXACT


@pytest.mark.parametrize("kind", [Functional, OnTheLeft, Stacked, LookedUp, Summed])
def test_compiled_code_is_one_graph_with_the_transform(kind: type[nn.Module]) -> None:
    model, ref = made(kind), made(kind)
    qpass.rotate(model, given())
    graphs: list[str] = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    run = torch.compile(model, backend=keep, fullgraph=True)
    with torch.no_grad():
        assert (run(given()) - ref(given())).abs().max() <= EXACT
    assert len(graphs) == 1
    assert graphs[0].count("qpass.hadamard") >= 1


@pytest.mark.parametrize("left", [False, True])
def test_compiled_products_of_squares_are_told_apart(*, left: bool) -> None:
    class Square(Block):
        def shape(self) -> tuple[int, ...]:
            return (INNER, INNER)

        def mixed(self, h: Tensor) -> Tensor:
            y = (self.down @ h.mT).mT if left else h @ self.down
            return y[..., :WIDTH]

    model, ref = made(Square), made(Square)
    qpass.rotate(model, given())
    assert [h.site for h in holdings(model)] == ["down"]
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager")
    for x in (given(), given(2, INNER), given(1, INNER)):
        with torch.no_grad():
            assert (run(x) - ref(x)).abs().max() <= EXACT


def test_the_weight_is_read_as_it_was() -> None:
    model, ref = made(Stacked), made(Stacked)
    qpass.rotate(model, given())
    # whatever code does with it: sums, other axes, other dtypes, cuts of what was turned
    for use in (
        lambda w: w * 2,
        lambda w: w.sum(-1),
        lambda w: w[..., :5],
        lambda w: w[:, 1:4].permute(2, 0, 1) + 0,
        lambda w: torch.cat([w, w], -1),
        lambda w: torch.einsum("edi,d->ei", w, torch.ones(WIDTH, dtype=w.dtype)),
        lambda w: functional.linear(torch.ones(1, WIDTH, dtype=w.dtype), w[1].T),
        lambda w: w.float(),
        lambda w: w.transpose(0, 2).flatten(),
        lambda w: w.reshape(-1),
        lambda w: w[torch.tensor([2, 0])][:, 0],
        lambda w: w.detach().norm(),
        lambda w: functional.pad(w, (1, 1)),
    ):
        got, want = use(model.down), use(ref.down)
        got = got.plain() if hasattr(got, "plain") else got
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert model.down.shape == ref.down.shape
    assert len(model.down) == EXPERTS


def test_what_writes_to_the_weight_is_refused() -> None:
    model = made(Stacked)
    qpass.rotate(model, given())
    for write in (
        lambda w: w.mul_(2),
        lambda w: nn.init.zeros_(w),
        lambda w: w[0].zero_(),
        lambda w: w.detach().add_(1),
    ):
        with pytest.raises(Unsupported, match="written"):
            write(model.down)


def test_one_weight_that_cannot_be_held_does_not_cost_the_others() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Functional(), TensorsOnly(), Transposed(), AlsoRead()])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return x

    model, ref = made(Several), made(Several)
    found = qpass.inspect(model, given())
    products = {p.site: p for p in found.products}
    assert products["parts.2.down"].input == "online"
    qpass.rotate(model, given())
    assert {h.path for h in holdings(model)} == {"parts.0", "parts.2"}
    assert (model(given()) - ref(given())).abs().max() <= 1e-9


def test_gradients_reach_the_weight() -> None:
    model, ref = made(Stacked), made(Stacked)
    qpass.rotate(model, given())
    for each in (model, ref):
        each(given()).square().sum().backward()
    held = next(iter(holdings(model)))
    grad, want = model._parameters["down"].grad, ref.down.grad
    assert held.axis == 2
    turned = held.transform.turn(want)
    assert (grad - turned).abs().max() <= 1e-9 * want.abs().max()


class AlsoRead(Functional):
    def mixed(self, h: Tensor) -> Tensor:
        return super().mixed(h) + self.down.square().sum()


class TensorsOnly(Functional):
    def mixed(self, h: Tensor) -> Tensor:
        if not isinstance(self.down, Tensor):
            raise TypeError("a tensor is needed")
        return super().mixed(h)


class Branching(Functional):
    def mixed(self, h: Tensor) -> Tensor:
        y = super().mixed(h)
        return y if isinstance(self.down, Tensor) else 2 * y


@pytest.mark.parametrize("kind", [AlsoRead, TensorsOnly, Branching])
def test_what_cannot_be_held_is_declined(kind: type[nn.Module]) -> None:
    model, ref = made(kind), made(kind)
    report = qpass.rotate(model, given())
    assert not list(holdings(model))
    assert "down" in {d.where.partition(":")[0] for d in report.declined}
    assert (model(given()) - ref(given())).abs().max() <= EXACT


def test_a_router_that_weighs_its_scores() -> None:
    model, ref = made(Routed), made(Routed)
    qpass.rotate(model, given())
    assert "gate.weight" in {h.site for h in holdings(model)}
    assert (model(given()) - ref(given())).abs().max() <= EXACT


def test_what_stays_float_gets_no_transform() -> None:
    model, ref = made(Stacked), made(Stacked)
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "on"}, inputs=given())
    assert not list(holdings(model))
    assert (model(given()) - ref(given())).abs().max() <= 0.1 * ref(given()).abs().max()


def test_a_rotated_model_is_quantized_around_what_it_holds(tmp_path) -> None:
    model, ref = made(Stacked), made(Stacked)
    qpass.rotate(model, given())
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "off"}, inputs=given())
    assert [h.site for h in holdings(model)] == ["down"]
    qpass.save(model, tmp_path / "saved")
    loaded = qpass.load(tmp_path / "saved", made(Stacked))
    want = ref(given())
    for each in (model, loaded):
        assert (each(given()) - want).abs().max() <= 0.05 * want.abs().max()


def test_a_plan_is_carried_out_again() -> None:
    plan = qpass.rotate(made(Sent), given()).plan
    model, ref = made(Sent), made(Sent)
    qpass.rotate(model, given(), plan=plan)
    assert [h.site for h in holdings(model)] == ["down"]
    assert (model(given()) - ref(given())).abs().max() <= EXACT


def test_another_model_is_refused_when_loading(tmp_path) -> None:
    model = made(Stacked)
    qpass.rotate(model, given())
    qpass.save(model, tmp_path / "saved")

    class Other(Stacked):
        def __init__(self) -> None:
            super().__init__()
            down = self.down.detach().double()
            del self.down
            self.register_buffer("down", down)

    with pytest.raises(BadInput, match="down"):
        qpass.load(tmp_path / "saved", Other().double())

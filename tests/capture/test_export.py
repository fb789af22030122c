"""Whether a captured program is the model: its values, weights, owners, sizes and refusals."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qpass.capture import capture
from qpass.errors import BadInput, CaptureFailed
from qpass.ir import Affine, Owner, Permute, Reshape
from tests.capture.models import Apply, noise, operators, randomised
from tests.captured import specimen
from tests.zoo import ZOO, tokens

# a few float32 roundings: rotary angles and norms of float64 models are computed in float32
ROUNDING = 2e-6


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_programs_of_the_zoo_are_the_models(entry):
    model, inputs, captured = specimen(entry.name)
    assert all(note.done for note in captured.notes), captured.notes
    with torch.no_grad():
        want = model(**inputs)
    want = want if isinstance(want, torch.Tensor) else want[0]
    got = captured.program.run(*captured.flatten(inputs))[0]
    assert (got - want).abs().max() <= ROUNDING * want.abs().max()


def test_a_program_runs_on_other_batches_and_lengths():
    model = ZOO[0].build(0)
    captured = capture(model, tokens(1, 7))  # one row must not fix the batch
    assert captured.output_names == ("logits",)
    for batch, length in ((3, 4), (1, 11), (2, 2)):
        ids = tokens(batch, length, seed=batch)
        (got,) = captured.program.run(*captured.flatten(ids))
        want = model(ids).logits.detach()
        assert (got - want).abs().max() <= ROUNDING * want.abs().max()


def test_the_model_is_left_as_it_was():
    model = ZOO[0].build(0)
    model.model.train()
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    training = [module.training for module in model.modules()]
    config = model.config.to_dict()
    program = capture(model, tokens()).program
    program.run(tokens())
    program.run(tokens(), widen=True)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == training
    assert model.config.to_dict() == config
    assert all(program.sources[name] is model.get_parameter(name) for name in before)


class Shared(nn.Module):
    """One matrix as a table, as a head, transposed, through its parent and in a sum."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.table.weight
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.empty(6))
        self.register_buffer("shift", torch.empty(6))

    def forward(self, ids):
        x = self.inner(self.table(ids)) * (2 - self.scale / 4).view(1, 1, 6) + self.shift
        x = x + nn.functional.linear(x, self.inner.weight) @ self.inner.weight
        return self.head(x), x @ self.table.weight.T


def test_each_use_of_a_weight_has_its_placeholder_and_owner():
    model = randomised(Shared())
    program = capture(model, tokens(2, 5) % 9).program
    uses = [(w.source, program.owners[name], w.steps) for name, w in program.weights.items()]
    transpose, vector = Permute((1, 0)), (Affine(0.25, 0.0), Affine(-1.0, 2.0), Reshape((1, 1, 6)))
    assert sorted(uses, key=str) == sorted(
        [
            ("table.weight", Owner("table", "weight"), ()),
            ("table.weight", Owner("head", "weight"), ()),
            ("table.weight", Owner("table", "weight"), ()),
            ("head.bias", Owner("head", "bias"), ()),
            ("inner.weight", Owner("inner", "weight"), ()),
            ("inner.weight", Owner("inner", "weight"), ()),
            ("inner.weight", Owner("inner", "weight", (transpose,)), (transpose,)),
            ("inner.bias", Owner("inner", "bias"), ()),
            ("scale", Owner("", "scale", vector), vector),
            ("shift", Owner("", "shift"), ()),
        ],
        key=str,
    )
    for name in program.weights:
        (node,) = (n for n in program.graph.nodes if n.name == name)
        assert len(node.users) == 1
    ids = tokens(3, 4, seed=5) % 9
    for got, want in zip(program.run(ids), model(ids), strict=True):
        torch.testing.assert_close(got, want.detach())


def test_a_module_that_runs_twice_has_two_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    program = capture(randomised(Twice()), noise(2, 6)).program
    assert (
        sorted(w.source for w in program.weights.values())
        == ["layer.bias"] * 2 + ["layer.weight"] * 2
    )
    assert set(program.owners.values()) == {Owner("layer", "weight"), Owner("layer", "bias")}


def test_casts_of_weights_need_no_step_and_round_as_before():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(6))

        def forward(self, x):
            return x.float() * (1 + self.weight.float()), x * (1 + self.weight)

    model = randomised(Wide()).bfloat16()
    x = noise(3, 6, dtype=torch.bfloat16)
    program = capture(model, x).program
    assert operators(program) == ["aten.to.dtype", "aten.mul.Tensor", "aten.mul.Tensor"]
    for got, want in zip(program.run(x), model(x), strict=True):
        assert torch.equal(got, want.detach())


def test_what_says_nothing_is_dropped():
    def padded(x):
        x = x.to(x.dtype).contiguous().detach()[:, :].view(x.shape) * 1.0
        x = nn.functional.dropout(x + 0, 0.5, training=False).expand(x.shape).clone()
        return (torch.tensor(0.5) * x).relu().type_as(x)

    program = capture(Apply(padded), noise(2, 6)).program
    assert program.text() == (
        "%0 = input 0\n%1 = aten.mul.Tensor(%0, 0.5)\n%2 = aten.relu(%1)\nreturn %2\n"
    )


def test_writes_in_place_become_values(monkeypatch):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            y = self.linear(x)
            y += x
            z = y.view(-1)
            z.mul_(2)
            return y

    model, x = randomised(Writes()), noise(3, 6)
    program = capture(model, x).program
    assert not any(name.split(".")[1].endswith("_") for name in operators(program))
    torch.testing.assert_close(program.run(x)[0], model(x).detach())


@pytest.mark.parametrize("writes", [False, True])
def test_functions_over_axes_are_written_out(*, writes: bool):
    class Masks(nn.Module):
        def forward(self, x):
            rows, columns = torch.arange(x.shape[0]), torch.arange(x.shape[1])
            near = torch.vmap(torch.vmap(lambda i, j: i >= j, (None, 0)), (0, None))
            y = torch.where(near(rows, columns), x, x * 2)
            if writes:
                y += x
            return y

    captured, other = capture(Masks(), noise(5, 6)), noise(4, 3)
    (got,) = captured.program.run(*captured.flatten(other))
    torch.testing.assert_close(got, Masks()(other))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhqd,bhkd->bhqk", ((2, 3, 4, 5), (2, 3, 6, 5))),
        ("bqhd,bkhd->bhqk", ((2, 4, 3, 5), (2, 6, 3, 5))),
        ("btd,df->btf", ((2, 4, 5), (5, 6))),
        ("fd,btd->btf", ((6, 5), (2, 4, 5))),
        ("abc,cbd->da", ((2, 3, 4), (4, 3, 5))),
    ],
)
def test_einsums_of_two_matrices_are_products(equation, shapes):
    model = Apply(lambda a, b: torch.einsum(equation, a, b))
    values = tuple(noise(*shape, seed=i) for i, shape in enumerate(shapes))
    program = capture(model, values).program
    assert "aten.matmul" in operators(program)
    assert "aten.einsum" not in operators(program)
    torch.testing.assert_close(program.run(*values)[0], model(*values))


@pytest.mark.parametrize(
    ("equation", "value", "weight"),
    [
        ("bthd,hdo->bto", (2, 4, 3, 5), (3, 5, 6)),
        ("btd,dhk->bthk", (2, 4, 5), (5, 3, 6)),
        ("fd,btd->btf", (2, 4, 5), (6, 5)),
    ],
)
def test_einsums_with_a_weight_have_it_on_the_right(equation, value, weight):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(weight))

        def forward(self, x):
            operands = (x, self.weight)
            return torch.einsum(equation, *(operands if equation[0] == "b" else operands[::-1]))

    model, x = randomised(Weighted()), noise(*value)
    program = capture(model, x).program
    # a product with a weight is a linear layer, whose values stand on the left
    assert operators(program).count("aten.linear") == 1
    assert "aten.permute" not in operators(program)
    torch.testing.assert_close(program.run(x)[0], model(x).detach())


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("ab,ab->ab", ((2, 3),) * 2), ("ab,cd->abcd", ((2, 3),) * 2), ("ab,bc->a", ((2, 3), (3, 4)))],
)
def test_other_einsums_stay(equation, shapes):
    values = tuple(noise(*shape, seed=i) for i, shape in enumerate(shapes))
    program = capture(Apply(lambda a, b: torch.einsum(equation, a, b)), values).program
    assert operators(program) == ["aten.einsum"]


def test_names_of_nested_outputs():
    def nested(x):
        return {"a": x + 1, "b": (x * 2, [x - 1]), "none": None}

    captured = capture(Apply(nested), noise(2, 3))
    assert captured.output_names == ("a", "b.0", "b.1.0")


def test_arguments_may_be_passed_by_position_or_name():
    class Two(nn.Module):
        def forward(self, x, y, flip=False):
            return x - y if flip else y - x

    captured = capture(Two(), (noise(2, 3), noise(2, 3, seed=2)))
    x, y = noise(4, 3), noise(4, 3, seed=5)
    for inputs in ((x, y), {"y": y, "x": x}):
        assert torch.equal(captured.program.run(*captured.flatten(inputs))[0], y - x)
    with pytest.raises(BadInput, match="was traced on"):
        captured.flatten((x, y, True))
    with pytest.raises(BadInput, match="shape"):
        captured.flatten((x[0], y))


def test_inputs_that_do_not_fit():
    model = nn.Linear(3, 3)
    with pytest.raises(BadInput, match="forward"):
        capture(model, {"tokens": tokens()})
    with pytest.raises(BadInput, match="missing a required argument"):
        capture(model, ())
    with pytest.raises(BadInput, match="Linear itself fails"):
        capture(nn.Linear(3, 3), noise(2, 4))
    with pytest.raises(BadInput, match="tensor, a tuple"):
        capture(nn.Linear(3, 3), 3)


def test_models_without_a_graph_are_refused():
    def branches(x):
        return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureFailed, match="depend on tensor values"):
        capture(Apply(branches), noise(2, 3))

    def mixed(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.T

    with pytest.raises(CaptureFailed, match="autocast"):
        capture(Apply(mixed), noise(3, 3))

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(CaptureFailed, match="writes to calls"):
        capture(Counts(), noise(2, 3))


def test_disabled_autocast_and_gradient_modes_are_written_in_place():
    def modes(x):
        with torch.autocast("cpu", enabled=False):
            y = x @ x.T
        with torch.enable_grad():
            return y.relu()

    program = capture(Apply(modes), noise(3, 3)).program
    assert operators(program)[-2:] == ["aten.matmul", "aten.relu"]
    torch.testing.assert_close(program.run(noise(3, 3))[0], modes(noise(3, 3)))


def test_sizes_that_the_model_fixes_are_noted():
    class Fixed(nn.Module):
        def forward(self, ids):
            return ids.reshape(-1, 2, 5).sum(0)

    captured = capture(Fixed(), tokens(4, 5))
    assert [note.where for note in captured.notes] == ["ids"]
    assert "axis 1 has the fixed size 5" in captured.notes[0].why


class Writes(nn.Module):
    """Writes in place to new values that nothing else sees, or to one that a view shows."""

    def __init__(self, *, shown: bool) -> None:
        super().__init__()
        self.up, self.shown = nn.Linear(6, 8), shown

    def forward(self, x: Tensor) -> Tensor:
        made = self.up(x)
        view = made.view(-1, 2, 4) if self.shown else x
        made.mul_(0.5).add_(1)
        values, places = made.topk(3, dim=-1)
        values /= values.sum(-1, keepdim=True)
        spread = torch.zeros_like(made).scatter(-1, places, values)
        return spread + made + view.sum()


@pytest.mark.parametrize("shown", [False, True])
def test_only_writes_that_are_seen_take_the_general_way(
    monkeypatch: pytest.MonkeyPatch, *, shown: bool
) -> None:
    general: list[object] = []
    real = ExportedProgram.run_decompositions

    def counted(exported: ExportedProgram, *given: object) -> ExportedProgram:
        general.append(exported)
        return real(exported, *given)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    torch.manual_seed(0)
    model, x = Writes(shown=shown).double(), torch.randn(3, 6, dtype=torch.float64)
    captured = capture(model, x)
    (got,) = captured.program.run(*captured.flatten(x))
    assert torch.equal(got, model(x))
    # the slow way is for what is seen elsewhere
    assert bool(general) is shown


class Shaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: Tensor, shape: torch.Size) -> Tensor:
        return self.up(x).reshape(*shape, 4, 2)


def test_a_size_is_taken_for_the_tuple_that_it_is() -> None:
    model, x = Shaped().double(), torch.randn(3, 6, dtype=torch.float64)
    captured = capture(model, (x, x.shape[:1]))
    (got,) = captured.program.run(*captured.flatten((x, x.shape[:1])))
    assert torch.equal(got, model(x, x.shape[:1]))
    assert len(captured.flatten((x, (3,)))) == len(captured.flatten((x, x.shape[:1])))

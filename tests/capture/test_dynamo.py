"""Whether the graph that dynamo hands to a backend becomes the same program as an export."""

import contextlib

import pytest
import torch
import transformers as hf
from torch import nn

from qpass.capture import Traced, capture, capture_graph
from qpass.errors import CaptureFailed
from tests.capture.models import noise, operators, randomised
from tests.zoo import tiny, tokens

ROUNDING = 2e-6  # a few float32 roundings


class Backend:
    """A backend that runs the captured program; `graphs` holds all it was given."""

    def __init__(self):
        self.graphs: list[Traced] = []

    def __call__(self, module, example_inputs):
        traced = capture_graph(module, example_inputs)
        self.graphs.append(traced)
        return lambda *args: traced.program.run(*(args[i] for i in traced.positions))


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def _close(got, want):
    assert (got - want).abs().max() <= ROUNDING * want.abs().max()


GATED = hf.LlamaConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    pad_token_id=0,
    tie_word_embeddings=True,
)
PLAIN = hf.GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=3, n_positions=16)


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
def test_both_doors_give_one_program(config, backend):
    model = tiny(config, dtype=torch.float32)
    captured = capture(model, tokens())
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=True)
        want = model(tokens(), use_cache=False).logits
        _close(compiled(tokens(), use_cache=False).logits, want)
    (traced,) = backend.graphs
    # dynamo passes sizes as inputs of their own
    sizes = {"aten.sym_size.int"}
    assert sorted(o for o in operators(captured.program) if o not in sizes) == sorted(
        o for o in operators(traced.program) if o not in sizes
    )
    parameters = {n for n, _ in model.named_parameters()}
    assert {w.source for w in traced.program.weights.values()} == parameters
    for source, tensor in traced.program.sources.items():
        assert tensor is model.get_parameter(source)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": contextlib.nullcontext,
}


@pytest.mark.parametrize("mode", MODES)
def test_sizes_stay_symbolic_in_every_mode(mode, backend):
    model = nn.Sequential(nn.Embedding(64, 6), nn.LayerNorm(6), nn.Linear(6, 64, bias=False))
    randomised(model)[2].weight = model[0].weight
    with MODES[mode]():
        compiled = torch.compile(model, backend=backend)
        for batch, length in ((2, 5), (3, 7), (4, 9)):
            _close(compiled(tokens(batch, length)), model(tokens(batch, length)))
    assert len(backend.graphs) == 2
    program = backend.graphs[1].program
    assert sorted(w.source for w in program.weights.values()) == [
        "0.weight",
        "0.weight",
        "1.bias",
        "1.weight",
    ]
    # the second program runs on the first sizes, too
    values = {"s": [2, 5], "t": tokens(2, 5)}
    inputs = [
        values["t"] if isinstance(n.meta["val"], torch.Tensor) else values["s"].pop(0)
        for n in program.inputs
    ]
    _close(program.run(*inputs)[0], model(tokens(2, 5)))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(cache, backend):
    model = tiny(GATED, dtype=torch.float32)
    options = {"max_new_tokens": 4, "do_sample": False}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    want = model.generate(tokens(2, 5), **options)
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(tokens(2, 5), **options), want)
    for traced in backend.graphs:
        assert {"qpass.rotary", "qpass.repeat_heads"} <= set(operators(traced.program))
        assert all(note.done for note in traced.notes)


def test_numbers_that_dynamo_passes_as_tensors_are_numbers(backend):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.epsilon, self.weight = 1e-3, nn.Parameter(torch.empty(8))

        def forward(self, x):
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
            return x * scale * self.weight

    model = randomised(Norm())
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for epsilon in (1e-3, 1.0):
            model.epsilon = epsilon
            torch.testing.assert_close(compiled(noise(3, 8)), model(noise(3, 8)))
    assert len(backend.graphs) == 2
    assert all(operators(graph.program) == ["aten.rms_norm"] for graph in backend.graphs)


class Writes(nn.Module):
    def __init__(self, tail):
        super().__init__()
        self.linear, self.tail = nn.Linear(6, 6), tail

    def forward(self, x):
        y = self.linear(x)
        y += x.relu_() if self.tail == "input" else x
        if self.tail == "viewed":
            z = y.view(-1)
            y *= 2
            return z
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)


def test_writes_in_place_become_values(backend):
    model = randomised(Writes("plain"))
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(noise(3, 6))
        torch.testing.assert_close(got, model(noise(3, 6)))
    assert operators(backend.graphs[0].program) == [
        "aten.linear",
        "aten.add.Tensor",
        "aten.rms_norm",
    ]


def test_writes_that_a_view_shows_stay_and_nothing_is_named(backend):
    model = randomised(Writes("viewed"))
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(noise(3, 6))
        torch.testing.assert_close(got, model(noise(3, 6)))
    (traced,) = backend.graphs
    assert "aten.mul_.Tensor" in operators(traced.program)
    assert [note.done for note in traced.notes] == [False]


def test_writes_to_inputs_are_kept(backend):
    model, x, y = randomised(Writes("input")), noise(3, 6), noise(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(y))
    torch.testing.assert_close(x, y)
    assert "aten.rms_norm" in operators(backend.graphs[0].program)


def test_writes_to_weights_are_refused(backend):
    class Trains(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            self.weight.add_(1)
            return x * self.weight

    with torch.no_grad(), pytest.raises(Exception, match="writes to weight") as caught:
        torch.compile(Trains(), backend=backend)(noise(2, 3))
    causes = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(cause, CaptureFailed) for cause in causes)


def test_modules_with_equal_paths_are_told_apart(backend):
    a, b = randomised(nn.Linear(3, 3), 1), randomised(nn.Linear(3, 3), 2)

    def both(x):
        return a(x) + b(x)

    with torch.no_grad():
        got = torch.compile(both, backend=backend)(noise(2, 3))
        torch.testing.assert_close(got, both(noise(2, 3)))
    assert len(backend.graphs[0].program.sources) == 4

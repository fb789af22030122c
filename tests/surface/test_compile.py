"""What does a user of `torch.compile(model, backend="qpass")` get, case by case?

Inductor takes seconds for each graph, so most tests run the lowered graph itself in its place.
"""

import copy
import dataclasses
import gc
import logging
import threading
import weakref

import pytest
import torch
import transformers as hf
from torch import nn

import qpass.backend
import qpass.targets.inductor
from qpass.errors import BadInput, CaptureFailed, StateError, UnknownName, Unsupported
from qpass.plan import Plan, Role
from qpass.runtime.packs import prepared
from tests.zoo import PAD, randomise, tiny, tokens

# int8 weights and activations on tiny random models
NEAR = 0.15
LAYERS = 1


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_inductor(monkeypatch):
    def run_graph(graph, inputs, config_patches=None):
        return graph

    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", run_graph)
    monkeypatch.setattr(qpass.backend, "compile_fx", run_graph)


class Counting:
    """The backend, with the number of graphs it was given."""

    def __init__(self, **options):
        self.options = options or {"recipe": "w8a8"}
        self.graphs = 0

    def __call__(self, gm, example_inputs):
        self.graphs += 1
        return qpass.backend.backend(gm, example_inputs, options=self.options)


def llama(seed=0, **changes):
    config = hf.LlamaConfig(
        vocab_size=64,
        max_position_embeddings=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=PAD,
        **{"tie_word_embeddings": True} | changes,
    )
    return tiny(config, seed, dtype=torch.float32)


class Block(nn.Module):
    """A layer with something to quantize, to rotate online, to fold and to drop out."""

    def __init__(self, width=24):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


def block(seed=0):
    made = Block()
    randomise(made, seed)
    return made.eval()


def batch(*shape):
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(0))


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def compiled(module, **options):
    counting = Counting(**options)
    module.compile(backend=counting)
    return counting


@pytest.mark.usefixtures("no_inductor")
class TestCalls:
    def test_lengths_batches_and_nothing(self):
        module, want = block(), block()
        counting = compiled(module)
        with torch.no_grad():
            for shape in [(2, 7), (1, 1), (2, 9), (3, 5), (0, 4), (24,)]:
                x = batch(*shape)
                got = module(x)
                assert got.shape == x.shape
                assert x.numel() == 0 or 0 < error(got, want(x)) < NEAR
        assert counting.graphs <= 6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_types_in_and_out(self, dtype):
        module, want = block().to(dtype), block()
        compiled(module, recipe="w4a8")
        with torch.no_grad():
            got = module(batch(2, 7).to(dtype))
        assert got.dtype == dtype
        assert 0 < error(got.float(), want(batch(2, 7))) < NEAR

    def test_inference_mode(self):
        module, want = block(), block()
        compiled(module)
        with torch.inference_mode():
            assert 0 < error(module(batch(2, 7)), want(batch(2, 7))) < NEAR

    def test_changes_in_place_are_seen(self):
        module, want = block(), block()
        compiled(module)
        with torch.no_grad():
            module(batch(2, 7))
            for one in (module, want):
                one.up.weight.mul_(-1.5)
                one.norm.bias.add_(1)
            assert error(module(batch(2, 7)), want(batch(2, 7))) < NEAR
            module.load_state_dict(block(3).state_dict())
            assert error(module(batch(2, 7)), block(3)(batch(2, 7))) < NEAR

    def test_layers_compiled_alone_share_a_graph_and_keep_their_weights(self):
        layers = [block(seed) for seed in range(3)]
        counting = Counting(recipe="w8a8")
        for layer in layers:
            layer.compile(backend=counting)
        with torch.no_grad():
            for _ in range(2):
                for seed, layer in enumerate(layers):
                    assert error(layer(batch(2, 7)), block(seed)(batch(2, 7))) < NEAR
        assert counting.graphs == 1

    def test_a_copy_has_its_own_weights(self):
        module, want = block(), block()
        compiled(module)
        with torch.no_grad():
            module(batch(2, 7))
            twin = copy.deepcopy(module)
            twin.up.weight.mul_(-1)
            want.up.weight.mul_(-1)
            assert error(twin(batch(2, 7)), want(batch(2, 7))) < NEAR
            assert error(module(batch(2, 7)), block()(batch(2, 7))) < NEAR

    def test_two_threads(self):
        module, want = block(), block()
        compiled(module)
        errors = []

        def work():
            with torch.no_grad():
                for _ in range(20):
                    errors.append(error(module(batch(2, 7)), want(batch(2, 7))))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 40
        assert max(errors) < NEAR

    def test_packed_weights_die_with_the_model(self):
        module = block()
        compiled(module)
        made = []

        def watching(weight, form, sources):
            parts = prepared(weight, form, sources)
            made.extend(weakref.ref(part) for part in parts if part is not None and part.dim() == 3)
            return parts

        qpass.targets.inductor.prepared, before = watching, prepared
        try:
            with torch.no_grad():
                module(batch(2, 7))
        finally:
            qpass.targets.inductor.prepared = before
        assert made
        assert all(ref() is not None for ref in made)
        del module
        torch._dynamo.reset()
        gc.collect()
        assert all(ref() is None for ref in made)

    def test_a_function_and_closures(self):
        module = block()
        function = torch.compile(lambda x: module(x) * 2, backend=Counting())
        with torch.no_grad():
            assert error(function(batch(2, 7)), block()(batch(2, 7)) * 2) < NEAR


@pytest.mark.usefixtures("no_inductor")
class TestGradients:
    def test_backward_is_refused(self):
        module = block()
        compiled(module)
        got = module(batch(2, 7))
        assert got.requires_grad
        with pytest.raises(Unsupported, match="no backward"):
            got.sum().backward()
        assert error(got.detach(), block()(batch(2, 7)).detach()) < NEAR

    def test_backward_to_an_input_is_refused(self):
        module = block().requires_grad_(False)
        compiled(module)
        x = batch(2, 7).requires_grad_()
        with pytest.raises(Unsupported, match="no backward"):
            module(x).sum().backward()

    def test_frozen_modules_have_no_gradients(self):
        module = block().requires_grad_(False)
        compiled(module)
        assert not module(batch(2, 7)).requires_grad

    def test_training_runs_untouched_with_one_warning(self):
        module = block().train()
        module.drop.p = 0.0
        want = block()
        counting = compiled(module)
        with pytest.warns(UserWarning, match="training mode"):
            got = module(batch(2, 7))
        assert error(got, want(batch(2, 7))) < 1e-5
        # warnings are errors here: a second graph of the same model has none
        got = module(batch(2, 9))
        assert error(got, want(batch(2, 9))) < 1e-5
        got.sum().backward()
        assert module.up.weight.grad is not None
        module.eval()
        with torch.no_grad():
            assert error(module(batch(2, 7)), want(batch(2, 7))) > 1e-4
        assert counting.graphs >= 2


@pytest.mark.usefixtures("no_inductor")
class TestOptions:
    @pytest.mark.parametrize(
        ("options", "kind", "says"),
        [
            ({"recipes": "w8a8"}, UnknownName, "did you mean 'recipe'"),
            ({"recipe": "w8a9"}, UnknownName, "did you mean 'w8a8'"),
            ({"recipe": {"heads": "float"}}, UnknownName, "did you mean 'head'"),
            ({"plan": "/does/not/exist.json"}, BadInput, "cannot be read"),
            ({"plan": "p.json", "recipe": "w8a8"}, BadInput, "one of plan and recipe"),
            ({"strict": "yes"}, BadInput, "strict"),
            ({"save_plan": "/does/not/exist/plan.json"}, BadInput, "cannot be written"),
        ],
    )
    def test_what_is_wrong_is_said(self, options, kind, says):
        module = block()
        module.compile(backend=lambda gm, ex: qpass.backend.backend(gm, ex, options=options))
        with torch.no_grad(), pytest.raises(kind, match=says):
            module(batch(2, 7))

    def test_unknown_mode(self):
        module = block()
        module.compile(backend=lambda gm, ex: qpass.backend.backend(gm, ex, mode="max-autotun"))
        with torch.no_grad(), pytest.raises(UnknownName, match="did you mean 'max-autotune'"):
            module(batch(2, 7))

    def test_strict_refuses_what_is_left_out(self, tmp_path):
        path = tmp_path / "plan.json"
        module = block()
        compiled(module, recipe={"recipe": "w4a8", "rotation": "off"}, save_plan=str(path))
        with torch.no_grad():
            module(batch(2, 7))
        plan = Plan.load(path)
        static = dataclasses.replace(plan.quantized[0].activation, dynamic=False)
        left = dataclasses.replace(plan.quantized[0], activation=static)
        other = block()
        plan = dataclasses.replace(plan, quantized=(left, *plan.quantized[1:]))
        compiled(other, plan=plan, strict=True)
        with torch.no_grad(), pytest.raises(Unsupported, match="per token"):
            other(batch(2, 7))

    def test_a_saved_plan_gives_the_same_result(self, tmp_path):
        path = tmp_path / "plan.json"
        module = block()
        compiled(module, recipe="w4a8", save_plan=str(path))
        with torch.no_grad():
            want = module(batch(2, 7))
            again = block()
            compiled(again, plan=path)
            assert torch.equal(again(batch(2, 7)), want)
        plan = Plan.load(path)
        assert [q.site for q in plan.quantized] == ["down.weight", "up.weight"]

    def test_a_tied_weight_has_a_site_for_each_use(self, tmp_path):
        path = tmp_path / "plan.json"
        model = llama()
        compiled(model, recipe="w8a8", save_plan=path)
        with torch.no_grad():
            model(tokens(), use_cache=False)
        roles = {q.site: q.role for q in Plan.load(path).quantized}
        assert roles["lm_head.weight"] is Role.HEAD
        assert roles["model.embed_tokens.weight"] is Role.EMBEDDING

    def test_graphs_are_logged(self, caplog):
        module = block()
        compiled(module)
        with torch.no_grad(), caplog.at_level(logging.INFO, "qpass"):
            module(batch(2, 7))
        (record,) = [r for r in caplog.records if r.name == "qpass" and r.levelname == "INFO"]
        assert "w8a8" in record.getMessage()

    def test_auto_is_deterministic(self, tmp_path):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, seed in zip(paths, (0, 1), strict=True):
            torch.manual_seed(seed)
            module = block()
            compiled(module, recipe="auto", save_plan=path)
            with torch.no_grad():
                module(batch(2, 7))
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_a_graph_that_cannot_be_captured_is_left_to_inductor(self, monkeypatch):
        def fails(*_):
            raise CaptureFailed("no reason")

        monkeypatch.setattr(qpass.backend, "capture_graph", fails)
        module = block()
        compiled(module)
        with torch.no_grad(), pytest.warns(UserWarning, match="unquantized: no reason"):
            got = module(batch(2, 7))
        with torch.no_grad():
            assert error(got, block()(batch(2, 7))) < 1e-6
        torch._dynamo.reset()
        compiled(module, recipe="w8a8", strict=True)
        with torch.no_grad(), pytest.raises(CaptureFailed):
            module(batch(2, 7))


@pytest.mark.usefixtures("no_inductor")
class TestFreeing:
    def test_float_weights_are_freed_and_results_stay(self):
        module = block()
        compiled(module, recipe="w8a8", free_weights=True)
        with torch.no_grad():
            got = module(batch(2, 7))
            assert torch.equal(module(batch(2, 7)), got)
            assert error(module(batch(3, 5)), block()(batch(3, 5))) < NEAR
            compiled(module, recipe="w4a8")
            with pytest.raises(StateError, match="free_weights"):
                module(batch(2, 7))
        pages = [p for p in module.parameters() if p.nbytes > 2**12]
        assert pages
        assert all(not p.any() for p in pages)


GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache):
    model = llama()
    counting = compiled(model, recipe="w8a8")
    with torch.no_grad():
        first = model.generate(tokens(), cache_implementation=cache, **GENERATE)
        graphs = counting.graphs
        again = model.generate(tokens(), cache_implementation=cache, **GENERATE)
    assert graphs <= 3
    assert counting.graphs == graphs
    assert torch.equal(first, again)

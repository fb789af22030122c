"""Does a changed model compile and export as others do, and never show changed values by it?"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from qpass.capture.export import capture
from qpass.errors import QpassError, Unsupported
from tests.surface.changed import CLOSE, KINDS, first, pair, relative
from tests.zoo import specimen, tokens

INPUTS = {"input_ids": tokens()}
MODELS = ("llama", "gpt2", "nano_gpt")


class Counting:
    """A backend that runs the graph as it is and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def run(model: nn.Module, **inputs: Tensor) -> Tensor:
    return first(model(**(inputs or INPUTS)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
class TestWhole:
    def test_one_graph(self, name: str, kind: str) -> None:
        _, changed = pair(name, kind)
        want = run(changed)
        for style in ("wrapped", "in place", "function", "forward"):
            torch._dynamo.reset()
            count, model = Counting(), copy.deepcopy(changed)
            if style == "wrapped":
                call = torch.compile(model, backend=count, fullgraph=True)
            elif style == "in place":
                model.compile(backend=count, fullgraph=True)
                call = model
            elif style == "function":
                inner = model
                call = torch.compile(
                    lambda input_ids: run(inner, input_ids=input_ids),  # noqa: B023
                    backend=count,
                    fullgraph=True,
                )
            else:
                model.forward = torch.compile(model.forward, backend=count, fullgraph=True)
                call = model
            assert relative(want, first(call(**INPUTS))) <= CLOSE, style
            assert relative(want, first(call(**INPUTS))) <= CLOSE, style
            assert count.graphs == 1, style
            # nothing else was compiled, such as what gates do before and after
            seen = [code for ref in torch._dynamo.convert_frame.input_codes.seen if (code := ref())]
            assert [code.co_name for code in seen if "qpass" in code.co_filename] == [], style

    def test_copies_share_graphs(self, name: str, kind: str) -> None:
        """As many models as dynamo would hold graphs, and more."""
        _, changed = pair(name, kind)
        count = Counting()
        for _ in range(10):
            other = copy.deepcopy(changed)
            other.compile(backend=count)
            assert relative(run(changed), run(other)) <= CLOSE
        assert count.graphs == 1

    def test_parts_compiled_by_themselves(self, name: str, kind: str) -> None:
        model, changed = pair(name, kind)
        count = Counting()
        layers = next(m for m in changed.modules() if isinstance(m, nn.ModuleList))
        want = run(changed)
        for layer in layers:
            layer.compile(backend=count)
        for _ in range(2):
            assert relative(want, run(changed)) <= CLOSE
        assert count.graphs == 1
        if name != "nano_gpt":
            states = (
                m(**INPUTS, output_hidden_states=True).hidden_states for m in (model, changed)
            )
            for before, after in zip(*states, strict=True):
                assert relative(before, after) <= KINDS[kind]


def test_calls_that_show_more_are_right_or_refused() -> None:
    model, changed = pair("llama")
    want = model(**INPUTS, output_hidden_states=True).hidden_states
    embeds = model.get_input_embeddings()(INPUTS["input_ids"])
    call = torch.compile(changed, backend="eager")
    for _ in range(2):
        assert relative(run(model), first(call(**INPUTS))) <= CLOSE
        got = call(**INPUTS, output_hidden_states=True).hidden_states
        for before, after in zip(want, got, strict=True):
            assert relative(before, after) <= CLOSE
        assert relative(run(model), first(call(inputs_embeds=embeds))) <= CLOSE


def test_compiled_functions_that_show_more() -> None:
    model, changed = pair("llama")
    embeds = model.get_input_embeddings()(INPUTS["input_ids"])
    base = model.base_model(**INPUTS)[0]
    functions = {
        "states": lambda m: m(**INPUTS, output_hidden_states=True).hidden_states[1],
        "embeds": lambda m: m(inputs_embeds=embeds).logits,
        "base": lambda m: m.base_model(**INPUTS)[0],
        "norm": lambda m: m.model.norm(base),
        "forward": lambda m: m.model.norm.forward(base),
        "layer": lambda m: m.model.layers[0].mlp(base),
    }
    for name, function in functions.items():
        call = torch.compile(function, backend="eager")
        for _ in range(2):
            assert relative(function(model), call(changed)) <= CLOSE, name


def test_parts_called_from_inside_and_outside() -> None:
    """One compiled layer, whose values differ between the two."""
    model, changed = pair("llama")
    part = changed.model.layers[0].mlp
    part.compile(backend="eager")
    x = torch.randn(1, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert relative(run(model), run(changed)) <= CLOSE
        assert relative(model.model.layers[0].mlp(x), part(x)) <= CLOSE


def test_hooks_on_parts_of_a_compiled_model() -> None:
    model, changed = pair("llama")
    seen: list[Tensor] = []
    layers = (model.model.layers[0], changed.model.layers[0])
    for layer in layers:
        layer.register_forward_hook(lambda m, args, out: seen.append(first(out)))
    run(model)
    changed.compile(backend="eager")
    for _ in range(2):
        assert relative(run(model), run(changed)) <= CLOSE
        assert relative(seen[-2], seen[-1]) <= CLOSE


def test_threads_compile_and_call() -> None:
    model, changed = pair("llama")
    changed.compile(backend="eager")
    base = model.base_model(**INPUTS)[0]
    want = run(model)
    errors: list[float] = []

    def work(inner: bool) -> None:
        with torch.no_grad():
            for _ in range(5):
                if inner:
                    errors.append(relative(base, changed.base_model(**INPUTS)[0]))
                else:
                    errors.append(relative(want, run(changed)))

    threads = [threading.Thread(target=work, args=(bool(i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    assert max(errors) <= CLOSE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating(cache: str) -> None:
    changed = pair("llama")[1].float()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["cache_implementation"] = cache
    want = changed.generate(tokens(), **options)
    count = Counting()
    changed.compile(backend=count)
    assert torch.equal(want, changed.generate(tokens(), **options))
    graphs = count.graphs
    assert graphs <= 3
    assert torch.equal(want, changed.generate(tokens(), **options))
    assert count.graphs == graphs


def test_inductor() -> None:
    _, changed = pair("nano_gpt")
    want = run(changed)
    assert relative(want, run(torch.compile(changed))) <= CLOSE


def test_the_qpass_backend_takes_a_rotated_model() -> None:
    _, changed = pair("nano_gpt")
    changed = changed.float()
    want = run(changed)
    call = torch.compile(changed, backend="qpass", options={"recipe": "w8a8"})
    assert 0 < relative(want, run(call)) <= KINDS["quantized"]


class TestExport:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", MODELS)
    def test_programs_of_changed_models(self, name: str, kind: str) -> None:
        _, changed = pair(name, kind)
        want = run(changed)
        captured = capture(changed, INPUTS)
        got = captured.program.run(*captured.flatten(INPUTS))[0]
        assert relative(want, got) <= CLOSE

    @pytest.mark.parametrize("strict", [False, True])
    def test_torch_export(self, strict: bool) -> None:
        _, changed = pair("nano_gpt")
        with warnings.catch_warnings():
            # it notices that the thread is marked as being inside
            warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
            exported = torch.export.export(changed, (INPUTS["input_ids"],), strict=strict)
        assert relative(run(changed), exported.module()(INPUTS["input_ids"])) <= CLOSE

    def test_parts_are_refused(self) -> None:
        _, changed = pair("llama")
        with pytest.raises(Unsupported, match="traced"):
            torch.export.export(changed.model.norm, (torch.ones(1, 2, 48).double(),))
        with pytest.raises(QpassError, match="traced"):
            capture(changed.model, INPUTS)

    def test_hooked_models_are_refused(self) -> None:
        _, changed = pair("llama")
        handle = changed.model.norm.register_forward_hook(lambda *_: None)
        with pytest.raises(QpassError, match="hooks"):
            qpass.quantize(changed, "w8a8", inputs=INPUTS)
        handle.remove()
        qpass.quantize(changed, "w8a8", inputs=INPUTS)

    def test_a_rotated_model_goes_to_onnx(self, tmp_path) -> None:
        changed = specimen("nano_gpt").build(0).float()
        want = run(changed)
        qpass.rotate(changed, INPUTS)
        qpass.export_onnx(changed, INPUTS, tmp_path / "model.onnx")
        qpass.onnx_parity(changed, INPUTS, tmp_path / "model.onnx")
        assert relative(want, run(changed)) <= 1e-4

"""Does everything that a changed model can show look as it did before, or say that it cannot?"""

from __future__ import annotations

import copy
import functools
import io
import threading

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import QpassError, StateError, Unsupported
from tests.zoo import specimen, tokens

MODELS = ("llama_tied", "gpt2")
INPUTS = {"input_ids": tokens()}
# float64 models whose norms cast to float32 on the way
CLOSE = 1e-5


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A model, and a rotated copy of it."""
    model = specimen(name).build(0)
    changed = copy.deepcopy(model)
    qpass.rotate(changed, INPUTS)
    return model, changed


@pytest.fixture(params=MODELS)
def models(request) -> tuple[nn.Module, nn.Module]:
    model, changed = pair(request.param)
    return model, copy.deepcopy(changed)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def relative(want: Tensor, got: Tensor) -> float:
    return float((want.double() - got.double()).abs().max() / want.double().abs().max())


def test_hidden_states(models) -> None:
    want, got = (m(**INPUTS, output_hidden_states=True) for m in models)
    assert len(want.hidden_states) == len(got.hidden_states) == 3
    for before, after in zip(want.hidden_states, got.hidden_states, strict=True):
        assert relative(before, after) <= CLOSE
    assert relative(want.logits, got.logits) <= CLOSE


def test_the_base_model(models) -> None:
    model, changed = models
    want = model.base_model(**INPUTS, output_hidden_states=True)
    got = changed.base_model(**INPUTS, output_hidden_states=True)
    assert relative(want.last_hidden_state, got.last_hidden_state) <= CLOSE
    for before, after in zip(want.hidden_states, got.hidden_states, strict=True):
        assert relative(before, after) <= CLOSE


def test_input_embeddings(models) -> None:
    model, changed = models
    want = model.get_input_embeddings()(INPUTS["input_ids"])
    got = changed.get_input_embeddings()(INPUTS["input_ids"])
    assert relative(want, got) <= CLOSE
    logits = model(inputs_embeds=want).logits
    assert relative(logits, changed(inputs_embeds=want).logits) <= CLOSE
    assert relative(logits, changed(inputs_embeds=got).logits) <= CLOSE


def observed(model: nn.Module, before: bool) -> dict[str, list[Tensor]]:
    """What a hook on each module is shown: its output, or its arguments."""
    seen: dict[str, list[Tensor]] = {}

    def keep(path: str, found: object) -> None:
        tensors = found if isinstance(found, tuple) else (found,)
        floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
        seen.setdefault(path, []).extend(floats)

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            continue
        if before:
            hook = lambda m, args, path=path: keep(path, args)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = lambda m, args, out, path=path: keep(path, out)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    model(**INPUTS)
    for handle in handles:
        handle.remove()
    return seen


def each_module(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if not isinstance(m, nn.ModuleList)]


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_on_any_module_sees_original_values_or_is_refused(models, before: bool) -> None:
    model, changed = models
    want = observed(model, before)
    refused = []
    for path in each_module(model):
        got: list[object] = []
        module = changed.get_submodule(path)
        if before:
            handle = module.register_forward_pre_hook(lambda m, args, got=got: got.extend(args))
        else:
            handle = module.register_forward_hook(lambda m, args, out, got=got: got.append(out))
        try:
            changed(**INPUTS)
        except Unsupported:
            refused.append(path)
            continue
        finally:
            handle.remove()
        flat = [t for g in got for t in (g if isinstance(g, tuple) else (g,))]
        floats = [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]
        assert len(floats) == len(want.get(path, []))
        for one, other in zip(want.get(path, []), floats, strict=True):
            assert relative(one, other) <= CLOSE, path
    # only modules that the graph does not know, such as dropouts and those that read a shape
    assert not any(path.endswith(("proj", "mlp", "norm", "lm_head")) for path in refused)
    assert len(refused) <= len(each_module(model)) // 4, refused


def test_a_hook_may_change_values(models) -> None:
    outputs = []
    for model in models:
        layer = model.base_model.get_submodule("layers.0" if hasattr(model, "model") else "h.0")

        def steer(module, args, out):
            first = out[0] if isinstance(out, tuple) else out
            first = first + torch.linspace(-1, 1, first.shape[-1], dtype=first.dtype)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        handle = layer.register_forward_hook(steer)
        outputs.append(model(**INPUTS).logits)
        handle.remove()
        assert relative(outputs[0], model(**INPUTS).logits) > CLOSE
    assert relative(*outputs) <= CLOSE


def test_hooks_from_before_see_original_values() -> None:
    model = specimen("llama_tied").build(0)
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    model(**INPUTS)
    qpass.rotate(model, INPUTS)
    seen[1:] = []
    model(**INPUTS)
    assert relative(*seen) <= CLOSE
    handle.remove()
    model(**INPUTS)
    assert len(seen) == 2


def test_hooks_on_gradients_are_refused(models) -> None:
    _, changed = models
    norm = next(m for path, m in changed.named_modules() if path.endswith(("norm", "ln_f")))
    with pytest.raises(Unsupported, match="gradients"):
        norm.register_full_backward_hook(lambda *_: None)


class Adapter(nn.Module):
    """A low-rank update beside a layer, as adapter libraries insert it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.weight.shape[1], 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.weight.shape[0], bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_are_refused(compiled: bool) -> None:
    changed = copy.deepcopy(pair("llama_tied")[1])
    attention = changed.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    run = torch.compile(changed, backend="eager") if compiled else changed
    with pytest.raises(StateError, match="q_proj was replaced"):
        run(**INPUTS)


def test_embeddings_are_not_resized_or_tied_again(models) -> None:
    _, changed = models
    want = changed(**INPUTS).logits
    with pytest.raises(StateError, match="resize"):
        changed.resize_token_embeddings(80)
    changed.tie_weights()
    changed.init_weights()
    assert torch.equal(want, changed(**INPUTS).logits)
    assert changed.config.tie_word_embeddings is False


def test_layers_called_alone(models) -> None:
    model, changed = models
    want = model.lm_head(torch.ones(1, 2, model.lm_head.in_features, dtype=torch.float64))
    got = changed.lm_head(torch.ones(1, 2, model.lm_head.in_features, dtype=torch.float64))
    assert relative(want, got) <= CLOSE


def test_unknown_inputs_are_refused(models) -> None:
    _, changed = models
    block = changed.get_submodule(next(p for p in each_module(changed) if p.endswith("mlp")))
    width = changed.lm_head.in_features
    with pytest.raises((QpassError, RuntimeError)):
        block(torch.ones(width, width, dtype=torch.float64), extra=1)


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_copies_keep_their_doors(models, through: str) -> None:
    model, changed = models
    if through == "deepcopy":
        other = copy.deepcopy(changed)
    else:
        file = io.BytesIO()
        torch.save(changed, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    want = model.base_model(**INPUTS).last_hidden_state
    for parameter in changed.parameters():
        parameter.zero_()
    assert relative(want, other.base_model(**INPUTS).last_hidden_state) <= CLOSE


def test_twice_rotated_models_show_the_same() -> None:
    model = specimen("llama_tied").build(0)
    changed = copy.deepcopy(model)
    qpass.rotate(changed, INPUTS)
    qpass.rotate(
        changed, INPUTS, {"name": "again", "seed": 5, "head": "float", "embedding": "float"}
    )
    want = model(**INPUTS, output_hidden_states=True).hidden_states
    got = changed(**INPUTS, output_hidden_states=True).hidden_states
    for before, after in zip(want, got, strict=True):
        assert relative(before, after) <= CLOSE


def test_threads_do_not_see_each_other(models) -> None:
    model, changed = models
    want = model.base_model(**INPUTS).last_hidden_state
    logits = model(**INPUTS).logits
    errors: list[float] = []

    def inner() -> None:
        with torch.no_grad():
            for _ in range(5):
                got = changed.base_model(**INPUTS).last_hidden_state
                errors.append(relative(want, got))

    def outer() -> None:
        with torch.no_grad():
            for _ in range(5):
                errors.append(relative(logits, changed(**INPUTS).logits))

    threads = [threading.Thread(target=run) for run in (inner, outer, inner, outer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    assert max(errors) <= CLOSE


def test_compiled_as_a_whole_and_in_part(models) -> None:
    model, changed = models
    want = model(**INPUTS).logits
    compiled = torch.compile(changed, backend="eager", fullgraph=True)
    assert relative(want, compiled(**INPUTS).logits) <= CLOSE
    part = torch.compile(changed.base_model, backend="eager")
    base = model.base_model(**INPUTS).last_hidden_state
    try:
        assert relative(base, part(**INPUTS).last_hidden_state) <= CLOSE
    except QpassError:
        pass

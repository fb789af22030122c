"""Does everything that a changed model can show look as it did before, or say that it cannot?"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.errors import StateError, Unsupported
from tests.surface.changed import CLOSE, KINDS, first, pair, relative
from tests.zoo import Specimen, specimen, tiny, tokens

LANGUAGE = ("llama", "llama_tied", "gpt2", "opt", "gemma3", "bert")
MODELS = (*LANGUAGE, "vision", "nano_gpt")


class Case:
    """A model as it was, the same one changed, how near they are, and a call of both."""

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.model, self.changed = pair(name, kind)
        self.near = KINDS[kind]
        self.entry: Specimen = specimen(name)
        self.inputs = dict(self.entry.inputs())

    def agree(self, want: Tensor, got: Tensor, what: str = "") -> None:
        error = relative(want, got)
        assert error <= self.near, f"{what}: {error:.1e}"


@pytest.fixture(params=[(m, k) for m in MODELS for k in KINDS], ids="-".join)
def case(request) -> Case:
    return Case(*request.param)


@pytest.fixture(params=[(m, k) for m in LANGUAGE for k in KINDS], ids="-".join)
def language(request) -> Case:
    return Case(*request.param)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_hidden_states(language) -> None:
    want, got = (m(**language.inputs, output_hidden_states=True) for m in both(language))
    assert len(want.hidden_states) == len(got.hidden_states) == 3
    for i, (before, after) in enumerate(zip(want.hidden_states, got.hidden_states, strict=True)):
        language.agree(before, after, f"hidden state {i}")
    language.agree(want[0], got[0], "logits")
    # and a call that does not ask for them is as before
    language.agree(want[0], language.changed(**language.inputs)[0])


def test_hidden_states_that_the_config_asks_for(language) -> None:
    want = language.model(**language.inputs, output_hidden_states=True)
    language.changed.config.output_hidden_states = True
    got = language.changed(**language.inputs)
    for before, after in zip(want.hidden_states, got.hidden_states, strict=True):
        language.agree(before, after)


def test_attentions_are_returned(language) -> None:
    for model in both(language):
        model.set_attn_implementation("eager")
    want, got = (m(**language.inputs, output_attentions=True) for m in both(language))
    for before, after in zip(want.attentions, got.attentions, strict=True):
        language.agree(before, after)
    language.model.set_attn_implementation("sdpa")


def test_the_base_model_called_alone(language) -> None:
    ids = language.inputs
    want, got = (m.base_model(**ids, output_hidden_states=True) for m in both(language))
    language.agree(want.last_hidden_state, got.last_hidden_state)
    for before, after in zip(want.hidden_states, got.hidden_states, strict=True):
        language.agree(before, after)
    got = language.changed.base_model(**ids)
    language.agree(want.last_hidden_state, got.last_hidden_state)
    got = language.changed.base_model.forward(**ids, return_dict=False)
    language.agree(want.last_hidden_state, got[0])


def test_a_pooler() -> None:
    config = hf.BertConfig(
        vocab_size=64,
        max_position_embeddings=32,
        hidden_size=36,
        intermediate_size=52,
        num_attention_heads=3,
        num_hidden_layers=2,
    )
    model, changed = (tiny(config, kind=hf.AutoModel) for _ in range(2))
    qpass.rotate(changed, {"input_ids": tokens()})
    want, got = (m(tokens(), output_hidden_states=True) for m in (model, changed))
    assert relative(want.pooler_output, got.pooler_output) <= CLOSE
    assert relative(want.last_hidden_state, got.last_hidden_state) <= CLOSE
    want, got = (m.pooler(want.last_hidden_state) for m in (model, changed))
    assert relative(want, got) <= CLOSE


def test_embeddings_in_and_out(language) -> None:
    ids = language.inputs["input_ids"]
    want, got = (m.get_input_embeddings()(ids) for m in both(language))
    language.agree(want, got)
    logits = language.model(**language.inputs)[0]
    language.agree(logits, language.changed(inputs_embeds=want)[0])
    language.agree(logits, language.changed(inputs_embeds=got)[0])
    base = language.model.base_model(**language.inputs)[0]
    language.agree(base, language.changed.base_model(inputs_embeds=want)[0])


def test_embeddings_by_position_are_refused_or_right(language) -> None:
    embeds = language.model.get_input_embeddings()(language.inputs["input_ids"])
    want = language.model(**language.inputs)[0]
    names = list(inspect.signature(language.model.forward).parameters)
    args = [None] * names.index("inputs_embeds")
    with contextlib.suppress(Unsupported):
        language.agree(want, language.changed(*args, embeds)[0])


def both(case: Case) -> tuple[nn.Module, nn.Module]:
    return case.model, case.changed


def parts(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if path and not isinstance(m, nn.ModuleList)]


def floating(found: object) -> list[Tensor]:
    if isinstance(found, dict):
        found = tuple(found.values())
    if isinstance(found, tuple | list):
        return [t for item in found for t in floating(item)]
    return [found] if isinstance(found, Tensor) and found.is_floating_point() else []


def watched(model: nn.Module, inputs: dict[str, Tensor], path: str) -> list[Tensor]:
    """What hooks on a module are shown, and the model's output."""
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.extend(floating((args, kwargs))), with_kwargs=True
        ),
        module.register_forward_hook(lambda m, args, out: seen.extend(floating((args, out)))),
    ]
    try:
        seen.append(first(model(**inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_hooks_on_any_module_see_original_values_or_are_refused(case) -> None:
    plain = first(case.changed(**case.inputs))
    refused = []
    for path in parts(case.model):
        want = watched(case.model, case.inputs, path)
        try:
            got = watched(case.changed, case.inputs, path)
        except Unsupported:
            refused.append(path)
            continue
        assert len(want) == len(got)
        for before, after in zip(want, got, strict=True):
            case.agree(before, after, path)
        # those that only look change nothing at all
        assert torch.equal(got[-1], plain)
    assert torch.equal(first(case.changed(**case.inputs)), plain)
    # modules that the graph does not know, such as dropouts, and those that take two values of one
    # shape that changed differently
    known = [p for p in parts(case.model) if has_weights(case.model, p)]
    assert not [p for p in refused if p in known and not p.endswith("attention.output")]
    assert len(refused) <= len(parts(case.model)) // 3, refused


def has_weights(model: nn.Module, path: str) -> bool:
    return next(model.get_submodule(path).parameters(), None) is not None


def test_what_hooks_return_is_taken_for_original_values(case) -> None:
    plain, moved = first(case.model(**case.inputs)), 0
    for path in [p for p in parts(case.model) if has_weights(case.model, p)]:
        outputs = []
        for model in both(case):
            handle = model.get_submodule(path).register_forward_hook(steer)
            try:
                outputs.append(first(model(**case.inputs)))
            except Unsupported:
                break
            finally:
                handle.remove()
        else:
            case.agree(*outputs, path)
            moved += relative(plain, outputs[0]) > 2 * case.near
    assert moved >= 3


def steer(module: nn.Module, args: object, out: object) -> object:
    if isinstance(out, tuple):
        return (steer(module, args, out[0]), *out[1:])
    if isinstance(out, dict):
        name = next(iter(out))
        out[name] = steer(module, args, out[name])
        return out
    return out + torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)


def test_what_hooks_write_in_place_counts(case) -> None:
    path = next(p for p in parts(case.model) if has_weights(case.model, p) and "." in p)

    def double(module: nn.Module, args: object, out: object) -> None:
        first(out).mul_(2)

    outputs = []
    for model in both(case):
        handle = model.get_submodule(path).register_forward_hook(double)
        outputs.append(first(model(**case.inputs)))
        handle.remove()
    case.agree(*outputs)


def test_hooks_of_all_modules_see_original_values() -> None:
    case = Case("llama", "rotated")
    seen: list[list[Tensor]] = []
    for model in both(case):
        seen.append([])
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out: (
                seen[-1].extend(floating(out)) if isinstance(m, nn.Linear | nn.Embedding) else None
            )
        )
        try:
            model(**case.inputs)
        except Unsupported:
            # some part could not say what it shows
            return
        finally:
            handle.remove()
    for before, after in zip(*seen, strict=False):
        case.agree(before, after)


def test_hooks_from_before_the_change_see_original_values() -> None:
    model = specimen("llama_tied").build(0)
    inputs = specimen("llama_tied").inputs()
    seen: list[Tensor] = []
    norms = [m for p, m in model.named_modules() if p.endswith("norm")]
    handles = [n.register_forward_hook(lambda m, args, out: seen.append(out)) for n in norms]
    model(**inputs)
    count = len(seen)
    qpass.rotate(model, inputs)
    seen[count:] = []
    model(**inputs)
    assert len(seen) == 2 * count
    for before, after in zip(seen[:count], seen[count:], strict=True):
        assert relative(before, after) <= CLOSE
    for handle in handles:
        handle.remove()
    model(**inputs)
    assert len(seen) == 2 * count


def test_a_hook_may_call_other_parts() -> None:
    """As those do that read a prediction off every layer."""
    lenses: list[list[Tensor]] = []
    case = Case("llama", "rotated")
    for model in both(case):
        lenses.append([])

        def read(m, args, out, model=model) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            lenses[-1].append(model.lm_head(model.model.norm(hidden[:, -1])))

        handles = [layer.register_forward_hook(read) for layer in model.model.layers]
        model(**case.inputs)
        for handle in handles:
            handle.remove()
    assert len(lenses[0]) == 2
    for before, after in zip(*lenses, strict=True):
        case.agree(before, after)


@pytest.mark.parametrize("collected", [False, True])
def test_hidden_states_and_hooks_at_once(language, collected: bool) -> None:
    """The hooks that collect hidden states are put there when they are asked for, and stay."""
    for model in both(language) if collected else ():
        model(**language.inputs, output_hidden_states=True)
    path = next(p for p in parts(language.model) if p.endswith((".0", "layers.0")))
    outputs = []
    for model in both(language):
        handle = model.get_submodule(path).register_forward_hook(steer)
        outputs.append(model(**language.inputs, output_hidden_states=True))
        handle.remove()
    for before, after in zip(*(o.hidden_states for o in outputs), strict=True):
        language.agree(before, after)
    language.agree(outputs[0][0], outputs[1][0])


def test_hooks_on_gradients_are_refused() -> None:
    case = Case("llama", "rotated")
    norm = case.changed.model.norm
    with pytest.raises(Unsupported, match="gradients"):
        norm.register_full_backward_hook(lambda *_: None)
    nn.Module.register_full_backward_hook(norm, lambda *_: None)
    with pytest.raises(Unsupported, match="gradients"):
        case.changed(**case.inputs)
    handle = case.model.model.norm.register_full_backward_hook(lambda *_: None)
    state = dict(vars(case.model.model.norm))
    with pytest.raises(Unsupported, match="gradients"):
        qpass.rotate(case.model, case.inputs)
    assert vars(case.model.model.norm) == state
    handle.remove()
    qpass.rotate(case.model, case.inputs)


def test_modules_called_alone(case) -> None:
    """Each leaf is called on what it was called on in the model, in several arrangements."""
    for path, module in case.model.named_modules():
        if next(module.children(), None) is not None or not has_weights(case.model, path):
            continue
        given: list[object] = []
        handle = module.register_forward_pre_hook(lambda m, args, given=given: given.extend(args))
        case.model(**case.inputs)
        handle.remove()
        if not given or not isinstance(given[0], Tensor):
            continue
        x = given[0]
        other = case.changed.get_submodule(path)
        case.agree(module(x), other(x), path)
        case.agree(module(x), other.forward(x), path)
        if x.is_floating_point() and x.dim() == 3:
            case.agree(module(x[:, -1]), other(x[:, -1]), path)
            case.agree(module(x[None]), other(x[None]), path)


def test_parts_that_hold_no_weights_themselves_are_called_on_anything() -> None:
    case = Case("llama", "rotated")
    width = case.changed.config.hidden_size
    for shape in ((width,), (2, width), (1, 1, 2, width)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        want, got = (m.model.layers[0].mlp(x) for m in both(case))
        case.agree(want, got)


def test_twice_changed_models_show_the_same() -> None:
    entry = specimen("llama_tied")
    model, changed = entry.build(0), entry.build(0)
    inputs = dict(entry.inputs())
    qpass.rotate(changed, inputs)
    again = {"name": "again", "rotation": "on", "seed": 5, "head": "float", "embedding": "float"}
    qpass.rotate(changed, inputs, again)
    for near in (CLOSE, KINDS["quantized"]):
        want = model(**inputs, output_hidden_states=True)
        got = changed(**inputs, output_hidden_states=True)
        for before, after in zip(want.hidden_states, got.hidden_states, strict=True):
            assert relative(before, after) <= near
        for path in ("model.layers.0.mlp.down_proj", "model.layers.1.input_layernorm"):
            for before, after in zip(
                watched(model, inputs, path), watched(changed, inputs, path), strict=True
            ):
                assert relative(before, after) <= near
        if near == CLOSE:
            qpass.quantize(changed, {"recipe": "w8a8", "rotation": "off"}, inputs=inputs)


def test_parts_of_a_changed_model_are_not_changed_alone() -> None:
    case = Case("llama", "rotated")
    with pytest.raises(qpass.QpassError):
        qpass.rotate(case.changed.model, case.inputs)
    model = specimen("llama").build(0)
    qpass.rotate(model.model, case.inputs)
    with pytest.raises(StateError, match="part"):
        qpass.rotate(model, case.inputs)

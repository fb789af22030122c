"""Does a changed model take new parts, and is it copied, cast and left alone as models are?"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.errors import StateError
from tests.surface.changed import (
    CLOSE,
    INPUTS,
    KINDS,
    llama,
    output,
    pair,
    relative,
    shown,
)
from tests.zoo import NanoGPT, randomise

MODELS = ("llama_tied", "gpt2")
TYPES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class Adapter(nn.Module):
    """A low-rank update beside a layer, as adapter libraries insert it."""

    def __init__(self, base: nn.Module, width: int, height: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(width, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, height, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class TestReplacing:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
    def test_adapters_are_refused(self, name: str, kind: str) -> None:
        model, changed = pair("llama", kind)
        attention = changed.model.layers[0].self_attn
        shape = model.get_submodule(f"model.layers.0.self_attn.{name}").weight.shape
        base = getattr(attention, name)
        setattr(attention, name, Adapter(base, shape[1], shape[0]))
        for call in (changed, changed.model):
            with pytest.raises(StateError, match=f"{name} was replaced"):
                call(**INPUTS)
        setattr(attention, name, base)
        assert relative(output(model), output(changed)) <= KINDS[kind]

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_layer_of_the_users_own_is_refused(self, kind: str) -> None:
        _, changed = pair("llama", kind)
        changed.model.layers[0].mlp.down_proj = nn.Linear(80, 48, bias=False).double()
        with pytest.raises(StateError, match="down_proj was replaced"):
            changed(**INPUTS)

    def test_a_plain_module_notices_too(self) -> None:
        _, changed = pair("nano_gpt")
        changed.blocks[1].up = nn.Linear(36, 108, bias=False).double()
        with pytest.raises(StateError, match=r"blocks\.1\.up was replaced"):
            changed(**INPUTS)

    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_compiled_models_notice_too(self, fullgraph: bool) -> None:
        torch._dynamo.reset()
        _, changed = pair("llama")
        run = torch.compile(changed, backend="eager", fullgraph=fullgraph)
        run(**INPUTS)
        changed.model.layers[0].mlp.down_proj = nn.Linear(80, 48, bias=False).double()
        with pytest.raises(StateError, match="down_proj was replaced"):
            run(**INPUTS)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", MODELS)
    def test_embeddings_are_not_resized_or_tied_again(self, name: str, kind: str) -> None:
        _, changed = pair(name, kind)
        want = output(changed)
        for part in (changed, changed.base_model):
            with pytest.raises(StateError, match="resize"):
                part.resize_token_embeddings(80)
        changed.tie_weights()
        changed.init_weights()
        assert torch.equal(want, output(changed))
        assert changed.config.tie_word_embeddings is False


class TestConfigs:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_shared_config_does_not_change(self, kind: str) -> None:
        config = hf.LlamaConfig(**llama().config.to_dict())
        config._attn_implementation = "sdpa"
        first_one, second = (hf.LlamaForCausalLM(config).eval() for _ in range(2))
        text = config.to_json_string()
        if kind == "rotated":
            qpass.rotate(first_one, INPUTS)
        else:
            qpass.quantize(first_one, "w8a8", inputs=INPUTS)
        assert config.to_json_string() == text
        assert second.config is config
        assert second.lm_head.weight is second.model.embed_tokens.weight
        third = hf.LlamaForCausalLM(config)
        assert third.lm_head.weight is third.model.embed_tokens.weight
        own = first_one.config
        assert own is not config
        assert own.tie_word_embeddings is False
        # what the parts share, they still share
        owners = [m for m in first_one.modules() if "config" in vars(m)]
        assert len(owners) > 3
        assert all(vars(m)["config"] is own for m in owners)
        assert first_one.generation_config is not second.generation_config

    def test_a_model_that_stays_tied_keeps_its_config(self) -> None:
        model = llama(tie_word_embeddings=False)
        config = model.config
        qpass.rotate(model, INPUTS)
        assert model.config is config


class TestFailure:
    @pytest.mark.parametrize("again", [False, True])
    def test_nothing_is_left_behind(self, again: bool, monkeypatch) -> None:
        model = llama()
        model.model.embed_tokens.weight.requires_grad_(False)
        if again:
            qpass.rotate(model, INPUTS)
        else:
            model.model.norm.register_forward_hook(lambda *_: None)
        states = {p: (dict(vars(m)), m) for p, m in model.named_modules()}
        tables = {
            p: (dict(m._parameters), dict(m._buffers), dict(m._modules), dict(m._forward_hooks))
            for p, m in model.named_modules()
        }
        values = {k: v.clone() for k, v in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        text, want = model.config.to_json_string(), output(model)

        def refuse(self, flag=True):
            raise RuntimeError("planted")

        # the last thing that quantizing does
        monkeypatch.setattr(nn.Module, "requires_grad_", refuse)
        with pytest.raises(RuntimeError, match="planted"):
            qpass.quantize(model, "w8a8", inputs=INPUTS)
        monkeypatch.undo()
        assert {p: (vars(m), m) for p, m in model.named_modules()} == states
        assert {
            p: (m._parameters, m._buffers, m._modules, dict(m._forward_hooks))
            for p, m in model.named_modules()
        } == tables
        assert [p.requires_grad for p in model.parameters()] == flags
        assert model.config.to_json_string() == text
        assert values.keys() == model.state_dict().keys()
        assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
        assert torch.equal(want, output(model))

    def test_a_second_quantize_is_refused(self) -> None:
        _, changed = pair("gpt2", "quantized")
        want = output(changed)
        with pytest.raises(StateError, match="quantized already"):
            qpass.quantize(changed, "w8a8", inputs=INPUTS)
        assert torch.equal(want, output(changed))


class TestCopies:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", [*MODELS, "nano_gpt"])
    def test_a_copy_stands_alone(self, name: str, kind: str) -> None:
        model, changed = pair(name, kind)
        other = copy.deepcopy(changed)
        path = "blocks.0" if name == "nano_gpt" else "base_model"
        with torch.no_grad():
            for tensor in (*changed.parameters(), *changed.buffers()):
                tensor.zero_()
        assert relative(output(model), output(other)) <= KINDS[kind]
        seen = [shown(m, path) for m in (model, other)]
        assert relative(*seen) <= KINDS[kind]
        held = {id(m) for m in changed.modules()}
        assert not [m for m in other.modules() if id(m) in held]

    def test_a_copied_part_shows_the_same(self) -> None:
        model, changed = pair("llama")
        ids = INPUTS["input_ids"]
        norm, head = copy.deepcopy(changed.model.norm), copy.deepcopy(changed.lm_head)
        with torch.no_grad():
            hidden = model.model.embed_tokens(ids)
            want = model.lm_head(model.model.norm(hidden))
            assert relative(want, head(norm(hidden))) <= CLOSE

    def test_pickling_is_refused(self) -> None:
        with pytest.raises(StateError, match=r"qpass\.save"):
            torch.save(pair("llama")[1], io.BytesIO())

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", MODELS)
    def test_states_go_round(self, name: str, kind: str) -> None:
        _, changed = pair(name, kind)
        want = output(changed)
        state = {key: value.clone() for key, value in changed.state_dict().items()}
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.zero_()
        changed.load_state_dict(state)
        assert torch.equal(want, output(changed))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", MODELS)
    def test_what_is_saved_shows_the_same(self, name: str, kind: str, tmp_path) -> None:
        model, changed = pair(name, kind)
        qpass.save(changed, tmp_path / "saved")
        for back in (
            qpass.load(tmp_path / "saved"),
            hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        ):
            back.tie_weights()
            with torch.no_grad():
                want = model(**INPUTS, output_hidden_states=True)
                got = back(**INPUTS, output_hidden_states=True)
                embeds = model.get_input_embeddings()(INPUTS["input_ids"])
                assert relative(want.logits, back(inputs_embeds=embeds).logits) <= KINDS[kind]
            for before, after in zip(want.hidden_states, got.hidden_states, strict=True):
                assert relative(before, after) <= KINDS[kind]
            with pytest.raises(StateError, match="resize"):
                back.resize_token_embeddings(80)

    def test_a_plain_module_that_is_saved_shows_the_same(self, tmp_path) -> None:
        model, changed = pair("nano_gpt")
        qpass.save(changed, tmp_path / "saved")
        fresh = NanoGPT().double()
        randomise(fresh, 3)
        back = qpass.load(tmp_path / "saved", model=fresh)
        assert relative(shown(model, "blocks.1.up"), shown(back, "blocks.1.up")) <= CLOSE

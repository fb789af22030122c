"""Does a changed model do what models do: generate, train, be copied, cast and called at once?"""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.errors import StateError
from tests.surface.changed import CLOSE, EIGHT_BITS, KINDS, first, pair, relative
from tests.zoo import PAD, NanoGPT, randomise, specimen, tiny, tokens

INPUTS = {"input_ids": tokens()}
MODELS = ("llama_tied", "gpt2")
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
TYPES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def llama(seed: int = 0, **changes: object) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=64,
        max_position_embeddings=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        **{"tie_word_embeddings": True} | changes,
    )
    return tiny(config, seed, dtype=torch.float32)


def rotated(seed: int = 0, **changes: object) -> nn.Module:
    model = llama(seed, **changes)
    qpass.rotate(model, INPUTS)
    return model


def output(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return first(model(**(inputs or INPUTS)))


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


def shown(model: nn.Module, path: str) -> Tensor:
    """What a hook on a part of a model is shown."""
    seen: list[Tensor] = []
    part = model.base_model if path == "base_model" else model.get_submodule(path)
    with part.register_forward_hook(lambda m, args, out: seen.append(first(out))):
        output(model)
    return seen[0]


class TestCalls:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
    def test_padding_changes_nothing(self, name: str, kind: str) -> None:
        _, changed = pair(name, kind)
        short, long = tokens(1, 4, seed=1), tokens(1, 7, seed=2)
        alone = [output(changed, input_ids=ids)[0] for ids in (short, long)]
        pad = torch.full((1, 3), PAD)
        for left in (False, True):
            padded = torch.cat((pad, short) if left else (short, pad), 1)
            mask = torch.ones(2, 7, dtype=torch.int64)
            mask[0, slice(0, 3) if left else slice(4, 7)] = 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": torch.cat((padded, long)), "attention_mask": mask}
            if name != "opt":
                inputs["position_ids"] = positions
            together = output(changed, **inputs)
            real = together[0, 3:] if left else together[0, :4]
            assert relative(alone[0], real) <= CLOSE
            assert relative(alone[1], together[1]) <= CLOSE

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", ["llama", "gpt2", "nano_gpt"])
    def test_no_batch_and_one_token(self, name: str, kind: str) -> None:
        model, changed = pair(name, kind)
        # transformers' own code does not take an empty batch
        for shape in ((0, 5), (1, 1), (3, 1))[name != "nano_gpt" :]:
            ids = tokens(*shape)
            assert (
                relative(output(model, input_ids=ids), output(changed, input_ids=ids))
                <= (KINDS[kind])
            )

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3"])
    def test_types_in_and_out(self, name: str, dtype: torch.dtype) -> None:
        model = specimen(name).build(0).to(dtype)
        want = output(copy.deepcopy(model))
        qpass.rotate(model, INPUTS)
        assert relative(want, output(model)) <= TYPES[dtype]
        with torch.no_grad():
            states = model(**INPUTS, output_hidden_states=True).hidden_states
        assert {s.dtype for s in states} == {dtype}
        qpass.quantize(model, "w8a8", inputs=INPUTS)
        assert relative(want, output(model)) <= max(TYPES[dtype], EIGHT_BITS)

    @pytest.mark.parametrize("kind", KINDS)
    def test_casts_afterwards(self, kind: str) -> None:
        model, changed = pair("llama", kind)
        for dtype in (torch.bfloat16, torch.float32):
            changed.to(dtype)
            model.to(dtype)
            with torch.no_grad():
                want = model(**INPUTS, output_hidden_states=True)
                got = changed(**INPUTS, output_hidden_states=True)
            for before, after in zip(want.hidden_states, got.hidden_states, strict=True):
                assert relative(before, after) <= max(0.1, KINDS[kind])

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_generating(self, cache: str, dtype: torch.dtype) -> None:
        model = llama()
        changed = copy.deepcopy(model)
        qpass.rotate(changed, INPUTS)
        options = GREEDY | {"cache_implementation": cache}
        want = model.generate(tokens(2, 5), **options)
        got = changed.generate(tokens(2, 5), **options)
        assert torch.equal(want, got)
        embeds = model.get_input_embeddings()(tokens(2, 5))
        got = changed.generate(inputs_embeds=embeds, **options)
        assert torch.equal(want[:, 5:], got)
        qpass.quantize(changed.to(dtype), "w8a8", inputs=INPUTS)
        assert changed.generate(tokens(2, 5), **options).shape == (2, 13)

    def test_a_pipeline(self) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace

        words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(60))]
        inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        inner.pre_tokenizer = Whitespace()
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
        )
        model = llama()
        changed = copy.deepcopy(model)
        qpass.rotate(changed, INPUTS)
        texts = []
        for each in (model, changed):
            write = hf.pipeline("text-generation", model=each, tokenizer=tokenizer, device="cpu")
            made = write("w3 w5 w7", max_new_tokens=4, do_sample=False)
            texts.append(made[0]["generated_text"])
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_threads_do_not_see_each_other(self, kind: str) -> None:
        model, changed = pair("llama_tied", kind)
        with torch.no_grad():
            base = model.base_model(**INPUTS).last_hidden_state
            state = model(**INPUTS, output_hidden_states=True).hidden_states[1]
        logits = output(model)
        jobs = (
            (base, lambda: changed.base_model(**INPUTS).last_hidden_state),
            (logits, lambda: changed(**INPUTS).logits),
            (state, lambda: changed(**INPUTS, output_hidden_states=True).hidden_states[1]),
        )
        errors: list[float] = []

        def work(want: Tensor, call) -> None:
            with torch.no_grad():
                for _ in range(10):
                    errors.append(relative(want, call()))

        threads = [threading.Thread(target=work, args=job) for job in (*jobs, *jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 60
        assert max(errors) <= KINDS[kind]

    def test_an_error_inside_does_not_stay(self) -> None:
        model, changed = pair("llama")
        handle = changed.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            changed(**INPUTS)
        handle.remove()
        with pytest.raises(IndexError):
            changed(input_ids=torch.full((1, 2), 999))
        with torch.no_grad():
            want = model.base_model(**INPUTS).last_hidden_state
            assert relative(want, changed.base_model(**INPUTS).last_hidden_state) <= CLOSE


class TestGradients:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "nano_gpt"])
    def test_a_rotated_model_trains(self, name: str) -> None:
        model, changed = pair(name)
        ids = INPUTS["input_ids"]
        losses = [
            nn.functional.cross_entropy(first(m(ids)).flatten(0, 1), ids.flatten())
            for m in (model, changed)
        ]
        assert relative(*losses) <= CLOSE
        losses[1].backward()
        without = [n for n, p in changed.named_parameters() if p.grad is None]
        assert without == []
        for parameter in changed.parameters():
            parameter.data -= 1e-3 * parameter.grad
        after = nn.functional.cross_entropy(first(changed(ids)).flatten(0, 1), ids.flatten())
        assert after < losses[1]

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
    def test_gradients_of_inputs_are_those_of_the_model_as_it_was(self, name: str) -> None:
        model, changed = pair(name)
        embeds = model.get_input_embeddings()(INPUTS["input_ids"]).detach()
        gradients = []
        for each in (model, changed):
            given = embeds.clone().requires_grad_()
            each(inputs_embeds=given).logits.square().mean().backward()
            gradients.append(given.grad)
        assert relative(*gradients) <= 1e-4

    def test_a_hook_may_keep_what_gradients_reach(self) -> None:
        gradients = []
        for model in pair("llama"):
            kept: list[Tensor] = []

            def keep(m, args, out, kept=kept) -> None:
                out.retain_grad()
                kept.append(out)

            handle = model.model.norm.register_forward_hook(keep)
            model(**INPUTS).logits.square().mean().backward()
            handle.remove()
            gradients.append(kept[0].grad)
        assert relative(*gradients) <= 1e-4

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_a_quantized_model_has_none_and_says_so(self, name: str) -> None:
        model, changed = pair(name, "quantized")
        assert not any(p.requires_grad for p in changed.parameters())
        loss = first(changed(**INPUTS)).sum()
        assert not loss.requires_grad
        embeds = model.get_input_embeddings()(INPUTS["input_ids"]).detach().requires_grad_()
        loss = changed(inputs_embeds=embeds).logits.sum()
        with pytest.raises(qpass.QpassError, match="no backward"):
            loss.backward()

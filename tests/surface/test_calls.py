"""Do changed models generate, train, and answer several callers at once?"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from tests.surface.changed import (
    CLOSE,
    EIGHT_BITS,
    GREEDY,
    INPUTS,
    KINDS,
    first,
    llama,
    output,
    pair,
    relative,
)
from tests.zoo import PAD, specimen, tokens

TYPES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


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

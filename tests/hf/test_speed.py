"""Is what is timed the continuation that the model would generate, and do the models take turns?"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from qpass.errors import BadInput
from qpass.hf import speed
from qpass.hf.speed import measure
from tests.zoo import tiny, tokens


def model(seed: int) -> hf.PreTrainedModel:
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return tiny(config, seed)


def ignore(step: str, done: int, total: int) -> None:
    pass


def test_the_timed_tokens_are_the_generated_ones() -> None:
    models = {"one": model(0), "two": model(1)}
    prompt = tokens(1, 9)
    found = measure(models, prompt, new_tokens=6, repetitions=3, progress=ignore)
    for name, one in models.items():
        want = one.generate(
            prompt, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found[name].written == tuple(want[0, 9:].tolist())
        assert found[name].prefill > 0
        assert found[name].decode > 0
    assert found["one"].written != found["two"].written


def test_models_take_turns_and_medians_leave_the_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    order: list[str] = []
    models = {"one": model(0), "two": model(1)}
    for name, one in models.items():
        one.register_forward_hook(lambda *_, name=name: order.append(name))
    # the second prefill step is timed at 1 and each repetition takes as long as the first
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    found = measure(models, tokens(1, 9), new_tokens=2, repetitions=2, progress=ignore)
    # after one allocating step of `forward` (no hooks), a prefill and two tokens each, in turns
    assert (
        order == ["one"] * 3 + ["two"] * 3 + ["one"] * 3 + ["two"] * 3 + ["one"] * 3 + ["two"] * 3
    )
    assert found["one"].prefill == 9.0
    assert found["one"].decode == 2.0


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    measure(
        {"one": model(0)},
        tokens(1, 5),
        new_tokens=1,
        repetitions=2,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "repetitions"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), 1, 1),
        (torch.zeros(4, dtype=torch.int64), 1, 1),
        (torch.zeros(1, 0, dtype=torch.int64), 1, 1),
        (torch.zeros(1, 4, dtype=torch.int64), 0, 1),
        (torch.zeros(1, 4, dtype=torch.int64), 1, 0),
    ],
)
def test_bad_input_is_refused(prompt: torch.Tensor, new_tokens: int, repetitions: int) -> None:
    with pytest.raises(BadInput):
        measure({}, prompt, new_tokens=new_tokens, repetitions=repetitions, progress=ignore)

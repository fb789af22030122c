"""Do experts, which multiply inside one forward, stay the same however they are run?"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import qpass
from qpass.targets.holding import holdings
from tests.custom.base import CUSTOM
from tests.custom.test_custom import far, outputs
from tests.zoo import tiny, tokens

# norms of transformers cast to float32 on the way
EAGER = 1e-5


@pytest.mark.parametrize("name", ["DenseMoe", "IndexedMoe", "BatchedMoe", "FunctionalGpt"])
def test_models_as_users_write_them(name: str, tmp_path) -> None:
    model, ref = CUSTOM[name].model(), CUSTOM[name].model()
    qpass.rotate(model, CUSTOM[name].calls[0]())
    assert list(holdings(model))
    qpass.save(model, tmp_path / "saved")
    loaded = qpass.load(tmp_path / "saved", CUSTOM[name].model())
    for call in CUSTOM[name].calls:
        assert far(outputs(model, call()), outputs(ref, call())) <= 1e-9
        assert far(outputs(loaded, call()), outputs(ref, call())) <= 1e-9


def test_experts_of_a_library_of_models_however_they_are_run(tmp_path) -> None:
    config = hf.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "batched_mm"
    model, ref = tiny(config), tiny(config)
    report = qpass.rotate(model, {"input_ids": tokens()})
    assert report.coverage.declined == 0
    assert {h.name for h in holdings(model)} == {"down_proj"}
    qpass.save(model, tmp_path / "saved")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    loaded.tie_weights()
    for each in (model, loaded):
        for way in ("eager", "batched_mm"):
            each.set_experts_implementation(way)
            for ids in (tokens(), tokens(3, 9, seed=1)):
                with torch.no_grad():
                    got, want = each(ids).logits, ref(ids).logits
                assert (got - want).abs().max() <= EAGER * want.abs().max()
    torch._dynamo.reset()
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        want = ref(tokens()).logits
        got = torch.compile(model, backend="eager", fullgraph=True)(tokens()).logits
    assert (got - want).abs().max() <= EAGER * want.abs().max()
    small = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        got, want = small(tokens()).logits, ref(tokens()).logits
        rounded = copy.deepcopy(ref).to(torch.bfloat16)(tokens()).logits
    assert (got - want).norm() <= 2 * (rounded - want).norm()

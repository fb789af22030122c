"""Are models with experts rotated exactly, in their residual stream and in every expert?"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import transformers as hf
from torch import Tensor

import qpass
from tests.zoo import _GATED, tiny, tokens

# what float32 leaves of a model of two layers after its weights have been rotated
ROUNDING = 1e-4
LIMIT = 1e-12

CONFIGS = {
    "sorted": lambda: hf.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    "shared": lambda: hf.Qwen2MoeConfig(
        **_GATED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "biased": lambda: hf.GptOssConfig(
        **_GATED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),
}


def experts(model: hf.PreTrainedModel) -> Mapping[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 3}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_of_experts_is_rotated_exactly(name: str) -> None:
    attention = "eager" if name == "biased" else "sdpa"
    model = tiny(CONFIGS[name](), dtype=torch.float32, attention=attention)
    inputs, other = {"input_ids": tokens()}, {"input_ids": tokens(3, 9, seed=1)}
    before = experts(model)
    assert before
    with torch.no_grad():
        want = model(**other).logits
    report = qpass.rotate(model, inputs)
    assert report.max_error <= LIMIT
    assert any(r.region.startswith("model.embed_tokens") for r in report.plan.rotated)
    after = experts(model)
    assert all(not torch.equal(after[n], value) for n, value in before.items())
    with torch.no_grad():
        got = model(**other).logits
    assert (got - want).abs().max() <= ROUNDING * want.abs().max()

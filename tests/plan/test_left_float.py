"""Is every weight of a product quantized, or said why not?"""

from __future__ import annotations

import pytest
import transformers as hf

from qpass.capture import capture
from qpass.ir import run_passes
from qpass.plan import Recipe
from qpass.plan.choose import choose
from qpass.transform import FoldNorms, FoldScales
from tests.zoo import VOCABULARY, specimen, tiny, tokens

EXPERTS = hf.MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=16,
)


def declined(model, inputs, recipe: str = "w8a8") -> dict[str, str]:
    captured = capture(model, inputs)
    folded, _ = run_passes(captured.program, [FoldNorms(), FoldScales()])
    plan = choose(folded, Recipe.read(recipe, rotation="off"))
    quantized = {entry.site for entry in plan.quantized}
    found = {d.where: d.why for d in plan.declined if d.why.startswith("not quantized")}
    assert not quantized & set(found)
    return found


def test_experts_that_are_stacked_are_declined() -> None:
    found = declined(tiny(EXPERTS, 0).float(), {"input_ids": tokens(1, 7)})
    for name in ("gate_up_proj", "down_proj"):
        why = found[f"model.layers.0.mlp.experts.{name}"]
        assert "grouped_mm" in why
        assert "a weight of 3 axes" in why


def test_convolutions_are_declined() -> None:
    given = specimen("vision").inputs()
    found = declined(specimen("vision").build(0), given)
    assert [why for why in found.values() if "conv" in why]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_where_all_is_quantized_nothing_is_said(name: str) -> None:
    assert declined(specimen(name).build(0), specimen(name).inputs()) == {}

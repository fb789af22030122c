"""What the programs of one-layer models look like, line by line."""

import pytest
import transformers as hf

from qpass.capture import capture
from tests.zoo import NanoGPT, tiny, tokens

_SHARED = {"vocab_size": 64, "pad_token_id": 0}
MODELS = {
    "grouped_rotary": lambda: tiny(
        hf.LlamaConfig(
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **_SHARED,
        )
    ),
    "fused_positions": lambda: tiny(
        hf.GPT2Config(n_embd=24, n_layer=1, n_head=3, n_positions=16, **_SHARED)
    ),
    "written_out": lambda: NanoGPT(layers=1).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_text_of_captured_programs(name, golden):
    golden(f"captured_{name}", capture(MODELS[name](), tokens()).program.text())

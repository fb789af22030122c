"""A language model with a tokenizer of its own, small enough to run every recipe on."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import transformers as hf

from tests.zoo import tiny

WORDS = 60


def save(folder: Path) -> None:
    """Write the model and the tokenizer, as a hub does."""
    words = ["[UNK]", *(f"w{n}" for n in range(WORDS - 1))]
    vocabulary = {word: at for at, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        folder
    )
    config = hf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    tiny(config).float().save_pretrained(folder)


def text(words: int) -> str:
    """A text of so many tokens, in which every word occurs."""
    return " ".join(f"w{(at * at + 3 * at) % (WORDS - 1)}" for at in range(words))

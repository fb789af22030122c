"""llama.cpp, compiled for this machine: a file written by gguf, quantized by llama.cpp itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open

from tests.bench.engines.worker import Prompts, Setting, main

TYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
# the checkpoint's name of a tensor -> llama.cpp's
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Llama:
    """One sequence for each prompt; scores of their last tokens."""

    def __init__(self, path: Path, setting: Setting) -> None:
        llama_cpp.llama_backend_init()
        whole = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), whole)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = setting.batch * setting.room
        params.n_seq_max = setting.batch
        params.n_threads = params.n_threads_batch = setting.threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._scores = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._asked = llama_cpp.llama_batch_init(setting.batch * setting.prompt, 0, 1)
        self._read = 0

    def prefill(self, prompts: Prompts) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._read = 0
        return self._next(prompts)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        return self._next([[token] for token in tokens])

    def _next(self, prompts: Prompts) -> np.ndarray:
        asked, at, last = self._asked, 0, list[int]()
        for sequence, tokens in enumerate(prompts):
            for position, token in enumerate(tokens, self._read):
                asked.token[at], asked.pos[at] = token, position
                asked.n_seq_id[at], asked.seq_id[at][0] = 1, sequence
                asked.logits[at] = position == self._read + len(tokens) - 1
                at += 1
            last.append(at - 1)
        asked.n_tokens = at
        if status := llama_cpp.llama_decode(self._context, asked):
            raise SystemExit(f"llama_decode returned {status}")
        self._read += len(prompts[0])
        rows = (llama_cpp.llama_get_logits_ith(self._context, i) for i in last)
        return np.stack([np.ctypeslib.as_array(row, (self._scores,)) for row in rows])


def load(variant: str, path: Path, setting: Setting) -> Llama:
    return Llama(path, setting)


def convert(variant: str, checkpoint: Path, out: Path) -> None:
    whole = out.with_suffix(".whole")
    _write(checkpoint, whole)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[variant]
    failed = llama_cpp.llama_model_quantize(bytes(whole), bytes(out), params)
    whole.unlink()
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


def _write(checkpoint: Path, path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    # nothing here reads text, but a file without a vocabulary is refused
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    tied = config.get("tie_word_embeddings", False)
    for name, values in _tensors(checkpoint):
        if tied and name.startswith("lm_head"):
            continue
        turned = {"self_attn.q_proj": heads, "self_attn.k_proj": pairs}
        for part, count in turned.items():
            if part in name:
                values = _interleaved(values, count)
        small = values.ndim == 1
        writer.add_tensor(_renamed(name), values.astype(np.float32 if small else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name).float().numpy()


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head as llama.cpp turns them: the two of a plane next to each other."""
    rows, width = values.shape
    return values.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


if __name__ == "__main__":
    main(load, convert)

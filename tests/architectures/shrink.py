"""How small a model of any config can be made, without knowing the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import transformers as hf

VOCABULARY = 64
IMAGE = 32


def _each(value: object, names: str) -> dict[str, object]:
    return dict.fromkeys(names.split(), value)


# what fields of these names become wherever a config has them; widths and head counts differ and
# few are powers of two, so that an axis is not taken for another
_SMALL: dict[str, object] = {
    **_each(
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input entity_vocab_size "
        "encoder_hash_byte_group_vocab src_vocab_size tgt_vocab_size shape_vocab_size "
        "pronunciation_vocab_size",
    ),
    **_each(
        48,
        "hidden_size n_embd d_model dim embed_dim n_embed width embedding_size emb_dim "
        "entity_emb_size word_embed_proj_dim lru_width hidden_size_global cross_hidden_size "
        "audio_hidden_size projector_hidden_size d_latents output_num_channels "
        "input_embedding_size output_embedding_size encoder_hidden_size",
    ),
    **_each(
        2,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_decoder_layers num_encoder_layers encoder_num_hidden_layers "
        "decoder_num_hidden_layers num_stages num_encoder_blocks num_feat_extract_layers "
        "num_conv_layers",
    ),
    **_each(
        6,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads attention_heads num_query_heads mamba_n_heads "
        "mamba_num_heads encoder_num_attention_heads decoder_num_attention_heads "
        "cross_num_attention_heads num_self_attention_heads num_cross_attention_heads "
        "index_n_heads",
    ),
    **_each(
        2,
        "num_key_value_heads num_kv_heads multi_query_group_num n_groups mamba_n_groups "
        "linear_num_key_heads linear_num_value_heads encoder_num_key_value_heads "
        "decoder_num_key_value_heads cross_num_key_value_heads kv_n_heads n_mamba_heads",
    ),
    **_each(
        80,
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim "
        "ffn_hidden_size dim_ff hidden_dim mlp_dim dff d_inner feed_forward_size "
        "intermediate_size_mlp dense_intermediate_size",
    ),
    **_each(
        40,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size",
    ),
    **_each(
        32,
        "n_positions max_position_embeddings seq_length n_ctx max_seq_len "
        "max_sequence_length max_target_positions context_size",
    ),
    **_each(
        4,
        "num_experts num_local_experts n_routed_experts moe_num_experts sliding_window "
        "attention_window attention_window_size window_size block_size chunk_size "
        "patch_size conv_kernel mamba_chunk_size index_block_size qk_rope_head_dim rotary_dim",
    ),
    **_each(2, "num_experts_per_tok moe_topk moe_k top_k_experts expand"),
    **_each(
        8,
        "head_dim d_kv kv_channels v_head_dim attention_head_dim d_head state_size "
        "mamba_d_state ssm_state_size time_step_rank linear_key_head_dim "
        "linear_value_head_dim linear_head_dim dim_head cross_head_dim index_head_dim "
        "mamba_dt_rank num_latents adapter_rank hidden_size_per_layer_input laurel_rank",
    ),
    **_each(24, "conv_channels subsampling_conv_channels"),
    **_each(16, "mamba_d_head mamba_head_dim kv_lora_rank"),
    **_each(1, "bos_token_id decoder_start_token_id"),
    **_each(
        1,
        "n_group topk_group num_expert_group max_window_layers moe_layer_freq "
        "first_k_dense_replace n_shared_experts",
    ),
    **_each(0, "pad_token_id num_kv_shared_layers"),
    **_each(
        0.0,
        "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob "
        "resid_pdrop embd_pdrop attn_pdrop",
    ),
    "q_lora_rank": 20,
    "mamba_d_ssm": 96,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "swa_v_head_dim": 8,
    "num_query_pool": 1,
    "num_groups": 2,
    "upsample_groups": 48,
    "qk_nope_head_dim": 6,
    "eos_token_id": 2,
    "type_vocab_size": 2,
    "max_source_positions": 64,
    "num_mel_bins": 16,
    "num_channels": 3,
    "image_size": IMAGE,
    "global_rope_theta": 1e4,
    "use_cache": False,
    "depths": 1,
}
# the first two stages of a model that has stages, and what others grow by
_STAGED: dict[str, tuple[int, int]] = {
    "depths": (1, 1),
    "depth": (1, 1),
    "hidden_sizes": (24, 48),
    "embed_dims": (24, 48),
    "embed_dim": (24, 48),
    "encoder_hidden_sizes": (24, 48),
    "conv_dim": (24, 48),
    "num_heads": (2, 4),
    "num_attention_heads": (2, 4),
}
# fields that mean something else where their default is None
_NONE_MEANS = frozenset(
    _each(None, "head_dim q_lora_rank sliding_window n_inner rotary_dim d_kv num_key_value_heads")
)
# what the names above cannot say
_OF_TYPE: dict[str, dict[str, object]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "deepseek_v3": {"n_group": 2},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False},
    "bamba": {"attn_layer_indices": [1]},
    "phi": {"num_key_value_heads": 6},
    "persimmon": {"num_key_value_heads": 6},
    "electra": {"embedding_size": 24},
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},
    "jetmoe": {"num_key_value_heads": 3},
    "codegen": {"n_head": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 6, "head_dim": 16},
    "swin": {"embed_dim": 24},
    "swinv2": {"embed_dim": 24},
    "donut-swin": {"embed_dim": 24},
    "nemo_speechlm.word_timestamp_config": {"blank_token_id": VOCABULARY - 1},
    "cvt": {"depth": [1, 2]},
    "dots3_note_text": {
        "num_key_value_heads": 6,
        "swa_num_attention_heads": 6,
        "swa_num_key_value_heads": 6,
        "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 6,
        "swa_qk_rope_head_dim": 4,
        "swa_head_dim": 10,
        "swa_v_head_dim": 8,
    },
    "levit": {"image_size": 64, "patch_size": 16},
    "textnet": {"stem_out_channels": 24},
    "xmod": {"default_language": "en_XX"},
    "hiera": {"patch_padding": [0, 0]},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "efficientnet": {
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 32],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 1],
        "expand_ratios": [1, 6, 6],
        "hidden_dim": 1280,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    },
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 24, 48, 72],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [24, 48, 72, 96],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "zamba": {
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
        "num_key_value_heads": 6,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "dbrx.attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "dia": {"delay_pattern": [0, 1, 2]},
    "fun_asr_nano.adaptor_config": {"intermediate_size": 12},
    "kyutai_speech_to_text": {"pad_token_id": 3, "audio_pad_token_id": 4, "num_codebooks": 2},
    "moonshine_streaming": {"num_key_value_heads": 6},
    "granite_speech5_ctc.encoder_config": {"context_size": 16},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "mimo_v2_flash": {"num_key_value_heads": 3},
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to be small that suits some configs: fields to leave and to set, for one."""

    leave: frozenset[str] = frozenset()
    given: Mapping[str, object] = field(default_factory=dict[str, object])
    fill: bool = False  # also what is None
    staged: bool = False  # with as many stages as there are


_LIKE_QUERIES = _each(
    6, "num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads"
)
_EVEN = dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_key_value_heads"), 4)
VARIANTS = (
    Variant(),
    Variant(given=_LIKE_QUERIES),
    Variant(given={"head_dim": 8}),
    Variant(fill=True),
    Variant(given={"head_dim": 8, **_LIKE_QUERIES}),
    Variant(leave=frozenset({"layer_types"})),
    Variant(leave=frozenset({"layer_types"}), given=_LIKE_QUERIES),
    Variant(leave=frozenset({"sliding_window"})),
    Variant(
        leave=frozenset({"first_k_dense_replace"}), given={"qk_rope_head_dim": 8, **_LIKE_QUERIES}
    ),
    Variant(given={"hidden_size_per_layer_input": 0}),
    Variant(leave=frozenset({"head_dim"}), given=_EVEN),
    Variant(given={"intermediate_size": 96, "moe_intermediate_size": 48}),
    Variant(given={"hidden_size": 64, "intermediate_size": 128, **_EVEN, "head_dim": 16}),
    Variant(staged=True),
)


def shrunk(
    kind: type[hf.PretrainedConfig], variant: Variant, name: str | None = None
) -> hf.PretrainedConfig:
    """A small config of this class; raises whatever it says to values that do not fit."""
    name = name or kind.model_type
    default = kind()
    values = _values(kind, default.to_dict(), variant) | _OF_TYPE.get(name, {})
    # a config checks its parts against itself, so they come first
    for part in kind.sub_configs:
        if isinstance(sub := getattr(default, part, None), hf.PretrainedConfig):
            values[part] = shrunk(type(sub), variant, f"{name}.{part}")
    return _built(kind, values)


def _values(
    kind: type[hf.PretrainedConfig], default: Mapping[str, object], variant: Variant
) -> dict[str, object]:
    # an alias says what its field says already
    aliases = [name for name, field in kind.attribute_map.items() if field not in _SMALL]
    sequences = {k: v for k, v in default.items() if isinstance(v, list | tuple) and v}
    stages = max((len(v) for k, v in sequences.items() if k in _STAGED), default=0)
    layers = default.get("num_hidden_layers")
    values: dict[str, object] = {}
    for key in {*default, *(a for a in aliases if kind.attribute_map[a] not in sequences)}:
        old = default.get(key)
        if key in sequences:
            shorten = _thin if variant.staged else _short
            values[key] = shorten(key, sequences[key], stages)
        elif key in variant.given:
            values[key] = variant.given[key]
        elif key in _SMALL and not isinstance(old, list | tuple | dict):
            if old is None and key in _NONE_MEANS and not variant.fill:
                continue
            # a probability may be an integer in one config and a float in the next
            values[key] = 0 if _whole(old, _SMALL[key]) else _SMALL[key]
    kinds = [len(set(v)) for v in sequences.values() if len(v) == layers and _named(v)]
    count = max(2, *kinds) if kinds else 2
    for key, old in sequences.items():
        if len(old) == layers and len(old) > 2:
            few = list(dict.fromkeys(old)) if _named(old) else [_SMALL.get(key, old[0])]
            values[key] = (few * count)[:count]
            values["num_hidden_layers"] = count
    return {k: v for k, v in values.items() if v is not None and k not in variant.leave}


def _short(key: str, old: Sequence[object], stages: int) -> object:
    """A list with an entry for the first and the last of all stages, or None to leave it."""
    if stages > 2 and len(old) == stages:
        return list(_STAGED.get(key, (old[0], old[-1])))
    if stages > 3 and len(old) == stages - 1:
        return [old[0]]
    if not all(type(v) is int for v in old):
        return None
    return [_SMALL[key]] * len(old) if key in _SMALL else None


def _thin(key: str, old: Sequence[object], stages: int) -> object:
    """A list as long as it was, of small widths, or None to leave it."""
    if key not in _STAGED:
        return _short(key, old, 0)
    first, second = _STAGED[key]
    return [first + (second - first) * at for at in range(len(old))]


def _named(values: Sequence[object]) -> bool:
    return all(isinstance(v, str) for v in values)


def _whole(old: object, small: object) -> bool:
    return type(old) is int and small == 0.0 and type(small) is float


def _built(kind: type[hf.PretrainedConfig], values: dict[str, object]) -> hf.PretrainedConfig:
    """Build it without the fields that it derives from others; `values` loses those."""
    while True:
        try:
            return kind(**values)
        except AttributeError as error:
            derived = re.search(r"property '(\w+)' of .* has no setter", str(error))
            if derived is None or values.pop(derived[1], None) is None:
                raise

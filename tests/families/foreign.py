"""Tiny models laid out as those of code that is not in transformers: their parts by the names that they have there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
CONTEXT, PICTURE = 120, -200  # what stands for a patch, and for an image
PATCHES = 4


def vision() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**VISION))


def mlp(width: int = 24) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 32))


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"


class InternVLChatModel(PreTrainedModel):
    """All tiles of an image are one run of tokens; `image_flags` marks the tiles of rows without an image."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        self.img_context_token_id = CONTEXT
        self.vision_model = vision()
        self.language_model = LlamaForCausalLM(LlamaConfig(**TEXT))
        self.mlp1 = nn.Sequential(nn.LayerNorm(24), *mlp())
        self.post_init()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.mlp1(self.vision_model(pixel_values).last_hidden_state[:, 1:])
        return features

    def _embedded(self, input_ids: Tensor, pixel_values: Tensor | None, image_flags: Tensor | None) -> Tensor:
        embeddings: Tensor = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        features = self.extract_feature(pixel_values)
        if image_flags is not None:
            features = features[image_flags.squeeze(-1) == 1]
        places = (input_ids == self.img_context_token_id)[..., None].expand_as(embeddings)
        return embeddings.masked_scatter(places, features.to(embeddings.dtype))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_flags: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        assert input_ids is not None
        embeddings = self._embedded(input_ids, pixel_values, image_flags)
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **kwargs)

    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        **kw: Any,
    ) -> Any:
        assert input_ids is not None
        embeddings = self._embedded(input_ids, pixel_values, None)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kw)


class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"


class CLIPVisionTower(nn.Module):
    """May get its model later than the language model does."""

    def __init__(self, delay_load: bool = False) -> None:
        super().__init__()
        self.select_layer = -1
        if not delay_load:
            self.vision_tower = vision()

    def forward(self, images: Tensor) -> Tensor:
        states: Tensor = self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]
        return states


class LlavaLlamaModel(LlamaModel):
    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionTower()
        self.mm_projector = mlp()


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """A token that is none stands for each image; rows without an image bring one that is not looked at."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def encode_images(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.mm_projector(self.model.vision_tower(images))
        return features

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, images: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = [image if image.dim() == 4 else image[None] for image in images]
        features = iter(self.encode_images(torch.cat(tiles)).split([len(tile) for tile in tiles]))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows: list[tuple[Tensor, Tensor]] = []
        for i, (ids, seen) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            ids, targets = ids[seen], (ids if labels is None else labels[i])[seen]
            pictures = (ids == PICTURE).nonzero()[:, 0].tolist()
            if not pictures:
                next(features)
            embedded, wanted, begin = [], [], 0
            for end in [*pictures, len(ids)]:
                embedded.append(self.model.embed_tokens(ids[begin:end]))
                wanted.append(targets[begin:end])
                if end < len(ids):
                    embedded.append(next(features).flatten(0, 1))
                    wanted.append(targets.new_full((len(embedded[-1]),), -100))
                begin = end + 1
            rows.append((torch.cat(embedded), torch.cat(wanted)))
        lengths = torch.tensor([len(row) for row, _ in rows])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        targets = pad_sequence([wanted for _, wanted in rows], batch_first=True, padding_value=-100)
        return pad_sequence([row for row, _ in rows], batch_first=True), mask, targets

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None and images is not None:
            assert input_ids is not None
            inputs_embeds, attention_mask, targets = self.prepare_inputs_labels_for_multimodal(
                input_ids, attention_mask, labels, images
            )
            input_ids, labels = None, None if labels is None else targets
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels, **kwargs
        )

    @torch.no_grad()
    def generate(self, inputs: Any = None, images: Any = None, image_sizes: Any = None, **kwargs: Any) -> Any:
        mask = kwargs.pop("attention_mask", None)
        embeddings, mask, _ = self.prepare_inputs_labels_for_multimodal(inputs, mask, None, images)
        return super().generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)


class Reader(PreTrainedModel):
    """Of models of which only the parts count."""

    config_class = LlamaConfig

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        raise NotImplementedError


class QwenVisual(nn.Module):
    """A tower of plain modules, which ends in its projector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 4, stride=4, bias=False)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([nn.TransformerEncoderLayer(24, 3, 40)])
        self.attn_pool = nn.Module()
        self.attn_pool.kv_proj = nn.Linear(24, 32, bias=False)
        self.attn_pool.attn = nn.MultiheadAttention(32, 4)
        self.proj = nn.Parameter(torch.randn(32, 32))


class QwenVL(Reader):
    """Qwen-VL's first version: images stand in the token ids as the names of their files."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.transformer = nn.Module()
        language = LlamaModel(config)
        self.transformer.wte, self.transformer.h = language.embed_tokens, language.layers
        self.transformer.visual = QwenVisual()
        self.lm_head = nn.Linear(32, 128, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.transformer.wte
        return embeddings


class Phi3V(Reader):
    """Phi-3-vision: the projector beside the tower, in a module that holds the token embeddings a second time."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        eye = nn.Module()
        eye.wte, eye.img_processor, eye.img_projection = self.model.embed_tokens, vision(), mlp()
        self.model.vision_embed_tokens = eye
        self.lm_head = nn.Linear(32, 128, bias=False)


class MiniCPMV(Reader):
    """MiniCPM-V: a resampler."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.llm, self.vpm, self.resampler = LlamaForCausalLM(config), vision(), nn.Module()
        self.resampler.query = nn.Parameter(torch.randn(4, 32))
        self.resampler.kv_proj = nn.Linear(24, 32, bias=False)
        self.resampler.attn = nn.MultiheadAttention(32, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()


class Wrapper(nn.Module):
    """Somebody's own module around a model of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.vlm = model

    def forward(self, batch: Any) -> BaseModelOutput:
        return self.vlm(**batch)

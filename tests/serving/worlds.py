"""Tiny models that a server can load too, with tokenizer and processor, and tasks and merges to serve on them.

Attention has heads of 32, the smallest that vLLM's CPU kernels take. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files
from tests.adapters import scatter
from tests.families.shrink import merged
from tests.tiny import _FAMILIES, PATCH, Family, _text, with_random_weights

WIDTH, HEADS, SIDE = 64, 2, 16
WORDS = 100
TEXT = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": 32}
VISION = {"hidden_size": WIDTH, "num_attention_heads": HEADS}


@dataclass(frozen=True)
class World:
    """How to make a family's models, and what an image is in its prompts.

    Args:
        special (`list[str]`): The tokens from 120 on.
        image (`str`): What stands for an image in a prompt.
        changes (`dict`): What its configuration needs to be served.
        processor (`Callable`): Of a tokenizer.
        sizes (`list[tuple[int, int]]`): Widths and heights of images.
        most (`int`): Images in a prompt; none are for a language model.
        rename (`tuple[str, str]`, *optional*): What tensors of real checkpoints are called, in place of ours.
        named (`dict`): The special tokens that the processor asks the tokenizer for by name.
        asked (`dict`): The processor's options, in transformers and in vLLM.
    """

    special: list[str]
    image: str
    changes: dict[str, Any]
    processor: Callable[[Any], Any]
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(SIDE, SIDE)])
    most: int = 2
    rename: tuple[str, str] | None = None
    named: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)


def _llava(tokenizer: Any) -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return transformers.LlavaProcessor(images, tokenizer, **_AS_TRAINED)


def _llava_next(tokenizer: Any) -> Any:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    return transformers.LlavaNextProcessor(images, tokenizer, **_AS_TRAINED)


def _qwen(tokenizer: Any, kind: Any = transformers.Qwen2VLProcessor, pixels: int = 64) -> Any:
    sizes = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": pixels, "longest_edge": 1024}}
    images = transformers.Qwen2VLImageProcessor(**sizes)
    return kind(images, tokenizer, transformers.Qwen2VLVideoProcessor(**sizes))


def _paligemma(tokenizer: Any) -> Any:
    images = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, image_seq_length=16)
    return transformers.PaliGemmaProcessor(images, tokenizer)


def _mistral3(tokenizer: Any) -> Any:
    images = transformers.PixtralImageProcessor(patch_size=PATCH, size={"longest_edge": 32})
    return transformers.PixtralProcessor(images, tokenizer, patch_size=PATCH, spatial_merge_size=2)


def _internvl(tokenizer: Any) -> Any:
    size = {"height": SIDE, "width": SIDE}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4)
    videos = transformers.InternVLVideoProcessor(size=size)
    return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4)


def _idefics3(tokenizer: Any) -> Any:
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": SIDE})
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


def _smolvlm(tokenizer: Any) -> Any:
    images = transformers.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": SIDE})
    videos = transformers.SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": SIDE})
    return transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4)


def _gemma3(tokenizer: Any) -> Any:
    images = transformers.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


_AS_TRAINED = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_MROPE = {"rope_parameters": {"mrope_section": [8, 4, 4]}}
_CLIP = {"text_config": TEXT, "vision_config": VISION | {"projection_dim": WIDTH}}
_HUB_NAMES = (r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
_QWEN_VISION = {"hidden_size": WIDTH, "num_heads": HEADS, "out_hidden_size": WIDTH}
_QWEN_SIZES = [(16, 16), (24, 16), (16, 8)]
_IDEFICS_TOKENS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
_TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
_GEMMA = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
_IN_CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 2}
_IN_CROPS |= {"pan_and_scan_min_ratio_to_activate": 1.2}
_INTERN = {
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
}
_PLAIN = {"text_config": TEXT, "vision_config": VISION}
_SPECS = {**_FAMILIES, "llama": Family("Llama", _text)}
WORLDS = {
    "llama": World([], "", TEXT, lambda tokenizer: tokenizer, most=0),
    "llava": World(["<image>"], "<image>", _CLIP, _llava, rename=_HUB_NAMES),
    "llava_next": World(
        ["<image>"], "<image>", _CLIP, _llava_next, [(8, 8), (16, 8), (16, 16), (16, 12)], rename=_HUB_NAMES
    ),
    "qwen2_vl": World(
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        {"vision_config": _QWEN_VISION | {"embed_dim": WIDTH}, "text_config": TEXT | _MROPE},
        _qwen,
        _QWEN_SIZES,
    ),
    "qwen2_5_vl": World(
        _QWEN_TOKENS, _QWEN_IMAGE, {"vision_config": _QWEN_VISION, "text_config": TEXT | _MROPE}, _qwen, _QWEN_SIZES
    ),
    "qwen3_vl": World(
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        {"vision_config": _QWEN_VISION, "text_config": TEXT | _MROPE},
        functools.partial(_qwen, kind=transformers.Qwen3VLProcessor),
        _QWEN_SIZES,
    ),
    "internvl": World(
        list(_INTERN.values()),
        "<IMG_CONTEXT>",
        _PLAIN,
        _internvl,
        [(16, 16), (32, 16), (32, 32)],
        named=_INTERN,
    ),
    "idefics3": World(
        [*_IDEFICS_TOKENS, *_TILES],
        "<image>",
        _PLAIN,
        _idefics3,
        [(32, 32), (32, 16)],
    ),
    "smolvlm": World(
        [*_IDEFICS_TOKENS, *_TILES],
        "<image>",
        _PLAIN,
        _smolvlm,
        [(32, 32), (32, 16)],
    ),
    "gemma3": World(
        ["<soft>", "<video>", "<boi>", "<eoi>", "\n", "\n\n", "\n\n\n", "\n\n\n\n"],
        "w0 <boi>",  # or the line breaks about two images are one, as this tokenizer drops spaces
        {"text_config": TEXT | {"query_pre_attn_scalar": 32}, "vision_config": VISION},
        _gemma3,
        rename=_HUB_NAMES,
        named=_GEMMA,
    ),
    "paligemma": World(
        ["<image>", "\n"],
        "",  # vLLM puts it in front, and so does transformers
        {
            "text_config": TEXT | {"use_bidirectional_attention": False},  # as vLLM, without `token_type_ids`
            "vision_config": VISION | {"projection_dim": WIDTH},
            "projection_dim": WIDTH,
            "hidden_size": WIDTH,
        },
        _paligemma,
        most=1,
        rename=_HUB_NAMES,
    ),
    "mistral3": World(
        ["[IMG]", "<121>", "<122>", "[IMG_END]", "[IMG_BREAK]"],
        "[IMG]",
        {"text_config": TEXT, "vision_config": VISION | {"head_dim": 32}},
        _mistral3,
        _QWEN_SIZES,
    ),
}


GEMMA3_IN_CROPS = replace(
    WORLDS["gemma3"],
    special=[" " if token == "<video>" else token for token in WORLDS["gemma3"].special],  # crops have one between
    asked=_IN_CROPS,
    sizes=[(2 * SIDE, SIDE), (SIDE, 3 * SIDE)],
)


def architecture(family: str) -> str:
    """As a model's config names it."""
    return f"{_SPECS[family].prefix}For{'ConditionalGeneration' if WORLDS[family].most else 'CausalLM'}"


class Served:
    """A family's base model on disk, and tasks that are letters.

    `c`, `x` and `y` trained no projector; the ranks of `x` and `y` differ from layer to layer.
    """

    def __init__(self, root: Path, family: str, tasks: str = "abc", world: World | None = None) -> None:
        self.root, self.family, self.world = root, family, world or WORLDS[family]
        self.base, self.processor = root / "base", self.world.processor(_tokenizer(self.world))
        spec = _SPECS[family]
        config = getattr(transformers, f"{spec.prefix}Config")(**merged(spec.config(), self.world.changes))
        model = with_random_weights(getattr(transformers, architecture(family)), config, 0, torch.float32)
        model.generation_config.suppress_tokens = None
        model.save_pretrained(self.base)
        self.processor.save_pretrained(self.base)
        if self.world.rename is not None:
            rename(self.base / "model.safetensors", self.world.rename)
        self.adapters = {name: self._task(seed, name) for seed, name in enumerate(tasks)}

    def model(self) -> Any:
        kind = getattr(transformers, architecture(self.family))
        return kind.from_pretrained(self.base, dtype=torch.float32).eval()

    def _task(self, seed: int, name: str) -> Path:
        options: dict[str, Any] = {"projector_modules": []} if name in "cxy" else {}
        options["rank_pattern"] = {"q_proj": 2} if name in "xy" else {}
        torch.manual_seed(seed)
        model = get_peft_model(self.model(), MAnyConfig(r=4, lora_alpha=8, task_name=name, **options))
        scatter(model, seed)
        images = [[picture(self, seed, row)] if self.world.most else [] for row in range(4)]
        loader = [self.inputs(text(row, seed), shown) for row, shown in enumerate(images)]
        collect_statistics(model, loader, energy=1.0, progress=False)
        model.save_pretrained(self.root / name)
        return self.root / name

    def inputs(self, words: str, images: list[Image.Image]) -> Any:
        """Of one prompt, as the model takes them."""
        prompt = self.prompt(words, images)
        if not images:
            tokenizer = self.processor.tokenizer if self.world.most else self.processor
            return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = self.processor(text=prompt, images=images, return_tensors="pt", **self.world.asked)
        # By these Gemma 3 and PaliGemma have tokens attend to later ones too, which vLLM does not do on CPUs.
        inputs.pop("token_type_ids", None)
        return inputs

    def prompt(self, words: str, images: list[Image.Image]) -> str:
        return " ".join([*[self.world.image] * len(images), words])

    def merge(self, names: str, output: Path, **options: Any) -> Path:
        return merge_adapter_files([self.adapters[name] for name in names], output, progress=False, **options)

    def prompts(self) -> list[tuple[str, list[Image.Image]]]:
        """Three of text, eight with an image of some task, and one with two images of different tasks.

        A language model gets twelve of text, of all tasks.
        """
        if not self.world.most:
            return [(text(row, row % len(self.adapters)), []) for row in range(12)]
        of_text = [(text(row, 7), []) for row in range(3)]
        of_images = [(text(row, row % 4), [picture(self, row % 4, 10 + row)]) for row in range(8)]
        several = [picture(self, task, 20 + task) for task in range(self.world.most)]
        return [*of_text, *of_images, (text(9, 1), several)]

    def expected(self, merge: Path) -> list[list[int]]:
        """What a merge answers to all prompts, with this package in transformers."""
        return self.expected_of(PeftModel.from_pretrained(self.model(), merge).eval())

    @torch.no_grad()
    def expected_of(self, model: Any, tokens: int = 8) -> list[list[int]]:
        """What a model answers to all prompts, in transformers."""
        found = []
        for words, images in self.prompts():
            inputs = self.inputs(words, images)
            made = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            found.append(made[0, inputs["input_ids"].shape[1] :].tolist())
        return found


def rename(path: Path, pattern: tuple[str, str]) -> None:
    """Call a file's tensors as those of real checkpoints."""
    tensors = {re.sub(*pattern, name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def text(row: int, seed: int) -> str:
    return " ".join(f"w{(13 * seed + 7 * row + place) % WORDS}" for place in range(3 + row % 3))


def picture(served: Served, style: int, seed: int) -> Image.Image:
    """Noise about one colour, by the style."""
    sizes = served.world.sizes
    width, height = sizes[seed % len(sizes)]
    drawn = np.random.default_rng(1000 * style + seed)
    colour = np.array([200 if style >> channel & 1 else 50 for channel in range(3)])
    pixels = colour + 40 * drawn.standard_normal((height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _tokenizer(world: World) -> Any:
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{n}": 3 + n for n in range(WORDS)}}
    vocabulary |= {f"<more{n}>": n for n in range(3 + WORDS, 120)}
    vocabulary |= {token: 120 + n for n, token in enumerate(world.special)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", extra_special_tokens=world.named
    )
    made.add_special_tokens({"additional_special_tokens": world.special})
    return made

"""Tiny random models of several families, and inputs for them, made from configurations alone: nothing is downloaded.

Each model has two text layers of width 32, two vision layers of width 24 (so that mixing them up fails), and a
vocabulary of 128 that ends with special tokens. All weights, biases, and norms are random: none is zero or one by
accident. The generation configuration has no end-of-sequence token and suppresses the special tokens, so `generate`
always yields as many tokens as asked for.

`batch` stands in for the processors, which need torchvision. Placeholders are laid out as each processor does it:
back to back (llava, llava_next, paligemma), one run between a start and an end token (internvl, qwen*, gemma3), one
run per tile behind a marker (idefics3, smolvlm), or one run per row of patches (mistral3).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

VOCABULARY = 128
PAD, BOS = 0, 1
TEXT_TOKENS = range(3, 100)
SPECIAL_TOKENS = range(120, VOCABULARY)
IMAGE, VIDEO, START, END, BREAK, TILE, GLOBAL = SPECIAL_TOKENS[:7]

TEXT_WIDTH, VISION_WIDTH, PATCH, MERGE = 32, 24, 4, 2

Size = tuple[int, int]

_MERGED = PATCH * MERGE
_NEXT_TILE = 8
_NEXT_RESOLUTIONS: tuple[Size, ...] = ((8, 16), (16, 8), (16, 16))
_QWEN_WIDTHS = {"hidden_size": VISION_WIDTH, "intermediate_size": 40, "out_hidden_size": TEXT_WIDTH}


@dataclass(frozen=True)
class Family:
    """How to build one family: the prefix of its class names, its configuration, and the image sizes it takes."""

    prefix: str
    config: Callable[[], dict[str, Any]]
    sizes: tuple[Size, ...] = ((16, 16),)


def _text(model_type: str | None = None, **more: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    kind = {"model_type": model_type} if model_type else {}
    return {**kind, **tokens, **sizes, **heads, "max_position_embeddings": 512, **more}


def _vision(model_type: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": VISION_WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    return {"model_type": model_type, **sizes, "image_size": 16, "patch_size": PATCH, **more}


def _llava() -> dict[str, Any]:
    return {
        "vision_config": _vision("clip_vision_model", projection_dim=VISION_WIDTH),
        "text_config": _text("llama"),
        "image_token_index": IMAGE,
    }


def _llava_next() -> dict[str, Any]:
    return {
        "vision_config": _vision("clip_vision_model", projection_dim=VISION_WIDTH, image_size=_NEXT_TILE),
        "text_config": _text("llama"),
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [list(size) for size in _NEXT_RESOLUTIONS],
    }


def _internvl() -> dict[str, Any]:
    return {
        "vision_config": _vision("internvl_vision", image_size=(16, 16), patch_size=(PATCH, PATCH)),
        "text_config": _text("qwen2"),
        "image_token_id": IMAGE,
        "downsample_ratio": 1 / MERGE,
        "tie_word_embeddings": False,
    }


def _qwen(vision: dict[str, Any], **text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    shared = {"depth": 2, "num_heads": 3, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
    return {
        "vision_config": shared | vision,
        "text_config": _text(rope_parameters=rope | text.pop("rope", {}), **text),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def _qwen2_vl() -> dict[str, Any]:
    return _qwen({"embed_dim": VISION_WIDTH, "hidden_size": TEXT_WIDTH, "mlp_ratio": 2})


def _qwen2_5_vl() -> dict[str, Any]:
    # Windows of two by two merged patches in the first block, full attention in the second
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen(_QWEN_WIDTHS | windows)


def _qwen3_vl() -> dict[str, Any]:
    vision = _QWEN_WIDTHS | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return _qwen(vision, head_dim=8, rope={"mrope_interleaved": True})


def _paligemma() -> dict[str, Any]:
    return {
        "vision_config": _vision("siglip_vision_model", vision_use_head=False),
        "text_config": _text("gemma", head_dim=8),
        "image_token_index": IMAGE,
        "projection_dim": TEXT_WIDTH,
        "hidden_size": TEXT_WIDTH,
        "vocab_size": VOCABULARY,
    }


def _gemma3() -> dict[str, Any]:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    return {
        "vision_config": _vision("siglip_vision_model", vision_use_head=False),
        "text_config": _text("gemma3_text", head_dim=8, query_pre_attn_scalar=8, **layers),
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    }


def _idefics(vision: str) -> dict[str, Any]:
    parts = {"vision_config": _vision(vision), "text_config": _text("llama")}
    return {**parts, "image_token_id": IMAGE, "scale_factor": MERGE, "pad_token_id": PAD}


def _mistral3() -> dict[str, Any]:
    return {
        "vision_config": _vision("pixtral", image_size=32),
        "text_config": _text("mistral", head_dim=8, sliding_window=None),
        "image_token_index": IMAGE,
        "spatial_merge_size": MERGE,
        "tie_word_embeddings": False,
    }


_TILED: tuple[Size, ...] = ((16, 16), (16, 32), (32, 32))
_DYNAMIC: tuple[Size, ...] = ((16, 16), (16, 24), (8, 16))

_FAMILIES = {
    "llava": Family("Llava", _llava),
    "llava_next": Family("LlavaNext", _llava_next, ((8, 8), (8, 16), (16, 16), (12, 16))),
    "internvl": Family("InternVL", _internvl, _TILED),
    "qwen2_vl": Family("Qwen2VL", _qwen2_vl, _DYNAMIC),
    "qwen2_5_vl": Family("Qwen2_5_VL", _qwen2_5_vl, _DYNAMIC),
    "qwen3_vl": Family("Qwen3VL", _qwen3_vl, _DYNAMIC),
    "paligemma": Family("PaliGemma", _paligemma),
    "gemma3": Family("Gemma3", _gemma3),
    "idefics3": Family("Idefics3", partial(_idefics, "idefics3_vision"), _TILED),
    "smolvlm": Family("SmolVLM", partial(_idefics, "smolvlm_vision"), _TILED),
    "mistral3": Family("Mistral3", _mistral3, _DYNAMIC),
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of the family, with a language modelling head, in evaluation mode; the seed fixes every weight."""
    spec = _FAMILIES[family]
    config = getattr(transformers, f"{spec.prefix}Config")(**spec.config())
    return with_random_weights(getattr(transformers, f"{spec.prefix}ForConditionalGeneration"), config, seed, dtype)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: partial(build, name) for name in _FAMILIES}


def build_text(kind: Literal["llama", "gpt2", "t5"], seed: int = 0) -> PreTrainedModel:
    """A tiny text-only model: "llama", "gpt2" (whose projections are Conv1D), or "t5" (an encoder and a decoder)."""
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": None}
    if kind == "llama":
        return with_random_weights(
            transformers.LlamaForCausalLM, transformers.LlamaConfig(**_text()), seed, torch.float32
        )
    if kind == "gpt2":
        gpt2 = transformers.GPT2Config(n_embd=TEXT_WIDTH, n_layer=2, n_head=4, n_positions=128, **tokens)
        return with_random_weights(transformers.GPT2LMHeadModel, gpt2, seed, torch.float32)
    if kind == "t5":
        shape = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        t5 = transformers.T5Config(**shape, **tokens, decoder_start_token_id=PAD, tie_word_embeddings=False)
        return with_random_weights(transformers.T5ForConditionalGeneration, t5, seed, torch.float32)
    raise ValueError(f"unknown kind of text model: {kind!r}")


def with_random_weights(
    kind: type[PreTrainedModel], config: transformers.PreTrainedConfig, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.dim() < 2:  # biases, norms, and single embeddings keep their centre
                    parameter.add_(0.2 * noise)
                else:
                    parameter.copy_(noise * (0.2 if len(parameter) == 1 else parameter[0].numel() ** -0.5))
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            if head is not None and head.weight is embedding.weight:  # tied: large weights make a token predict itself
                head.weight.mul_(0.25)
    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = None
    generation.pad_token_id = PAD
    generation.suppress_tokens = list(SPECIAL_TOKENS)
    return model.to(dtype).eval()


def sizes(family: str) -> list[Size]:
    """The image sizes (height, width) that `batch` takes: one for a family of fixed resolution, else at least two."""
    return list(_FAMILIES[family].sizes)


def image_size(family: str) -> Size:
    """The family's native image size (height, width), the first of `sizes`."""
    return _FAMILIES[family].sizes[0]


def random_image(family: str, seed: int, style: int = 0, size: Size | None = None) -> torch.Tensor:
    """A noisy image of one colour, which the style picks: styles 0 to 7 are the corners of the colour cube."""
    height, width = size or image_size(family)
    generator = torch.Generator().manual_seed(1_000_003 * style + seed)
    colour = torch.tensor([1.0 if style >> channel & 1 else -1.0 for channel in range(3)]) * (1 + style // 8)
    return colour[:, None, None] + 0.3 * torch.randn((3, height, width), generator=generator)


def placeholders(family: str, size: Size) -> list[int]:
    """The tokens that stand for one image of that size, markers included."""
    height, width = size
    if family in ("llava", "paligemma"):
        return [IMAGE] * (height // PATCH * (width // PATCH))
    if family == "llava_next":
        return [IMAGE] * _next_tokens(size)
    if family == "gemma3":
        return [START, *[IMAGE] * 4, END]
    if family == "internvl":
        return [START, *[IMAGE] * (4 * _tile_count(size)), END]
    if family in ("idefics3", "smolvlm"):
        tiles = _tile_count(size)
        markers = [TILE] * (tiles - 1) + [GLOBAL]
        return [token for marker in markers for token in (START, marker, *[IMAGE] * 4)] + [START]
    rows, columns = height // _MERGED, width // _MERGED
    if family == "mistral3":
        return [*([*[IMAGE] * columns, BREAK] * rows)[:-1], END]
    return [START, *[IMAGE] * (rows * columns), END]


def batch(
    model: torch.nn.Module,
    family: str,
    images: list[list[torch.Tensor]],
    prompts: list[list[int]] | None = None,
    padding_side: str = "left",
) -> dict[str, torch.Tensor]:
    """Inputs for the model: row i holds the images of images[i], maybe none, then prompts[i].

    The default prompts differ in content and length. Images are (3, height, width) with a size from `sizes`. Keys that
    describe images are left out when there are none. Floating tensors take the model's dtype, all of them its device.
    """
    for image in (image for row in images for image in row):
        if image.shape[0] != 3 or tuple(image.shape[1:]) not in _FAMILIES[family].sizes:
            raise ValueError(f"{family} takes images of size {sizes(family)}, not {tuple(image.shape)}")
    if prompts is None:
        prompts = [_prompt(row) for row in range(len(images))]
    if padding_side not in ("left", "right") or len(prompts) != len(images):
        raise ValueError("padding_side must be left or right, and there must be one prompt to each row")
    rows = [
        [BOS, *(token for image in row for token in placeholders(family, _size(image))), *prompt]
        for row, prompt in zip(images, prompts, strict=True)
    ]
    length = max(len(row) for row in rows)
    inputs = {
        "input_ids": torch.full((len(rows), length), PAD),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
    }
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
        inputs["input_ids"][index, place] = torch.tensor(row)
        inputs["attention_mask"][index, place] = 1
    is_image = (inputs["input_ids"] == IMAGE).long()
    if family == "gemma3":
        inputs["token_type_ids"] = is_image
    elif family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(is_image)  # everything is prefix
    elif family.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_image
    if any(images):
        inputs |= _pixels(family, images)
    reference = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return {
        key: value.to(reference.device, reference.dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }


def _prompt(row: int) -> list[int]:
    return [TEXT_TOKENS[(11 * row + 7 * place + 1) % len(TEXT_TOKENS)] for place in range(4 + 2 * row % 5)]


def _pixels(family: str, images: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    flat = [image for row in images for image in row]
    if family.startswith("qwen"):
        grids = [[1, *(side // PATCH for side in _size(image))] for image in flat]
        patches = torch.cat([_qwen_patches(image) for image in flat])
        return {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}
    if family == "internvl":
        return {"pixel_values": torch.cat([_tiles(image) for image in flat])}
    if family in ("idefics3", "smolvlm"):
        per_row = [torch.cat([_tiles(image) for image in row]) if row else torch.zeros(0, 3, 16, 16) for row in images]
        pixels = _stack(per_row)
        # Every tile is full, and the model drops the padding tiles, which are all zero
        real = torch.stack([torch.arange(pixels.shape[1]) < len(row) for row in per_row])
        return {"pixel_values": pixels, "pixel_attention_mask": real[:, :, None, None].expand(-1, -1, 16, 16).long()}
    if family == "llava_next":
        image_sizes = torch.tensor([_size(image) for image in flat])
        return {"pixel_values": _stack([_next_tiles(image) for image in flat]), "image_sizes": image_sizes}
    if family == "mistral3":
        return {"pixel_values": _stack(flat), "image_sizes": torch.tensor([_size(image) for image in flat])}
    return {"pixel_values": torch.stack(flat)}


def _size(image: torch.Tensor) -> Size:
    return image.shape[1], image.shape[2]


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stacks tensors of different shapes, filling up with zeros at the end of each dimension."""
    shape = [max(sides) for sides in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = torch.zeros(len(tensors), *shape)
    for target, tensor in zip(stacked, tensors, strict=True):
        target[tuple(slice(side) for side in tensor.shape)] = tensor
    return stacked


def _crops(image: torch.Tensor, side: int) -> Iterator[torch.Tensor]:
    for band in torch.split(image, side, dim=1):
        yield from torch.split(band, side, dim=2)


def _resize(image: torch.Tensor, size: Size) -> torch.Tensor:
    return functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def _tile_count(size: Size) -> int:
    """The tiles of an image, and the view of the whole that follows when there are several."""
    tiles = size[0] // 16 * (size[1] // 16)
    return tiles if tiles == 1 else tiles + 1


def _tiles(image: torch.Tensor) -> torch.Tensor:
    tiles = list(_crops(image, 16))
    return torch.stack(tiles if len(tiles) == 1 else [*tiles, _resize(image, (16, 16))])


def _qwen_patches(image: torch.Tensor) -> torch.Tensor:
    """One flattened patch to a row, those of one merged token next to each other; the two frames are equal."""
    height, width = _size(image)
    grid = image.reshape(3, height // _MERGED, MERGE, PATCH, width // _MERGED, MERGE, PATCH)
    ordered = grid.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 1, PATCH, PATCH)
    return ordered.expand(-1, -1, 2, -1, -1).reshape(len(ordered), -1)


def _next_fit(size: Size) -> tuple[Size, Size]:
    """The canvas that LLaVA-NeXT picks for an image, and the size of the image scaled to fit it."""
    height, width = size
    canvas = select_best_resolution(size, list(_NEXT_RESOLUTIONS))
    scale = min(canvas[0] / height, canvas[1] / width)
    return canvas, (round(height * scale), round(width * scale))


def _next_tiles(image: torch.Tensor) -> torch.Tensor:
    (height, width), fitted = _next_fit(_size(image))
    top, left = (height - fitted[0]) // 2, (width - fitted[1]) // 2
    canvas = torch.zeros(3, height, width)
    canvas[:, top : top + fitted[0], left : left + fitted[1]] = _resize(image, fitted)
    return torch.stack([_resize(image, (_NEXT_TILE, _NEXT_TILE)), *_crops(canvas, _NEXT_TILE)])


def _next_tokens(size: Size) -> int:
    """Tokens of the whole view, plus those of the canvas without its padding, plus one at the end of each row."""
    canvas, fitted = _next_fit(size)
    rows, columns = (
        full // PATCH - 2 * ((full // PATCH - used * (full // PATCH) // full) // 2)
        for full, used in zip(canvas, fitted, strict=True)
    )
    return (_NEXT_TILE // PATCH) ** 2 + rows * columns + rows

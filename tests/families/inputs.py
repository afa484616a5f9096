"""Inputs for a tiny model of any family: what its processor would make of pictures, told by the model's own arguments.

Rows hold pictures and text. Text fills the rows up to one length, so that no padding is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import END, PROMPTS
from .rows import Row
from .shrink import BOS, TEXT_TOKENS

Picture = Tensor  # (3, height, width)
Arguments = dict[str, Any]

PATCH, MERGE, TILE = 4, 2, 16
UNNAMED = 110  # stands for images where the configuration names no token
SIDE = 16


def picture(style: int, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Picture:
    """A noisy picture of one colour, a corner of the colour cube."""
    generator = torch.Generator().manual_seed(1000 * style + seed)
    colour = torch.tensor([1.0 if style >> channel & 1 else -1.0 for channel in range(3)])
    return colour[:, None, None] + 0.3 * torch.randn((3, *size), generator=generator)


def _flat(rows: list[list[Picture]]) -> list[Picture]:
    return [image for row in rows for image in row]


def stacked(config: Any, rows: list[list[Picture]]) -> Arguments:
    """`(images, 3, height, width)`."""
    return {"pixel_values": torch.stack(_flat(rows))}


def patches_of(image: Picture, patch: int, merge: int, frames: int) -> Tensor:
    """One flattened patch to a row, those that are merged to one token next to each other."""
    height, width = image.shape[1] // (patch * merge), image.shape[2] // (patch * merge)
    grid = image.reshape(3, height, merge, patch, width, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    ordered = grid.reshape(-1, 3, 1, patch, patch).expand(-1, -1, frames, -1, -1)
    return ordered.reshape(len(ordered), -1)


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def _setting(config: Any, names: tuple[str, ...], default: int) -> int:
    found = next((getattr(_vision(config), name) for name in names if getattr(_vision(config), name, None)), default)
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def gridded(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Flat patches and `(images, 3)` grids."""
    patch = _setting(config, ("patch_size",), PATCH)
    merge = _setting(config, ("spatial_merge_size", "merge_size"), MERGE)
    frames = _setting(config, ("temporal_patch_size", "patch_temporal"), 1)
    patches = [patches_of(image, patch, merge, frames) for image in _flat(rows)]
    grids = [[1, image.shape[1] // patch, image.shape[2] // patch] for image in _flat(rows)]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def sized(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Padded pictures and their sizes in pixels."""
    return {
        "pixel_values": padded(_flat(rows)),
        "image_sizes": torch.tensor([image.shape[1:] for image in _flat(rows)]),
    }


def padded(tensors: list[Tensor]) -> Tensor:
    shape = [max(sides) for sides in zip(*(tensor.shape for tensor in tensors), strict=True)]
    whole = torch.zeros(len(tensors), *shape)
    for target, tensor in zip(whole, tensors, strict=True):
        target[tuple(slice(side) for side in tensor.shape)] = tensor
    return whole


def tiles_of(image: Picture) -> Tensor:
    """The whole picture and then its tiles, or the one tile that it is."""
    crops = [crop for band in torch.split(image, TILE, 1) for crop in torch.split(band, TILE, 2)]
    whole = nn.functional.interpolate(image[None], (TILE, TILE), mode="bilinear")[0]
    return torch.stack([whole, *crops] if len(crops) > 1 else crops)


def high_resolution(config: Any, rows: list[list[Picture]]) -> Arguments:
    """LLaVA-NeXT: `(images, tiles, 3, height, width)`, the whole picture first, and the pictures' sizes."""
    tiles = [tiles_of(image) if max(image.shape[1:]) > TILE else image.expand(2, -1, -1, -1) for image in _flat(rows)]
    sizes = [[max(side, TILE) for side in image.shape[1:]] for image in _flat(rows)]
    return {"pixel_values": padded(tiles), "image_sizes": torch.tensor(sizes)}


def tiled(config: Any, rows: list[list[Picture]]) -> Arguments:
    """InternVL: the tiles of all pictures, `(tiles, 3, height, width)`."""
    return {"pixel_values": torch.cat([tiles_of(image) for image in _flat(rows)])}


def batched(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Idefics: `(rows, tiles, 3, height, width)`, filled up with tiles of zeros."""
    per_row = [torch.cat([tiles_of(image) for image in row]) if row else torch.zeros(0, 3, TILE, TILE) for row in rows]
    pixels = padded(per_row)
    real = torch.stack([torch.arange(pixels.shape[1]) < len(row) for row in per_row])
    return {"pixel_values": pixels, "pixel_attention_mask": real[:, :, None, None].expand(-1, -1, TILE, TILE).long()}


def patch_images(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Flat patches that are small pictures, and `(images, 3)` grids."""
    patch = _setting(config, ("patch_size",), PATCH)
    inputs = gridded(config, rows)
    pixels = inputs["pixel_values"]
    return inputs | {"pixel_values": pixels.reshape(len(pixels), 3, -1, patch, patch)[:, :, 0]}


def with_merge_sizes(config: Any, rows: list[list[Picture]]) -> Arguments:
    """VideoLLaMA 3: flat patches, grids, and how many patches are merged to a token."""
    inputs = gridded(config, rows)
    return inputs | {"image_merge_sizes": torch.full((len(inputs["image_grid_thw"]),), MERGE)}


def token_images(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Inkling 2: a picture for each token, channels last, and grids of tokens."""
    side = PATCH * MERGE
    tokens = [patches_of(image, side, 1, 1).reshape(-1, 3, side, side).movedim(1, -1) for image in _flat(rows)]
    grids = [[1, image.shape[1] // side, image.shape[2] // side] for image in _flat(rows)]
    return {"pixel_values": torch.cat(tokens), "image_grid_thw": torch.tensor(grids)}


def packed(config: Any, rows: list[list[Picture]]) -> Arguments:
    """MiniCPM-V: one wide picture of all patches, and `(images, 2)` grids."""
    patches = torch.cat([patches_of(image, PATCH, 1, 1).reshape(-1, 3, PATCH, PATCH) for image in _flat(rows)])
    sizes = [[image.shape[1] // PATCH, image.shape[2] // PATCH] for image in _flat(rows)]
    return {"pixel_values": patches.permute(1, 2, 0, 3).reshape(1, 3, PATCH, -1), "target_sizes": torch.tensor(sizes)}


def grid_hw(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Nemotron: flat patches and `(images, 2)` grids."""
    sizes = [[image.shape[1] // PATCH, image.shape[2] // PATCH] for image in _flat(rows)]
    patches = [patches_of(image, PATCH, 1, 1) for image in _flat(rows)]
    return {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(sizes)}


def padded_patches(config: Any, rows: list[list[Picture]]) -> Arguments:
    """SigLIP 2: `(images, most patches, 3 * patch * patch)`, their masks and grids."""
    patches = [patches_of(image, PATCH, 1, 1) for image in _flat(rows)]
    masks = [torch.ones(len(rows), dtype=torch.long) for rows in patches]
    sizes = [[image.shape[1] // PATCH, image.shape[2] // PATCH] for image in _flat(rows)]
    return {
        "pixel_values": padded(patches),
        "pixel_attention_mask": padded(masks).long(),
        "spatial_shapes": torch.tensor(sizes),
    }


def placed_patches(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Gemma 4: `(images, most patches, 3 * patch * patch)` and the patches' places, -1 where there is none."""
    inputs = padded_patches(config, rows)
    places = torch.full((*inputs["pixel_attention_mask"].shape, 2), -1)
    for place, (height, width) in zip(places, inputs["spatial_shapes"].tolist(), strict=True):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        place[: len(grid)] = grid
    return {"pixel_values": inputs["pixel_values"], "image_position_ids": places}


def batched_mask(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Granite Docling: as Idefics, with a mask of tiles."""
    inputs = batched(config, rows)
    return inputs | {"pixel_attention_mask": inputs["pixel_attention_mask"][:, :, 0, 0].bool()}


def two_resolutions(config: Any, rows: list[list[Picture]]) -> Arguments:
    """DeepSeek-VL hybrid: each picture twice."""
    pixels = stacked(config, rows)["pixel_values"]
    return {"pixel_values": pixels, "high_res_pixel_values": nn.functional.interpolate(pixels, scale_factor=2)}


def patch_rows(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Fuyu: `(images, patches, patch * patch * 3)`."""
    return {"pixel_values": torch.stack([patches_of(image, PATCH, 1, 1) for image in _flat(rows)])}


def instructed(config: Any, rows: list[list[Picture]]) -> Arguments:
    """InstructBLIP: the Q-Former reads text too."""
    pixels = stacked(config, rows)["pixel_values"]
    return {"pixel_values": pixels, "qformer_input_ids": torch.full((len(pixels), 2), TEXT_TOKENS[0])}


def instructed_video(config: Any, rows: list[list[Picture]]) -> Arguments:
    """InstructBLIP for videos: here of two frames."""
    inputs = instructed(config, rows)
    return inputs | {"pixel_values": inputs["pixel_values"][:, None].expand(-1, 2, -1, -1, -1)}


def local_views(config: Any, rows: list[list[Picture]]) -> Arguments:
    """DeepSeek-OCR: the whole picture, and its tiles apart."""
    tiles = [tiles_of(image) for image in _flat(rows)]
    local = [tile[1:] for tile in tiles]
    inputs: Arguments = {"pixel_values": torch.stack([tile[0] for tile in tiles])}
    if sum(map(len, local)):
        inputs |= {"pixel_values_local": torch.cat(local), "num_local_patches": list(map(len, local))}
    return inputs


def local_grids(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Unlimited-OCR: and in how many columns and rows the tiles lie."""
    grids = [[image.shape[2] // TILE, image.shape[1] // TILE] for image in _flat(rows)]
    inputs = local_views(config, rows)
    return inputs | ({"patches_grid": grids} if "pixel_values_local" in inputs else {})


def cross_attended(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Mllama: `(rows, images, tiles, 3, height, width)`; each picture is one or two tiles beside each other."""
    most = max(1, max(map(len, rows)))
    pixels = torch.zeros(len(rows), most, 2, 3, TILE, TILE)
    ids, mask = torch.zeros(len(rows), most, dtype=torch.long), torch.zeros(len(rows), most, 2, dtype=torch.long)
    mask[:, :, 0] = 1
    for r, row in enumerate(rows):
        for i, image in enumerate(row):
            tiles = torch.stack(torch.split(image, TILE, 2))
            pixels[r, i, : len(tiles)], ids[r, i], mask[r, i, : len(tiles)] = tiles, len(tiles), 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def flattened(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Kosmos-2.5: `(images, patches, 2 + 3 * patch * patch)`, each patch behind its row and column."""
    found = []
    for image in _flat(rows):
        grid = torch.cartesian_prod(*(torch.arange(1, side // PATCH + 1) for side in image.shape[1:]))
        found.append(torch.cat([grid.float(), patches_of(image, PATCH, 1, 1)], dim=1))
    return {"flattened_patches": torch.stack(found)}


def cropped(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Phi-4: `(images, 1 + crops, 3, height, width)`, the whole picture first, and masks of patches."""
    crops = [image.expand(2, -1, -1, -1) for image in _flat(rows)]
    mask = torch.ones(len(crops), 2, SIDE // PATCH, SIDE // PATCH)
    sizes = torch.tensor([[SIDE, SIDE] for _ in crops])
    return {"image_pixel_values": torch.stack(crops), "image_sizes": sizes, "image_attention_mask": mask}


def pooled(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Molmo 2: patches of the whole picture and its tiles, and for each token the patches that make it up."""
    crops = [crop for image in _flat(rows) for crop in tiles_of(image)]
    side = SIDE // PATCH
    of_crop = torch.arange(side * side).reshape(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
    pooling = torch.cat([of_crop + i * side * side for i in range(len(crops))])
    grids = [[side // 2, side // 2, side // 2, side // 2 * (len(tiles_of(image)) - 1)] for image in _flat(rows)]
    return {
        "pixel_values": torch.stack([patches_of(crop, PATCH, 1, 1) for crop in crops]),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor(grids),
    }


_SQUARE, _WIDE, _TWO, _FOUR = (16, 16), (16, 24), (16, 32), (32, 32)

# How pictures are handed over, and the sizes that they may have.
KINDS: dict[str, tuple[Callable[[Any, list[list[Picture]]], Arguments], tuple[tuple[int, int], ...]]] = {
    "stacked": (stacked, (_SQUARE,)),
    "grid": (gridded, (_SQUARE, _WIDE)),
    "patch_images": (patch_images, (_SQUARE, _WIDE)),
    "merge_sizes": (with_merge_sizes, (_SQUARE, _WIDE)),
    "token_images": (token_images, (_SQUARE, _WIDE)),
    "packed": (packed, (_SQUARE, _TWO)),
    "grid_hw": (grid_hw, (_SQUARE, _WIDE)),
    "padded_patches": (padded_patches, (_SQUARE, _WIDE)),
    "placed_patches": (placed_patches, (_SQUARE, _WIDE)),
    "sizes": (sized, (_SQUARE, _WIDE)),
    "high_resolution": (high_resolution, (_TWO, _FOUR)),
    "tiles": (tiled, (_SQUARE, _TWO)),
    "batch": (batched, (_SQUARE, _TWO)),
    "batch_mask": (batched_mask, (_SQUARE, _TWO)),
    "two_resolutions": (two_resolutions, (_SQUARE,)),
    "patch_rows": (patch_rows, (_SQUARE,)),
    "instructed": (instructed, (_SQUARE,)),
    "instructed_video": (instructed_video, (_SQUARE,)),
    "local_views": (local_views, (_SQUARE, _TWO)),
    "local_grids": (local_grids, (_SQUARE, _TWO)),
    "cross_attended": (cross_attended, (_SQUARE, _TWO)),
    "flattened": (flattened, (_SQUARE,)),
    "cropped": (cropped, (_SQUARE,)),
    "pooled": (pooled, (_SQUARE, _TWO)),
}


def kind_of(model: nn.Module) -> str:
    """How the model takes images, by the arguments of its own `get_image_features`."""
    owner = next((part for part in (model.base_model, model) if hasattr(part, "get_image_features")), None)
    names = set(inspect.signature(owner.get_image_features).parameters) if owner is not None else set()
    config: Any = model.config
    if "image_grid_thw" in names:
        return "grid"
    if "image_sizes" in names:
        return "high_resolution" if getattr(config, "image_grid_pinpoints", None) else "sizes"
    if "pixel_attention_mask" in names:
        return "batch"
    return "stacked"


def image_token(config: Any) -> int:
    """The token that stands for images."""
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id")
    found = (getattr(part, name, None) for part in (config, _vision(config)) for name in names)
    return next((int(token) for token in found if token is not None), UNNAMED)


class Inputs:
    """Makes inputs for one model.

    Args:
        model (`PreTrainedModel`): The base model.
        row ([`Row`]): What is special about its family.
    """

    def __init__(self, model: Any, row: Row) -> None:
        self.config = model.config
        self.kind = row.inputs or kind_of(model)
        self.prompt = row.prompt
        self.token = image_token(model.config)
        self._end = getattr(model.config, "eoi_token_index", None) or END
        self._arguments = set(inspect.signature(type(model).forward).parameters)
        self._owner = next((part for part in (model.base_model, model) if hasattr(part, "get_image_features")), None)
        self._tokens, self._axes = row.tokens, row.position_axes
        self._counts: dict[torch.Size, int] = {}

    def tokens_of(self, image: Picture) -> int:
        """How many tokens the picture becomes."""
        if self._tokens is not None:
            return self._tokens
        if image.shape not in self._counts:
            with torch.no_grad():
                output = self._owner.get_image_features(
                    **KINDS[self.kind][0](self.config, [[image]]), return_dict=True
                )
            features = output.pooler_output
            if features is None:  # several of a kind, one for each of some layers of the language model
                features = output.deepstack_features[0][1] if "deepstack_features" in output else output[0]
            parts = features if isinstance(features, (list, tuple)) else [features]
            self._counts[image.shape] = sum(part.shape[:-1].numel() for part in parts)
        return self._counts[image.shape]

    def __call__(self, rows: list[list[Picture]], length: int | None = None) -> Arguments:
        """The arguments of a joint call for rows of pictures."""
        ids = [self.row(images) for images in rows]
        length = max(map(len, ids)) if length is None else length
        filled = [row + [TEXT_TOKENS[(7 * i + 3) % len(TEXT_TOKENS)] for i in range(length - len(row))] for row in ids]
        inputs: Arguments = {"input_ids": torch.tensor(filled)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        is_image = (inputs["input_ids"] == self.token).long()
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self._arguments:
                inputs[name] = is_image
        if self._axes is not None:
            inputs["position_ids"] = torch.arange(length).expand(self._axes, len(rows), -1)
        if "image_embeds_position_mask" in self._arguments:
            inputs["image_embeds_position_mask"] = is_image
        if "cross_attention_mask" in self._arguments and any(rows):
            inputs["cross_attention_mask"] = self._seen_images(rows, is_image)
        if getattr(self.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"][:, -3:]
        if any(rows):
            inputs |= KINDS[self.kind][0](self.config, rows)
        return inputs

    def _seen_images(self, rows: list[list[Picture]], is_image: Tensor) -> Tensor:
        """Mllama: which images and tiles each token attends to, `(rows, length, images, tiles)`: those before it."""
        aspects = KINDS[self.kind][0](self.config, rows)
        begun = is_image.cumsum(1)[..., None] > torch.arange(aspects["aspect_ratio_ids"].shape[1])
        real = aspects["aspect_ratio_mask"] * (aspects["aspect_ratio_ids"] > 0)[..., None]
        return (begun[..., None] * real[:, None]).long()

    def row(self, images: list[Picture]) -> list[int]:
        """The token ids of one row, without what fills it up."""
        ids = [BOS]
        for image in images:
            tiles = len(tiles_of(image)) if KINDS[self.kind][0] in (tiled, batched, batched_mask) else 1
            tile = [self.token] * (self.tokens_of(image) // tiles)
            ids += PROMPTS[self.prompt]([tile] * tiles, self._end)
        return [*ids, *(TEXT_TOKENS[(11 * len(images) + 5 * i + 1) % len(TEXT_TOKENS)] for i in range(3))]

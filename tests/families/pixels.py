"""Pictures, and what the processors of the families make of them: a function for each way, which `KINDS` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import TEXT_TOKENS

Picture = Tensor  # (3, height, width)
Arguments = dict[str, Any]

PATCH, MERGE, TILE = 4, 2, 16
SIDE = 16


def picture(style: int, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Picture:
    """A noisy picture of one colour, a corner of the colour cube."""
    generator = torch.Generator().manual_seed(1000 * style + seed)
    colour = torch.tensor([1.0 if style >> channel & 1 else -1.0 for channel in range(3)])
    return colour[:, None, None] + 0.3 * torch.randn((3, *size), generator=generator)


def flat(rows: list[list[Picture]]) -> list[Picture]:
    return [image for row in rows for image in row]


def stacked(config: Any, rows: list[list[Picture]]) -> Arguments:
    """`(images, 3, height, width)`."""
    return {"pixel_values": torch.stack(flat(rows))}


def patches_of(image: Picture, patch: int, merge: int, frames: int) -> Tensor:
    """One flattened patch to a row, those that are merged to one token next to each other."""
    height, width = image.shape[1] // (patch * merge), image.shape[2] // (patch * merge)
    grid = image.reshape(3, height, merge, patch, width, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    ordered = grid.reshape(-1, 3, 1, patch, patch).expand(-1, -1, frames, -1, -1)
    return ordered.reshape(len(ordered), -1)


def vision_settings(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def setting(config: Any, names: tuple[str, ...], default: int) -> int:
    found = next(
        (getattr(vision_settings(config), name) for name in names if getattr(vision_settings(config), name, None)),
        default,
    )
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def gridded(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Flat patches and `(images, 3)` grids."""
    patch = setting(config, ("patch_size",), PATCH)
    merge = setting(config, ("spatial_merge_size", "merge_size"), MERGE)
    frames = setting(config, ("temporal_patch_size", "patch_temporal"), 1)
    patches = [patches_of(image, patch, merge, frames) for image in flat(rows)]
    grids = [[1, image.shape[1] // patch, image.shape[2] // patch] for image in flat(rows)]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def sized(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Padded pictures and their sizes in pixels."""
    return {
        "pixel_values": padded(flat(rows)),
        "image_sizes": torch.tensor([image.shape[1:] for image in flat(rows)]),
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
    if len(crops) == 1:
        return image[None]
    whole = nn.functional.interpolate(image[None], (TILE, TILE), mode="bilinear")[0]
    return torch.stack([whole, *crops])


def high_resolution(config: Any, rows: list[list[Picture]]) -> Arguments:
    """LLaVA-NeXT: `(images, tiles, 3, height, width)`, the whole picture first, and the pictures' sizes."""
    tiles = [tiles_of(image) if max(image.shape[1:]) > TILE else image.expand(2, -1, -1, -1) for image in flat(rows)]
    sizes = [[max(side, TILE) for side in image.shape[1:]] for image in flat(rows)]
    return {"pixel_values": padded(tiles), "image_sizes": torch.tensor(sizes)}


def tiled(config: Any, rows: list[list[Picture]]) -> Arguments:
    """InternVL: the tiles of all pictures, `(tiles, 3, height, width)`."""
    return {"pixel_values": torch.cat([tiles_of(image) for image in flat(rows)])}


def batched(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Idefics: `(rows, tiles, 3, height, width)`, filled up with tiles of zeros."""
    per_row = [torch.cat([tiles_of(image) for image in row]) if row else torch.zeros(0, 3, TILE, TILE) for row in rows]
    pixels = padded(per_row)
    real = torch.stack([torch.arange(pixels.shape[1]) < len(row) for row in per_row])
    return {"pixel_values": pixels, "pixel_attention_mask": real[:, :, None, None].expand(-1, -1, TILE, TILE).long()}


def quarters(image: Picture) -> list[Tensor]:
    """Idefics2: the four quarters of a picture, as large as the whole, and the whole."""
    size = (image.shape[1], image.shape[2])
    crops = [crop for band in image.chunk(2, 1) for crop in band.chunk(2, 2)]
    return [*[nn.functional.interpolate(crop[None], size, mode="bilinear")[0] for crop in crops], image]


def split_in_four(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Idefics2: `(rows, tiles, 3, height, width)`, padded to the largest picture, and masks of pixels."""
    per_row = [[tile for image in row for tile in quarters(image)] for row in rows]
    height, width = (max(image.shape[side] for image in flat(rows)) for side in (1, 2))
    pixels = torch.zeros(len(rows), max(map(len, per_row)), 3, height, width)
    mask = torch.zeros(pixels.shape[:2] + pixels.shape[3:], dtype=torch.long)
    for r, tiles in enumerate(per_row):
        for t, tile in enumerate(tiles):
            pixels[r, t, :, : tile.shape[1], : tile.shape[2]] = tile
            mask[r, t, : tile.shape[1], : tile.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def masked_tiles(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Aria: the tiles of all pictures, padded to squares, and masks of pixels."""
    tiles = [tile for image in flat(rows) for tile in tiles_of(image)]
    mask = torch.zeros(len(tiles), TILE, TILE, dtype=torch.bool)
    for one, tile in zip(mask, tiles, strict=True):
        one[: tile.shape[1], : tile.shape[2]] = True
    return {"pixel_values": padded([*tiles, torch.zeros(3, TILE, TILE)])[:-1], "pixel_mask": mask}


def enlarged(config: Any, rows: list[list[Picture]]) -> Arguments:
    """FastVLM: for a tower that makes a patch of 64 pixels."""
    return {"pixel_values": nn.functional.interpolate(stacked(config, rows)["pixel_values"], scale_factor=8)}


def equal_tiles(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Perception LM: `(images, tiles, 3, height, width)`."""
    return {"pixel_values": torch.stack([tiles_of(image) for image in flat(rows)])}


def patch_images(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Flat patches that are small pictures, and `(images, 3)` grids."""
    patch = setting(config, ("patch_size",), PATCH)
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
    tokens = [patches_of(image, side, 1, 1).reshape(-1, 3, side, side).movedim(1, -1) for image in flat(rows)]
    grids = [[1, image.shape[1] // side, image.shape[2] // side] for image in flat(rows)]
    return {"pixel_values": torch.cat(tokens), "image_grid_thw": torch.tensor(grids)}


def patch_blocks(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Inkling: `(patches, frames, height, width, 3)`, each patch a token."""
    blocks = [patches_of(image, PATCH, 1, 1).reshape(-1, 3, PATCH, PATCH).movedim(1, -1) for image in flat(rows)]
    frames = vision_settings(config).temporal_patch_size
    return {"pixel_values": torch.cat(blocks)[:, None].expand(-1, frames, -1, -1, -1)}


def packed(config: Any, rows: list[list[Picture]]) -> Arguments:
    """MiniCPM-V: one wide picture of all patches of all slices, and `(slices, 2)` grids."""
    slices = [tile for image in flat(rows) for tile in tiles_of(image)]
    patches = torch.cat([patches_of(tile, PATCH, 1, 1).reshape(-1, 3, PATCH, PATCH) for tile in slices])
    sizes = [[tile.shape[1] // PATCH, tile.shape[2] // PATCH] for tile in slices]
    return {"pixel_values": patches.permute(1, 2, 0, 3).reshape(1, 3, PATCH, -1), "target_sizes": torch.tensor(sizes)}


def grid_hw(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Nemotron: flat patches and `(images, 2)` grids."""
    sizes = [[image.shape[1] // PATCH, image.shape[2] // PATCH] for image in flat(rows)]
    patches = [patches_of(image, PATCH, 1, 1) for image in flat(rows)]
    return {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(sizes)}


def padded_patches(config: Any, rows: list[list[Picture]]) -> Arguments:
    """SigLIP 2: `(images, most patches, 3 * patch * patch)`, their masks and grids."""
    patches = [patches_of(image, PATCH, 1, 1) for image in flat(rows)]
    masks = [torch.ones(len(rows), dtype=torch.long) for rows in patches]
    sizes = [[image.shape[1] // PATCH, image.shape[2] // PATCH] for image in flat(rows)]
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
    return {"pixel_values": torch.stack([patches_of(image, PATCH, 1, 1) for image in flat(rows)])}


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
    tiles = [tiles_of(image) for image in flat(rows)]
    local = [tile[1:] for tile in tiles]
    inputs: Arguments = {"pixel_values": torch.stack([tile[0] for tile in tiles])}
    if sum(map(len, local)):
        inputs |= {"pixel_values_local": torch.cat(local), "num_local_patches": list(map(len, local))}
    return inputs


def local_grids(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Unlimited-OCR: and in how many columns and rows the tiles lie."""
    grids = [[image.shape[2] // TILE, image.shape[1] // TILE] for image in flat(rows)]
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


def attended(config: Any, rows: list[list[Picture]]) -> Arguments:
    """IDEFICS: `(rows, images, 3, height, width)`."""
    return {"pixel_values": torch.stack([torch.stack(row) for row in rows])}


def flattened(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Kosmos-2.5: `(images, patches, 2 + 3 * patch * patch)`, each patch behind its row and column."""
    found = []
    for image in flat(rows):
        grid = torch.cartesian_prod(*(torch.arange(1, side // PATCH + 1) for side in image.shape[1:]))
        found.append(torch.cat([grid.float(), patches_of(image, PATCH, 1, 1)], dim=1))
    return {"flattened_patches": torch.stack(found)}


def cropped(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Phi-4: `(images, 1 + crops, 3, height, width)`, the whole picture first, and masks of patches."""
    crops = [image.expand(2, -1, -1, -1) for image in flat(rows)]
    mask = torch.ones(len(crops), 2, SIDE // PATCH, SIDE // PATCH)
    sizes = torch.tensor([[SIDE, SIDE] for _ in crops])
    return {"image_pixel_values": torch.stack(crops), "image_sizes": sizes, "image_attention_mask": mask}


def pooled(config: Any, rows: list[list[Picture]]) -> Arguments:
    """Molmo 2: patches of the whole picture and its tiles, and for each token the patches that make it up."""
    crops = [crop for image in flat(rows) for crop in tiles_of(image)]
    side = SIDE // PATCH
    of_crop = torch.arange(side * side).reshape(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
    pooling = torch.cat([of_crop + i * side * side for i in range(len(crops))])
    grids = [[side // 2, side // 2, side // 2, side // 2 * (len(tiles_of(image)) - 1)] for image in flat(rows)]
    return {
        "pixel_values": torch.stack([patches_of(crop, PATCH, 1, 1) for crop in crops]),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor(grids),
    }


# Which of these ways give the tiles of a picture places of their own in the prompt, and how many it has.
_CUT: dict[str, Callable[[Picture], Any]] = {
    **dict.fromkeys(("tiles", "batch", "batch_mask", "masked_tiles", "equal_tiles", "packed"), tiles_of),
    "quarters": quarters,
}


def tiles_in_prompt(kind: str, image: Picture) -> int:
    return len(_CUT[kind](image)) if kind in _CUT else 1


_SQUARE, _WIDE, _TWO, _FOUR, _LOW = (16, 16), (16, 24), (16, 32), (32, 32), (12, 16)

# How pictures are handed over, and the sizes that they may have.
KINDS: dict[str, tuple[Callable[[Any, list[list[Picture]]], Arguments], tuple[tuple[int, int], ...]]] = {
    "stacked": (stacked, (_SQUARE,)),
    "grid": (gridded, (_SQUARE, _WIDE)),
    "patch_images": (patch_images, (_SQUARE, _WIDE)),
    "merge_sizes": (with_merge_sizes, (_SQUARE, _WIDE)),
    "token_images": (token_images, (_SQUARE, _WIDE)),
    "patch_blocks": (patch_blocks, (_SQUARE, _WIDE)),
    "packed": (packed, (_SQUARE, _TWO)),
    "grid_hw": (grid_hw, (_SQUARE, _WIDE)),
    "padded_patches": (padded_patches, (_SQUARE, _WIDE)),
    "placed_patches": (placed_patches, (_SQUARE, _WIDE)),
    "sizes": (sized, (_SQUARE, _WIDE)),
    "high_resolution": (high_resolution, (_TWO, _FOUR)),
    "tiles": (tiled, (_SQUARE, _TWO)),
    "batch": (batched, (_SQUARE, _TWO)),
    "quarters": (split_in_four, (_SQUARE, _WIDE)),
    "large": (enlarged, (_SQUARE,)),
    "equal_tiles": (equal_tiles, (_TWO,)),
    "masked_tiles": (masked_tiles, (_LOW, _TWO)),
    "batch_mask": (batched_mask, (_SQUARE, _TWO)),
    "two_resolutions": (two_resolutions, (_SQUARE,)),
    "patch_rows": (patch_rows, (_SQUARE,)),
    "instructed": (instructed, (_SQUARE,)),
    "instructed_video": (instructed_video, (_SQUARE,)),
    "local_views": (local_views, (_SQUARE, _TWO)),
    "local_grids": (local_grids, (_SQUARE, _TWO)),
    "cross_attended": (cross_attended, (_SQUARE, _TWO)),
    "attended": (attended, (_SQUARE,)),
    "flattened": (flattened, (_SQUARE,)),
    "cropped": (cropped, (_SQUARE,)),
    "pooled": (pooled, (_SQUARE, _TWO)),
}

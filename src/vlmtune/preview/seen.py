"""Pictures as a model sees them, made back from the pixels that its processor returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """A picture at the size to which the processor brought it, and the cells into which the model divides it."""

    picture: Image.Image
    across: int = 1  # cells
    down: int = 1
    cell: str = ""  # what a cell is: a token or a tile
    tokens: int = 0  # that stand for the picture in the text; 0: not known
    given: tuple[int, int] | None = None  # width and height in the data

    @property
    def size(self) -> str:
        return f"{self.picture.width}×{self.picture.height}"

    @property
    def caption(self) -> str:
        """→ "504×392 from 640×480, 18 × 14 tokens"."""
        given = f" from {self.given[0]}×{self.given[1]}" if self.given and self.given != self.picture.size else ""
        cells = f", {self.across} × {self.down} {self.cell}{'s' if self.across * self.down > 1 else ''}" if self.cell else ""
        return f"{self.size}{given}{cells}"


def seen_pictures(batch: Mapping[str, Any], processor: Any) -> list[Seen]:
    """The pictures of a batch, row after row; none where its pixels come in a way that is not known.

    Args:
        batch: what the collator makes.
        processor: whose `image_processor` knows how pixels were normalised and patches cut.

    """
    pixels = batch.get("pixel_values")
    if pixels is None:
        return []
    if "image_grid_thw" in batch:
        return _from_patches(pixels, batch["image_grid_thw"], processor)
    if "aspect_ratio_ids" in batch:
        return _from_tiles(pixels, batch["aspect_ratio_ids"], processor)
    if "image_sizes" in batch and pixels.ndim == 4 and hasattr(processor, "patch_size"):
        return _from_padded(pixels, batch["image_sizes"], processor)
    if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        return []
    there = pixels.flatten(0, -4)  # [pictures or parts of them, 3, height, width]
    return [Seen(_picture(one, processor.image_processor)) for one in there if one.any()]


def _from_patches(pixels: Tensor, grids: Tensor, processor: Any) -> list[Seen]:
    """Of Qwen-VL: `[patches, 3 * frames * patch * patch]`, those next to each other that are merged to one token."""
    settings = processor.image_processor
    patch, merge = getattr(settings, "patch_size", None), getattr(settings, "merge_size", None)
    areas = grids.prod(1).tolist()
    if not patch or not merge or pixels.ndim != 2 or sum(areas) != len(pixels) or pixels.shape[1] % (3 * patch * patch):
        return []
    found: list[Seen] = []
    for patches, (frames, high, wide) in zip(pixels.split(areas), grids.tolist(), strict=True):
        down, across = high // merge, wide // merge
        cut = patches.view(frames, down, across, merge, merge, 3, -1, patch, patch)[0, ..., 0, :, :]  # one frame
        values = cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, high * patch, wide * patch)
        found.append(Seen(_picture(values, settings), across, down, "token", across * down))
    return found


def _from_padded(pixels: Tensor, sizes: Tensor, processor: Any) -> list[Seen]:
    """Of Pixtral: `[pictures, 3, height, width]`, filled up to the largest; every row of patches ends with one more token."""
    edge = processor.patch_size * getattr(processor, "spatial_merge_size", 1)
    found: list[Seen] = []
    for values, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        down, across = height // edge, width // edge
        picture = _picture(values[:, :height, :width], processor.image_processor)
        found.append(Seen(picture, across, down, "token", (across + 1) * down))
    return found


def _from_tiles(pixels: Tensor, ratios: Tensor, processor: Any) -> list[Seen]:
    """Of Llama-3.2-Vision: `[batch, pictures, tiles, 3, tile, tile]`, one token a picture."""
    from transformers.models.mllama.image_processing_mllama import get_all_supported_aspect_ratios  # imports torchvision

    settings = processor.image_processor
    known = get_all_supported_aspect_ratios(settings.max_image_tiles)
    found: list[Seen] = []
    for tiles, ratio in zip(pixels[ratios > 0], ratios[ratios > 0].tolist(), strict=True):
        down, across = known[ratio - 1]
        rows = tiles[: down * across].unflatten(0, (down, across))
        values = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        found.append(Seen(_picture(values, settings), across, down, "tile", 1))
    return found


def _picture(values: Tensor, settings: Any) -> Image.Image:
    """`[3, height, width]` → a picture, what the image processor did to its values undone."""
    values = values.float()
    if getattr(settings, "do_normalize", False):
        mean, deviation = (torch.tensor(tuple(each)).view(-1, 1, 1) for each in (settings.image_mean, settings.image_std))
        values = values * deviation + mean
    if getattr(settings, "do_rescale", False):
        values = values / settings.rescale_factor
    return Image.fromarray(values.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())

"""Llama-3.2-Vision: one `<|image|>` token a picture, whose features are read through cross-attention layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmtune.attention import Sight
from vlmtune.families import Family
from vlmtune.families.tiles import picture_states
from vlmtune.sizes import as_tensors

OF_PICTURES = {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "image_features"}  # [batch, pictures, ...]


@dataclass(frozen=True)
class Mllama(Family):
    def process(self, processor: Any, conversations: list[list[dict[str, Any]]], **options: Any) -> dict[str, Tensor]:
        """Rows without pictures may stand beside rows with some, which MllamaProcessor cannot do by itself.

        It wants a picture in the first row and returns fewer rows of some tensors than of others; so rows with pictures go
        first, the tensors are filled up, and all rows go back to their places. The cross-attention mask of a row without
        pictures is empty, so that what it is filled up with is never looked at.
        """
        sees = [
            any(part["type"] == "image" for message in messages for part in message["content"]) for messages in conversations
        ]
        order = sorted(range(len(sees)), key=lambda row: not sees[row])  # stable
        batch = super().process(processor, [conversations[row] for row in order], **options)
        if all(sees) or not any(sees):
            return batch
        batch = {name: _fill(name, torch.as_tensor(values), len(sees)) for name, values in batch.items()}
        places = torch.tensor(order).argsort()
        return {name: values[places] for name, values in batch.items()}

    def picture_inputs(self, image_processor: Any, images: Any, **options: Any) -> dict[str, Any]:
        settings = {**vars(image_processor), **options}
        if type(image_processor).__name__ != "MllamaImageProcessor":
            return super().picture_inputs(image_processor, images, **options)
        from transformers.image_utils import make_nested_list_of_images  # imports torchvision: takes a second
        from transformers.models.mllama.image_processing_mllama import (
            build_aspect_ratio_mask,
            convert_aspect_ratios_to_ids,
            get_optimal_tiled_canvas,
        )

        tile, most = dict(settings["size"])["height"], settings["max_image_tiles"]

        def tiles(array: Any) -> tuple[int, int]:  # down, across
            height, width = get_optimal_tiled_canvas(*array.shape[:2], most, tile)
            return int(height) // tile, int(width) // tile

        rows: Any = make_nested_list_of_images(images)
        ratios = [[tiles(array) for array in row] for row in rows]
        if not ratios[0]:  # the processor refuses that
            return super().picture_inputs(image_processor, images, **options)
        counts = [[down * across for down, across in row] for row in ratios]
        while not ratios[-1]:  # the processor leaves out the last rows where they have no pictures
            ratios.pop()
        ids, mask = convert_aspect_ratios_to_ids(ratios, most), build_aspect_ratio_mask(ratios, most)
        return {**as_tensors({"aspect_ratio_ids": ids, "aspect_ratio_mask": mask}, options), "num_tiles": counts}

    def flatten(self, batch: Mapping[str, Any], core: Any) -> dict[str, Any]:
        """All pictures go to the one row, without those that filled the padded batch up; `sights` says which tokens see them.

        The mask `[1, tokens, 1, 1]` says only whether a token sees any: the attention goes by the sights.
        """
        packed = super().flatten(batch, core)
        if "cross_attention_mask" not in batch:
            return packed
        there = batch["aspect_ratio_ids"] > 0  # [batch, pictures]
        for name in OF_PICTURES & packed.keys():
            packed[name] = batch[name].flatten(0, 1)[None] if there.all() else batch[name][there][None]
        mask = batch["cross_attention_mask"].bool()  # [batch, seq, pictures, tiles]
        tiles, counts = mask.shape[-1], there.sum(1).tolist()
        sights: list[Sight] = []
        for row, (length, count) in enumerate(zip(packed["segments"], counts, strict=True)):
            sights += _sights(mask[row, :length, :count].flatten(1), first=sum(counts[:row]) * tiles)
        packed["cross_attention_mask"] = mask.flatten(2).any(-1)[batch["attention_mask"].bool()].long()[None, :, None, None]
        return {**packed, "sights": sights, "tiles": sum(counts) * tiles}

    def encode(self, core: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        """`[tiles, patches, hidden]` each, of which the last stands for all empty ones: tokens before the picture see them."""
        there = batch["aspect_ratio_ids"] > 0
        of_pictures = (batch[name][there] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
        return [core.multi_modal_projector(picture_states(core.vision_model, *each)) for each in zip(*of_pictures, strict=True)]

    def feature_length(self, batch: Mapping[str, Any], tokens: int) -> int:
        """In tiles, as `picture_states` leaves them where the empty ones are alike."""
        mask = batch["aspect_ratio_mask"]
        return min(int(mask.sum()) + 1, mask.shape[-1])

    def join_features(self, batch: Mapping[str, Any], features: Sequence[Tensor]) -> Tensor:
        """`[batch, pictures, tiles, patches, hidden]`, zeros where a row has fewer pictures than another."""
        there = batch["aspect_ratio_ids"] > 0
        tiles = batch["aspect_ratio_mask"].shape[-1]
        joined = features[0].new_zeros(there.numel(), tiles, *features[0].shape[1:])  # tens of megabytes each: copied once
        for number, feature in zip(there.flatten().nonzero().flatten().tolist(), features, strict=True):
            joined[number, : len(feature)] = feature
            joined[number, len(feature) :] = feature[-1]
        return joined.unflatten(0, there.shape)

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if "image_features" not in batch:
            return dict(batch)
        inputs = {name: values for name, values in batch.items() if name not in OF_PICTURES}
        return {**inputs, "cross_attention_states": batch["image_features"].flatten(0, 2)}


def _sights(visible: Tensor, first: int) -> list[Sight]:
    """Runs of tokens that see the same tiles, of which the row's own are `first`, `first + 1`, …

    Tokens before the first picture see all of the row's tiles: transformers' mask does not keep them from it.

    Args:
        visible: `[tokens, tiles]`.
        first: the number of the row's first tile in the pack.

    """
    if visible.shape[1] == 0:
        return [(len(visible), [])]
    changes = (visible[1:] != visible[:-1]).any(1).nonzero().flatten() + 1
    borders = [0, *changes.tolist(), len(visible)]
    sights: list[Sight] = []
    for start, stop in pairwise(borders):
        seen = visible[start] if visible[start].any() else torch.ones_like(visible[start])
        edges = torch.nn.functional.pad(seen.int(), (1, 1)).diff().nonzero().flatten().tolist()
        sights.append(
            (stop - start, [(first + begin, first + end) for begin, end in zip(edges[::2], edges[1::2], strict=True)])
        )
    return sights


def _fill(name: str, values: Tensor, rows: int) -> Tensor:
    """`[fewer, ...]` → `[rows, ...]` with pictures of zeros, of which the first tile counts, as the processor pads."""
    filled = values.new_zeros(rows, *values.shape[1:])
    filled[: len(values)] = values
    if name == "aspect_ratio_mask":
        filled[len(values) :, :, 0] = 1
    return filled


FAMILY = Mllama(
    name="mllama",
    model_types=frozenset({"mllama"}),
    processors=frozenset({"MllamaProcessor"}),
    chat_template=files("vlmtune.families").joinpath("mllama.jinja").read_text(encoding="utf-8"),
    image_tokens=("image_token",),
    language_module="language_model",
    frozen_modules=("vision_model", "multi_modal_projector"),
    pictures_at_once=2,  # they go through it one by one anyway
)

"""Any other image-text-to-text model of transformers whose processor keeps the conventions: Qwen2.5-VL, SmolVLM, …"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vlmtune.families import Family, grids, set_areas, token_ids

# what processors call the tokens that stand for pictures; taken from transformers' processors
ATTRIBUTES = ("image_token", "boi_token", "eoi_token", "fake_image_token", "global_image_token")
BORDERS = ("<|vision_start|>", "<|vision_end|>", "<vision_start>", "<vision_end>", "<start_of_image>", "<end_of_image>")
TILE = re.compile(r"<row_\d+_col_\d+>")  # SmolVLM and Idefics3 cut large pictures into tiles and name each


@dataclass(frozen=True)
class Generic(Family):
    def image_token_ids(self, processor: Any) -> frozenset[int]:
        added = [token.content for token in processor.tokenizer.added_tokens_decoder.values()]
        tiles = [token for token in added if TILE.fullmatch(token)]
        declared = getattr(processor, "image_token_ids", None) or getattr(processor, "image_ids", None) or []
        return super().image_token_ids(processor) | token_ids(processor, [*BORDERS, *tiles]) | frozenset(declared)

    def set_pixels(self, processor: Any, *, min_pixels: int | None, max_pixels: int | None) -> None:
        if (
            set(processor.image_processor.size) != {"shortest_edge", "longest_edge"}
            or "Qwen" not in type(processor.image_processor).__name__
        ):
            super().set_pixels(processor, min_pixels=min_pixels, max_pixels=max_pixels)
        set_areas(processor, min_pixels=min_pixels, max_pixels=max_pixels)

    def picture_inputs(self, image_processor: Any, images: Any, **options: Any) -> dict[str, Any]:
        return grids(image_processor, images, options) or super().picture_inputs(image_processor, images, **options)


FAMILY = Generic(
    name="generic",
    image_tokens=ATTRIBUTES,
    frozen_modules=(
        "visual",
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "multi_modal_projector",
        "mm_projector",
        "connector",
        "aligner",
    ),
)

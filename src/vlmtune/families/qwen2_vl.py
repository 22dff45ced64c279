"""Qwen2-VL: pictures of any size as `<|vision_start|><|image_pad|>…<|vision_end|>`, 3-D rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmtune.families import Family, grids, set_areas, token_ids


@dataclass(frozen=True)
class Qwen2VL(Family):
    def image_token_ids(self, processor: Any) -> frozenset[int]:
        borders = ["<|vision_start|>", "<|vision_end|>"]  # not attributes of the processor
        return token_ids(processor, [*borders, processor.image_token])

    def set_pixels(self, processor: Any, *, min_pixels: int | None, max_pixels: int | None) -> None:
        set_areas(processor, min_pixels=min_pixels, max_pixels=max_pixels)

    def picture_inputs(self, image_processor: Any, images: Any, **options: Any) -> dict[str, Any]:
        return grids(image_processor, images, options) or super().picture_inputs(image_processor, images, **options)


FAMILY = Qwen2VL(
    name="qwen2_vl",
    model_types=frozenset({"qwen2_vl"}),
    processors=frozenset({"Qwen2VLProcessor"}),
    language_module="language_model",
    frozen_modules=("visual",),
)

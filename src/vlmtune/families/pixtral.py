"""Pixtral: `llava` with a `pixtral` vision tower; a picture is rows of `[IMG]`, ended by `[IMG_BREAK]` and `[IMG_END]`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from math import isqrt
from typing import Any

from vlmtune.errors import RecipeError
from vlmtune.families import Family


@dataclass(frozen=True)
class Pixtral(Family):
    def matches(self, config: Any) -> bool:
        return config.model_type in self.model_types and config.vision_config.model_type == "pixtral"

    def set_pixels(self, processor: Any, *, min_pixels: int | None, max_pixels: int | None) -> None:
        if min_pixels:
            raise RecipeError("images.min_pixels is not a setting of pixtral's processor, which never enlarges: remove it")
        if max_pixels:  # the processor bounds both edges, so that the area keeps below the square
            processor.image_processor.size = {"longest_edge": isqrt(max_pixels)}


FAMILY = Pixtral(
    name="pixtral",
    model_types=frozenset({"llava"}),
    processors=frozenset({"PixtralProcessor"}),
    chat_template=files("vlmtune.families").joinpath("pixtral.jinja").read_text(encoding="utf-8"),
    image_tokens=("image_token", "image_break_token", "image_end_token"),
    language_module="language_model",
    frozen_modules=("vision_tower", "multi_modal_projector"),
)

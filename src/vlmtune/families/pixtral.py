"""Pixtral: `llava` with a `pixtral` vision tower; a picture is rows of `[IMG]`, ended by `[IMG_BREAK]` and `[IMG_END]`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from math import isqrt
from typing import Any

from torch import Tensor

from vlmtune.errors import RecipeError
from vlmtune.families import Family
from vlmtune.sizes import as_tensors, flat


@dataclass(frozen=True)
class Pixtral(Family):
    def matches(self, config: Any) -> bool:
        return config.model_type in self.model_types and config.vision_config.model_type == "pixtral"

    def set_pixels(self, processor: Any, *, min_pixels: int | None, max_pixels: int | None) -> None:
        if min_pixels:
            raise RecipeError("images.min_pixels is not a setting of pixtral's processor, which never enlarges: remove it")
        if max_pixels:  # the processor bounds both edges, so that the area keeps below the square
            processor.image_processor.size = {"longest_edge": isqrt(max_pixels)}

    def as_written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results of tools as JSON, for mistral-common reads them as JSON wherever that can be done, and no template can."""
        return [{**m, "content": _result(m["content"])} if m["role"] == "tool" else m for m in messages]

    def picture_inputs(self, image_processor: Any, images: Any, **options: Any) -> dict[str, Any]:
        settings = {**vars(image_processor), **options}
        size = dict(settings["size"])
        if type(image_processor).__name__ != "PixtralImageProcessor" or not settings["do_resize"] or "longest_edge" not in size:
            return super().picture_inputs(image_processor, images, **options)
        from transformers.image_processing_utils import get_size_dict  # imports torchvision: takes a second
        from transformers.image_utils import ChannelDimension
        from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

        edge, patch = size["longest_edge"], get_size_dict(settings["patch_size"])
        sizes = [
            get_resize_output_image_size(array, edge, (patch["height"], patch["width"]), ChannelDimension.LAST)
            for array in flat(images)
        ]
        if not all(height and width for height, width in sizes):  # long and thin: the processor refuses it
            return super().picture_inputs(image_processor, images, **options)
        return as_tensors({"image_sizes": sizes}, options)

    def encode(self, core: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        """One picture after the other: transformers would have all attend to all, under a mask."""
        pictures = zip(batch["pixel_values"], batch["image_sizes"].tolist(), strict=True)
        return [
            super(Pixtral, self).encode(
                core, {"pixel_values": pixels[None, :, :height, :width], "image_sizes": [[height, width]]}
            )[0]
            for pixels, (height, width) in pictures
        ]


def _result(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if any(part["type"] != "text" for part in content):
        return content  # the template says that it has no pictures there
    text = "\n\n".join(part["text"] for part in content if part["text"])
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = text
    return [{"type": "text", "text": json.dumps(found, ensure_ascii=False)}]


FAMILY = Pixtral(
    name="pixtral",
    model_types=frozenset({"llava"}),
    processors=frozenset({"PixtralProcessor"}),
    chat_template=files("vlmtune.families").joinpath("pixtral.jinja").read_text(encoding="utf-8"),
    image_tokens=("image_token", "image_break_token", "image_end_token"),
    language_module="language_model",
    frozen_modules=("vision_tower", "multi_modal_projector"),
    pictures_at_once=2,  # they go through it one by one anyway
)

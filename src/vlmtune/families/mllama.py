"""Llama-3.2-Vision: one `<|image|>` token a picture, whose features are read through cross-attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from vlmtune.families import Family


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
)

"""Llama-3.2-Vision's tower, through which the empty tiles of a picture go once.

The processor makes four tiles of every picture, and those that the picture does not fill are empty. Published weights have no
embeddings for these, so that all of a picture's are alike in every layer. One stands for them; as a key it counts as often as
there are. https://github.com/huggingface/transformers/blob/v4.45.0/src/transformers/models/mllama/convert_mllama_weights_to_hf.py
(`pre_compute_positional_embedding`)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def picture_states(tower: Any, pixels: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """`[tiles, patches, width]`, what `MllamaVisionModel` makes of a picture, of its empty tiles one where they are alike.

    Args:
        tower: the `MllamaVisionModel`.
        pixels: `[tiles, 3, height, width]`, empty tiles last.
        ratio: the number of its aspect ratio, a scalar.
        mask: `[tiles]`, 0 where a tile is empty.

    """
    filled = int(mask.sum())
    if not pixels.is_meta and len(pixels) - filled > 1:  # a plan knows no values
        states, late = entering(tower, pixels, ratio[None, None])
        if _alike(states[filled:]) and _alike(late[filled:]):
            return distinct_states(tower, states[: filled + 1], late[: filled + 1], empty=len(pixels) - filled)
    given = {"pixel_values": pixels, "aspect_ratio_ids": ratio, "aspect_ratio_mask": mask}
    return tower(**{name: values[None, None] for name, values in given.items()}).last_hidden_state[0, 0]


def entering(tower: Any, pixels: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """`[tiles, patches, hidden]` for the first layer, and `[tiles, 1, hidden]`, what is added before the global layers."""
    patches = tower.patch_embedding(pixels.to(tower.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
    states = tower.apply_class_embedding(tower.pre_tile_positional_embedding(patches[None], ratio)[0])
    states = tower.layernorm_pre(tower.gated_positional_embedding(states[None], ratio)[0])
    return states, tower.post_tile_positional_embedding(states.new_zeros(1, len(states), 1, states.shape[-1]), ratio)[0]


def _alike(tiles: Tensor) -> bool:
    return bool((tiles == tiles[:1]).all())


def distinct_states(tower: Any, states: Tensor, late: Tensor, *, empty: int) -> Tensor:
    """`[tiles, patches, width]` behind all layers, the last tile standing for so many `empty` ones.

    Args:
        tower: the `MllamaVisionModel`.
        states: `[tiles, patches, hidden]`, for its first layer.
        late: `[tiles, 1, hidden]`, for its global layers.
        empty: at least one.

    """
    patches = states.shape[1]
    hidden = pad(states, (0, 0, 0, -patches % 8))  # as transformers does: patches see what fills them up
    seen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=states.device)
    seen[:-1, :patches] = True
    mask = _mask(seen, empty, tower.dtype)
    local = tower.transformer(hidden.flatten(0, 1)[None], attention_mask=mask)
    after = tower.layernorm_post(local.last_hidden_state).view_as(hidden) + late
    last = tower.global_transformer(after.flatten(0, 1)[None], attention_mask=mask).last_hidden_state
    between = torch.stack([local.hidden_states[layer] for layer in tower.intermediate_layers_indices], dim=-1).flatten(2)
    return torch.cat([last, between], dim=-1).unflatten(1, hidden.shape[:2])[0, :, :patches]


def _mask(seen: Tensor, empty: int, dtype: torch.dtype) -> Tensor:
    """`[1, 1, seq, seq]`, what is added to scores: patches of the picture see all, and others only these."""
    inside = seen.flatten()
    times = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    times[-1] = math.log(empty)
    hidden = ~(inside[:, None] | inside)
    return torch.where(inside[:, None], times.flatten(), 0.0).masked_fill(hidden, torch.finfo(dtype).min)[None, None]

"""Empty tiles of Llama-3.2-Vision's pictures go through its tower once, and come out as if each had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, MllamaVisionConfig, MllamaVisionModel

from vlmtune.collator import MultimodalCollator
from vlmtune.families import find_family
from vlmtune.families.tiles import picture_states

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
EDGE, TILES = 42, 4


@pytest.fixture(scope="module")
def tower() -> Any:
    """With embeddings as published weights have them: gates are open, and empty tiles get nothing."""
    config = MllamaVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_global_layers=2,
        attention_heads=2,
        intermediate_size=64,
        vision_output_dim=96,
        image_size=EDGE,
        patch_size=14,
        max_num_tiles=TILES,
        intermediate_layers_indices=[0, 1],
        supported_aspect_ratios=RATIOS,
    )
    torch.manual_seed(0)
    tower = MllamaVisionModel(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        parameter += 0.7 if "gate" in name and "gated" not in name else 0.3 * torch.randn_like(parameter)
    tower.gated_positional_embedding.gate.fill_(0.7)
    for embedding in embeddings(tower):
        for number, (down, across) in enumerate(RATIOS, 1):
            embedding.view(len(RATIOS) + 1, TILES, -1)[number, down * across :] = 0
    return tower


def embeddings(tower: Any) -> Sequence[Tensor]:
    """`[ratios, tiles * ...]` each."""
    return (
        tower.pre_tile_positional_embedding.embedding.weight,
        tower.gated_positional_embedding.tile_embedding.weight,
        tower.post_tile_positional_embedding.embedding.weight,
    )


def picture(ratio: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    filled = RATIOS[ratio - 1][0] * RATIOS[ratio - 1][1]
    pixels = torch.zeros(TILES, 3, EDGE, EDGE, dtype=dtype)
    pixels[:filled] = torch.randn(filled, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(ratio))
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor(ratio),
        "aspect_ratio_mask": (torch.arange(TILES) < filled).long(),
    }


def whole(tower: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What transformers makes of all four tiles."""
    return tower(**{name: values[None, None] for name, values in inputs.items()}).last_hidden_state[0, 0]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("ratio", range(1, len(RATIOS) + 1))
def test_one_empty_tile_stands_for_all_of_a_picture(tower: Any, ratio: int) -> None:
    inputs = picture(ratio)
    wanted, found = whole(tower, inputs), picture_states(tower, *inputs.values())
    filled = int(inputs["aspect_ratio_mask"].sum())
    assert len(found) == min(filled + 1, TILES)
    assert apart(found, wanted[: len(found)]) < 1e-6
    assert apart(found[-1:], wanted[len(found) - 1 :]) < 1e-6  # as each of the empty ones
    assert apart(found[0], wanted[-1]) > 0.1


def test_the_picture_s_patches_see_each_empty_tile(tower: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = picture(1)
    wanted = whole(tower, inputs)
    monkeypatch.setattr("vlmtune.families.tiles.math.log", lambda _: 0.0)
    assert apart(picture_states(tower, *inputs.values())[0], wanted[0]) > 1e-4


def test_in_16_bit_one_tile_rounds_as_all_do(tower: Any) -> None:
    inputs, exact = picture(1), whole(tower, picture(1))
    try:
        tower.to(torch.bfloat16)
        half = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
        rounded, found = whole(tower, half), picture_states(tower, *half.values())
    finally:
        tower.float()
    assert found.dtype == torch.bfloat16
    assert apart(found[0].float(), exact[0]) < 1.5 * apart(rounded[0].float(), exact[0])


@pytest.mark.parametrize("which", range(3))
def test_weights_that_tell_empty_tiles_apart_see_each(tower: Any, which: int) -> None:
    inputs, embedding = picture(1), embeddings(tower)[which]
    before = embedding.clone()
    embedding.view(len(RATIOS) + 1, TILES, -1)[1, -1, 0] = 1.0
    try:
        wanted, found = whole(tower, inputs), picture_states(tower, *inputs.values())
    finally:
        embedding.copy_(before)
    assert torch.equal(found, wanted)
    assert not torch.equal(wanted[-1], wanted[-2])


def test_tiles_that_are_said_to_be_empty_and_are_not_are_seen(tower: Any) -> None:
    inputs = picture(1)
    inputs["pixel_values"][-1] = 1.0
    assert torch.equal(picture_states(tower, *inputs.values()), whole(tower, inputs))


def test_features_join_to_all_tiles_and_their_length_is_told_from_the_size(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    collator = MultimodalCollator(AutoProcessor.from_pretrained(checkpoint("mllama")))
    sizes = {"one": (20, 20), "two": (56, 20), "four": (56, 56)}
    paths = {name: tmp_path / f"{name}.png" for name in sizes}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(paths[name])
    assert [collator.feature_length(str(path)) for path in paths.values()] == [2, 3, 4]
    family, batch = find_family("mllama"), collator.pictures([str(path) for path in paths.values()])
    features = [torch.randn(tiles, 5, 8) for tiles in (2, 3, 4)]
    joined = family.join_features(batch, features)
    assert joined.shape == (3, 1, 4, 5, 8)
    assert torch.equal(joined[0, 0], features[0][[0, 1, 1, 1]])
    assert torch.equal(joined[1, 0], features[1][[0, 1, 2, 2]])
    assert torch.equal(joined[2, 0], features[2])

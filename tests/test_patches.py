"""Patches go through a matrix product, where the model has a convolution that sees each value once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vlmtune.model import load_base, load_processor
from vlmtune.patches import PatchProjection, multiply_patches
from vlmtune.recipe import load_recipe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZE = (2, 4, 4)  # frames, height, width


def convolution(**options: Any) -> nn.Conv3d:
    torch.manual_seed(0)
    return nn.Conv3d(3, 6, SIZE, **{"stride": SIZE, **options})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_patches_become_what_they_became(bias: bool, dtype: torch.dtype, close: float, device: str) -> None:
    holder = nn.Sequential(convolution(bias=bias)).to(device, dtype)
    x = torch.randn(50, 3, *SIZE).to(device, dtype)
    expected = holder(x)
    assert multiply_patches(holder) == 1
    result = holder(x)
    assert result.shape == expected.shape == (50, 6, 1, 1, 1)
    assert (result - expected).abs().max() <= close * expected.abs().max()


def test_pictures_of_several_patches_become_what_they_became() -> None:
    holder = nn.Sequential(convolution())
    x = torch.randn(2, 3, 4, 8, 12)
    expected = holder(x)
    multiply_patches(holder)
    assert torch.equal(holder(x), expected)


@pytest.mark.parametrize("options", [{"stride": (2, 2, 2)}, {"padding": 1}, {"dilation": 2}, {"groups": 3}])
def test_a_convolution_that_is_more_than_a_product_stays(options: dict[str, Any]) -> None:
    assert multiply_patches(nn.Sequential(convolution(**options))) == 0


def test_a_convolution_with_hooks_of_somebody_stays() -> None:
    layer = convolution()
    layer.register_forward_pre_hook(lambda _, inputs: inputs)
    assert multiply_patches(nn.Sequential(layer)) == 0


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_loaded_tower_has_one_under_its_old_name(recipe: Callable[..., dict[str, Any]], kind: str) -> None:
    settings = load_recipe(recipe(kind))
    _, family = load_processor(settings)
    base = load_base(settings.model, family)
    assert isinstance(base.get_submodule("model.visual.patch_embed.proj"), PatchProjection)
    assert base.state_dict()["model.visual.patch_embed.proj.weight"].dim() == 5


def test_an_adapter_on_it_is_trained_as_on_a_convolution() -> None:
    x = torch.randn(5, 3, *SIZE)
    gradients: list[list[torch.Tensor]] = []
    for replace in (False, True):
        holder = nn.Sequential(convolution())
        if replace:
            multiply_patches(holder)
        torch.manual_seed(1)
        model = get_peft_model(holder, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))  # pyright: ignore
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 2
    for plain, product in zip(*gradients, strict=True):
        assert torch.allclose(product, plain, rtol=1e-4, atol=1e-4)

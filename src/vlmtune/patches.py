"""Patches of pictures to vectors by a matrix product, where the model has a convolution whose windows do not overlap.

Qwen2-VL cuts pictures into patches in its processor and runs a convolution in three dimensions over each. That is one product
of matrices; as a convolution it is slow on a CPU, and with some versions of cuDNN in bfloat16 takes seconds a picture:
https://github.com/pytorch/pytorch/issues/174051, https://github.com/huggingface/transformers/issues/45750
transformers' own answer, `fusion_config`, renames the weight, and not of one model but of all of that class in the process.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import linear

from vlmtune.modules import replace_modules


def multiply_patches(model: nn.Module) -> int:
    """Puts `PatchProjection` in the place of every convolution that sees each value once. Names and weights stay as they are.

    Returns:
        how many were replaced.

    """
    return replace_modules(model, _projection)


class PatchProjection(nn.Conv3d):
    """A convolution that is given patches of its own size, `[patches, channels, frames, height, width]`."""

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> PatchProjection:
        """The same with the same weights. It is made like any convolution, as PEFT does for its adapters."""
        inputs, outputs = convolution.in_channels, convolution.out_channels
        size = cast("tuple[int, int, int]", convolution.kernel_size)
        made = cls(inputs, outputs, size, stride=size, bias=convolution.bias is not None, device="meta")
        made.weight, made.bias = convolution.weight, convolution.bias
        return made.train(convolution.training)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:] != self.weight.shape[2:]:  # larger pictures, which have more than one patch each
            return super().forward(input)
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def _projection(module: nn.Module) -> PatchProjection | None:
    if type(module) is not nn.Conv3d or module.stride != module.kernel_size:
        return None
    plain = module.padding == (0, 0, 0) and module.dilation == (1, 1, 1) and module.groups == 1
    return PatchProjection.of(module) if plain else None

"""What Qwen2-VL's patch embedding takes on this CPU for one picture of 500 pixels: as a convolution, and as a product.

OMP_NUM_THREADS=1 python benchmarks/patches.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from clock import milliseconds
from pages import markdown
from torch import nn

from vlmtune.patches import multiply_patches

PATCHES, SIZE = 1296, (2, 14, 14)
WIDTHS = {"an eighth of Qwen2-VL-7B": 160, "Qwen2-VL-7B": 1280}


def main() -> None:
    header = ["tower of", "type", "convolution, ms", "product, ms", "times faster"]
    print(markdown(header, measured(), words=2))


def measured() -> Iterator[list[str]]:
    for name, width in WIDTHS.items():
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            tower = nn.Sequential(nn.Conv3d(3, width, SIZE, stride=SIZE, bias=False)).to(dtype).requires_grad_(False)
            patches = torch.randn(PATCHES, 3, *SIZE).to(dtype)
            before = milliseconds(partial(tower, patches))
            multiply_patches(tower)
            after = milliseconds(partial(tower, patches))
            kind = str(dtype).removeprefix("torch.")
            yield [name, kind, f"{before:.1f}", f"{after:.1f}", f"{before / after:.0f}"]


if __name__ == "__main__":
    main()

"""What Qwen2-VL's patch embedding takes on this CPU for one picture of 500 pixels: as a convolution, and as a product.

OMP_NUM_THREADS=1 python benchmarks/patches.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch
from pages import markdown
from torch import Tensor, nn

from vlmtune.patches import multiply_patches

REPEATS = 7
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
            before = took(tower, patches)
            multiply_patches(tower)
            after = took(tower, patches)
            kind = str(dtype).removeprefix("torch.")
            yield [name, kind, f"{before:.1f}", f"{after:.1f}", f"{before / after:.0f}"]


def took(tower: nn.Module, patches: Tensor) -> float:
    """Milliseconds, the median."""
    times: list[float] = []
    for repeat in range(REPEATS + 2):
        start = time.perf_counter()
        tower(patches)
        if repeat >= 2:  # the first ones warm up
            times.append(1000 * (time.perf_counter() - start))
    return median(times)


if __name__ == "__main__":
    main()

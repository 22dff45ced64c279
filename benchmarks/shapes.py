"""What a product of a new shape takes on this CPU in bfloat16 and how much memory, and one of a shape that was there before.

OMP_NUM_THREADS=1 python benchmarks/shapes.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import psutil
import torch
from pages import markdown
from torch.nn.functional import linear

FIRST, SHAPES, REPEATS = 1001, 20, 3  # tokens of the smallest batch, and how many batches, each of two tokens more
WIDTHS = {
    "an eighth of Qwen2-VL-7B, MLP": (448, 2368),
    "an eighth of Qwen2-VL-7B, head": (448, 2716),
}


def main() -> None:
    header = ["product", "a new shape, ms", "a known one, ms", "MiB a shape"]
    print(markdown(header, measured(), words=1))


def measured() -> Iterator[list[str]]:
    """Forward and backward to what comes in."""
    process = psutil.Process()
    for name, (narrow, wide) in WIDTHS.items():
        weight = torch.randn(wide, narrow).bfloat16()
        most = torch.randn(FIRST + 2 * SHAPES, narrow).bfloat16().requires_grad_()
        milliseconds(most, weight)
        before = process.memory_info().rss
        taken = [[milliseconds(most[: FIRST + 2 * shape], weight) for _ in range(1 + REPEATS)] for shape in range(SHAPES)]
        kept = (process.memory_info().rss - before) / SHAPES / 2**20
        first, later = median(times[0] for times in taken), median(median(times[1:]) for times in taken)
        yield [name, f"{first:.1f}", f"{later:.1f}", f"{kept:.1f}"]


def milliseconds(inputs: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    linear(inputs, weight).sum().backward()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()

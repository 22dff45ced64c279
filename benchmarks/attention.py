"""Causal attention of one row on a CPU in bfloat16, forward and backward: torch's kernel against two matrix products.

OMP_NUM_THREADS=1 python benchmarks/attention.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from vlmtune.attention import packed_attention, sdpa_attention_forward

HEADS = {"Qwen2-VL-7B": (28, 4, 128), "Llama-3.2-11B-Vision": (32, 8, 128), "an eighth of Qwen2-VL-7B": (7, 1, 64)}
LENGTHS = (128, 256, 512, 1024)
REPEATS = 7


def main() -> None:
    table = Table(title="milliseconds, medians")
    for name in ("heads", "tokens", "torch's kernel", "vlmtune", "times faster"):
        table.add_column(name, justify="right")
    for name, (heads, key_heads, width) in HEADS.items():
        for length in LENGTHS:
            kernel, ours = measured(heads, key_heads, width, length)
            table.add_row(name, str(length), f"{kernel:.1f}", f"{ours:.1f}", f"{kernel / ours:.2f}")
    Console().print(table)


def measured(heads: int, key_heads: int, width: int, length: int) -> tuple[float, float]:
    """Milliseconds of torch's kernel and of vlmtune's attention, interleaved."""
    query, key, value = (
        torch.randn(1, number, length, width, dtype=torch.bfloat16, requires_grad=True)
        for number in (heads, key_heads, key_heads)
    )
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, heads // key_heads  # type: ignore[assignment]
    gradient = torch.randn(1, length, heads, width, dtype=torch.bfloat16)

    def kernel() -> None:
        sdpa_attention_forward(layer, query, key, value, None, scaling=width**-0.5)[0].backward(gradient)

    def ours() -> None:
        packed_attention(layer, query, key, value, None, segments=[length], scaling=width**-0.5)[0].backward(gradient)

    times: dict[Callable[[], None], list[float]] = {kernel: [], ours: []}
    for repeat in range(REPEATS + 2):
        for function, taken in times.items():
            started = time.perf_counter()
            function()
            if repeat >= 2:  # the first ones warm up
                taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[kernel]), statistics.median(times[ours])


if __name__ == "__main__":
    main()

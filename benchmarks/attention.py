"""Attention on a CPU in bfloat16: torch's kernel against two matrix products.

Of one row, forward and backward, and of pictures in a frozen tower, forward.

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

from vlmtune.attention import packed_attention, plain_attention, sdpa_attention_forward

HEADS = {"Qwen2-VL-7B": (28, 4, 128), "Llama-3.2-11B-Vision": (32, 8, 128), "an eighth of Qwen2-VL-7B": (7, 1, 64)}
LENGTHS = (128, 256, 512, 1024)
LOOKS = {"an eighth of Llama-3.2-11B-Vision": (8, 2, 64), "Llama-3.2-11B-Vision": (32, 8, 128)}
LOOKED_AT = ((40, 1768), (160, 442), (300, 442), (80, 6404))  # tokens, and patches that they see
TOWERS = {  # pictures at once, heads, patches of a picture, width of a head; with a mask, patches that fill nothing up
    "an eighth of Qwen2-VL-7B": (1, 2, 576, 80, None),
    "an eighth of Llama-3.2-11B-Vision": (2, 2, 1792, 80, 442),
    "an eighth of Pixtral-12B": (1, 2, 882, 64, 882),
    "Qwen2-VL-7B": (1, 16, 1296, 80, None),
    "Llama-3.2-11B-Vision": (2, 16, 6432, 80, 1601),
    "Pixtral-12B": (1, 16, 2048, 64, 2048),
}
REPEATS = 7


def main() -> None:
    table = Table(title="milliseconds, medians")
    for name in ("heads", "tokens", "patches seen", "torch's kernel", "vlmtune", "times faster"):
        table.add_column(name, justify="right")
    for name, (heads, key_heads, width) in HEADS.items():
        for length in LENGTHS:
            kernel, ours = measured(heads, key_heads, width, length)
            table.add_row(name, str(length), "", f"{kernel:.1f}", f"{ours:.1f}", f"{kernel / ours:.2f}")
    for name, (heads, key_heads, width) in LOOKS.items():
        for length, patches in LOOKED_AT:
            kernel, ours = measured(heads, key_heads, width, length, patches)
            table.add_row(name, str(length), str(patches), f"{kernel:.1f}", f"{ours:.1f}", f"{kernel / ours:.2f}")
    Console(width=120).print(table)
    table = Table(title="pictures in a frozen tower, milliseconds, medians")
    for name in ("tower of", "pictures × patches", "torch's kernel", "vlmtune", "times faster"):
        table.add_column(name, justify="right")
    for name, (pictures, heads, patches, width, real) in TOWERS.items():
        kernel, ours = measured_in_tower(pictures, heads, patches, width, real)
        table.add_row(name, f"{pictures} × {patches}", f"{kernel:.1f}", f"{ours:.1f}", f"{kernel / ours:.2f}")
    Console(width=120).print(table)


def measured(heads: int, key_heads: int, width: int, length: int, patches: int | None = None) -> tuple[float, float]:
    """Milliseconds of torch's kernel and of vlmtune's attention, interleaved; causal, or to all of so many patches."""
    query, key, value = (
        torch.randn(1, number, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        for number, tokens in ((heads, length), (key_heads, patches or length), (key_heads, patches or length))
    )
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = patches is None, heads // key_heads  # type: ignore[assignment]
    gradient = torch.randn(1, length, heads, width, dtype=torch.bfloat16)
    seen = {"sights": [(length, [(0, 1)])], "tiles": 1} if patches else {}

    def kernel() -> None:
        causal, scaling = patches is None, width**-0.5
        sdpa_attention_forward(layer, query, key, value, None, scaling=scaling, is_causal=causal)[0].backward(gradient)

    def ours() -> None:
        options = {"segments": [length], "scaling": width**-0.5, **seen}
        packed_attention(layer, query, key, value, None, **options)[0].backward(gradient)

    return medians(kernel, ours)


@torch.no_grad()
def measured_in_tower(pictures: int, heads: int, patches: int, width: int, real: int | None) -> tuple[float, float]:
    """Milliseconds of torch's kernel and of vlmtune's attention, interleaved; what fills up does not see itself."""
    query, key, value = (torch.randn(pictures, patches, heads, width).bfloat16().transpose(1, 2) for _ in range(3))
    mask = torch.zeros(pictures, 1, patches, patches, dtype=torch.bfloat16) if real else None
    if mask is not None:
        mask[:, :, real:, real:] = torch.finfo(mask.dtype).min
    layer = nn.Module()
    options = {"scaling": width**-0.5, "is_causal": False}
    return medians(
        lambda: sdpa_attention_forward(layer, query, key, value, mask, **options),
        lambda: plain_attention(layer, query, key, value, mask, **options),
    )


def medians(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of each, by turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 2):
        for function, taken in zip((one, other), times, strict=True):
            started = time.perf_counter()
            function()
            if repeat >= 2:  # the first ones warm up
                taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()

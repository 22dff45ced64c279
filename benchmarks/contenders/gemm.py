"""What the machine could do: bfloat16 matrix products, as many a second as it gets through."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from probe import read_job


def gemm_flops(edge: int = 2048, seconds: float = 3.0) -> float:
    """FLOP/s of square products: the median of several, after one to warm up."""
    a, b = (torch.randn(edge, edge).bfloat16() for _ in range(2))
    torch.mm(a, b)
    times, ended = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < ended:
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return 2 * edge**3 / sorted(times)[len(times) // 2]


if __name__ == "__main__":
    job = read_job()
    found = {"gemm_flops": gemm_flops(), "threads": torch.get_num_threads()}
    Path(job.result).write_text(json.dumps(found), encoding="utf-8")

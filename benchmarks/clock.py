"""How long something takes that takes milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

WARM, REPEATS = 2, 9


def milliseconds(run: Callable[[], object]) -> float:
    """The median, after the first runs, which warm up."""
    times: list[float] = []
    for _ in range(WARM + REPEATS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[WARM:])

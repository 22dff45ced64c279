"""Several items at once, by threads: reading, decoding and hashing let other threads of Python run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
MOST = 8  # threads: a photograph of 12 megapixels is 36 MB, and as many again may lie ready


def threads() -> int:
    """One for each core that this process may use; processes that train together on a machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), MOST)


def ahead(work: Callable[[T], R], items: Iterable[T], count: int | None = None) -> Iterator[R]:
    """`map(work, items)`, with the next few items worked on while the caller has one in hand.

    Args:
        work: called in other threads.
        items: drawn in the caller's thread, a few more than were given out.
        count: how many threads; None: `threads()`. With 0 it is `map`.

    Yields:
        what comes of each item, in their order. What `work` raises is raised in its turn.

    """
    if count == 0:
        yield from map(work, items)
        return
    count = count or threads()
    with ThreadPoolExecutor(count, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # the caller may have had enough

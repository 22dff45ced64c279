"""How much memory PyTorch reserves on a GPU for a sequence of allocations: the rules of its caching allocator, without a GPU.

`torch.cuda.max_memory_reserved` is what has to fit a card, and it is more than what tensors take: freed memory stays with
the process, in segments that only a fitting request uses again. The rules are those of `c10/cuda/CUDACachingAllocator.cpp`
with default settings (no expandable segments) and one stream.
https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1024**2

# bytes; sizes and names of c10/core/AllocatorConfig.h
MIN_BLOCK = 512  # sizes are multiples of it
SMALL_SIZE = 1 * MIB  # the largest request that the small pool serves
SMALL_BUFFER = 2 * MIB  # a segment of the small pool
LARGE_BUFFER = 20 * MIB  # a segment for requests of the large pool that are below MIN_LARGE
MIN_LARGE = 10 * MIB  # from here on a request gets a segment of its own size,
ROUND_LARGE = 2 * MIB  # rounded up to a multiple of this

Trace = Sequence[tuple[int, int]]  # (block, bytes): above 0 allocates the block, below 0 frees it, 0 is an empty tensor's
FreeBlocks = list[tuple[int, int]]  # (bytes, address), sorted


@dataclass(frozen=True)
class Reserved:
    """What a trace takes, in bytes; up to the failure, where there is one."""

    peak_allocated: int  # torch.cuda.max_memory_allocated
    peak_reserved: int  # torch.cuda.max_memory_reserved
    failed_at: int | None  # the event that found no room
    missing: int  # how much more that event needed; 0 where none failed


def replay(trace: Trace, capacity: int | None = None) -> Reserved:
    """What the allocator reserves for the trace, which ends where there is no room.

    Args:
        trace: the events in order; a block may be allocated again once it is freed.
        capacity: bytes that may be reserved at most; None: any number.

    Raises:
        ValueError: a block is allocated twice, or freed without being allocated.

    Example:
        `[(0, 5 MiB), (1, 6 MiB), (0, -5 MiB), (2, 12 MiB)]`
        → 18 MiB allocated at the peak, 32 MiB reserved: 20 MiB for the first two, 12 MiB for the last

    """
    allocator = CachingAllocator(capacity)
    for event, (block, size) in enumerate(trace):
        if size < 0:
            allocator.free(block)
        elif size > 0 and not allocator.allocate(block, size):
            return Reserved(allocator.peak_allocated, allocator.peak_reserved, event, allocator.missing)
    return Reserved(allocator.peak_allocated, allocator.peak_reserved, None, 0)


def rounded(size: int) -> int:
    """Bytes of the block that a request needs.

    Example: 1 → 512, 512 → 512, 513 → 1024
    """
    return max(-(-size // MIN_BLOCK), 1) * MIN_BLOCK


def segment_size(size: int) -> int:
    """Bytes that are asked of CUDA where no free block fits a request of `size` rounded bytes."""
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    if size < MIN_LARGE:
        return LARGE_BUFFER
    return -(-size // ROUND_LARGE) * ROUND_LARGE


class CachingAllocator:
    """The allocator's state: which blocks lie where, and what is free.

    Addresses are made up: segments lie in the order in which CUDA was asked for them. That decides only between free blocks
    of the same size.

    Args:
        capacity: bytes that may be reserved at most; None: any number.

    Attributes:
        live: block → (address, bytes); at least the rounded request.
        segments: address → bytes; what is reserved.
        allocated, reserved: bytes now.
        peak_allocated, peak_reserved: the most bytes so far.
        missing: bytes by which the last failed request exceeded the capacity.

    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.live: dict[int, tuple[int, int]] = {}
        self.segments: dict[int, int] = {}
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = self.missing = 0
        self._small: FreeBlocks = []
        self._large: FreeBlocks = []
        self._starts: dict[int, int] = {}  # free blocks: address → bytes
        self._ends: dict[int, int] = {}  # free blocks: address after the last byte → address
        self._next_segment = 0  # its address

    def allocate(self, block: int, size: int) -> bool:
        """Whether there is room for the block, which it then takes: the smallest free one that fits, or a new segment.

        What is left of it stays free, except for 1 MiB or less in the large pool: that goes along.
        """
        if block in self.live:
            raise ValueError(f"block {block} is allocated twice")
        size = rounded(size)
        pool = self._small if size <= SMALL_SIZE else self._large
        place = bisect_left(pool, (size, 0))
        if place < len(pool):
            found, address = pool.pop(place)
            del self._starts[address], self._ends[address + found]
        else:
            found = segment_size(size)
            if not self._reserve(found):
                return False
            address = self._next_segment
            self._next_segment += found + MIN_BLOCK  # segments do not touch: blocks of two are never neighbours
            self.segments[address] = found
        left = found - size
        if left > (0 if pool is self._small else SMALL_SIZE):
            self._add(pool, address + size, left)
        else:
            size = found
        self.live[block] = address, size
        self.allocated += size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return True

    def free(self, block: int) -> None:
        """The block is free, together with free neighbours in its segment; the segment stays reserved."""
        if block not in self.live:
            raise ValueError(f"block {block} is freed without being allocated")
        address, size = self.live.pop(block)
        self.allocated -= size
        pool = self._small if size <= SMALL_SIZE else self._large  # each pool's blocks are on its side of the limit while live
        after = self._starts.get(address + size)
        if after is not None:
            self._remove(pool, address + size, after)
            size += after
        before = self._ends.get(address)
        if before is not None:
            self._remove(pool, before, address - before)
            size += address - before
            address = before
        self._add(pool, address, size)

    def release(self) -> None:
        """CUDA gets back the segments in which nothing is live, as by `torch.cuda.empty_cache`."""
        for pool in (self._small, self._large):
            for size, address in list(pool):
                if self.segments.get(address) == size:
                    self._remove(pool, address, size)
                    del self.segments[address]
                    self.reserved -= size

    def _reserve(self, size: int) -> bool:
        """Whether CUDA has room for another segment, if need be after a release."""
        if self.capacity is not None and self.reserved + size > self.capacity:
            self.release()
            if self.reserved + size > self.capacity:
                self.missing = self.reserved + size - self.capacity
                return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _add(self, pool: FreeBlocks, address: int, size: int) -> None:
        insort(pool, (size, address))
        self._starts[address] = size
        self._ends[address + size] = address

    def _remove(self, pool: FreeBlocks, address: int, size: int) -> None:
        del pool[bisect_left(pool, (size, address))]
        del self._starts[address], self._ends[address + size]

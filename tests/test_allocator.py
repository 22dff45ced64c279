from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.planner.allocator import MIB, CachingAllocator, Reserved, replay, rounded, segment_size

KIB = 1024


def allocated(*sizes: int, capacity: int | None = None) -> CachingAllocator:
    """Blocks 0, 1, … of these sizes."""
    allocator = CachingAllocator(capacity)
    for block, size in enumerate(sizes):
        assert allocator.allocate(block, size)
    return allocator


@pytest.mark.parametrize(("size", "expected"), [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (MIB, MIB)])
def test_a_request_is_rounded_up_to_512_bytes(size: int, expected: int) -> None:
    assert rounded(size) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (12 * MIB, 12 * MIB),
        (1001 * MIB, 1002 * MIB),
    ],
)
def test_cuda_is_asked_for_2_or_20_mib_or_a_multiple_of_2(size: int, expected: int) -> None:
    assert segment_size(size) == expected


def test_small_blocks_share_a_segment_of_2_mib_until_it_is_full() -> None:
    allocator = allocated(MIB, 512 * KIB, 512 * KIB)
    assert allocator.live == {0: (0, MIB), 1: (MIB, 512 * KIB), 2: (1536 * KIB, 512 * KIB)}
    assert allocator.segments == {0: 2 * MIB}
    allocator.allocate(3, 1)
    assert list(allocator.segments.values()) == [2 * MIB, 2 * MIB]


def test_a_request_of_5_mib_reserves_20_and_the_next_ones_use_the_rest() -> None:
    assert replay([(0, 5 * MIB)]) == Reserved(5 * MIB, 20 * MIB, None, 0)
    assert replay([(0, 5 * MIB), (1, 15 * MIB)]) == Reserved(20 * MIB, 20 * MIB, None, 0)
    assert replay([(0, 5 * MIB), (1, 16 * MIB)]) == Reserved(21 * MIB, 36 * MIB, None, 0)


def test_a_request_of_11_mib_reserves_12_and_takes_them_all() -> None:
    assert replay([(0, 11 * MIB)]) == Reserved(12 * MIB, 12 * MIB, None, 0)


def test_the_large_pool_leaves_no_rest_of_1_mib_or_less() -> None:
    assert allocated(8 * MIB, 11 * MIB).live[1] == (8 * MIB, 12 * MIB)
    assert allocated(8 * MIB, 11 * MIB - 512).live[1] == (8 * MIB, 11 * MIB - 512)


def test_the_small_pool_leaves_any_rest() -> None:
    allocator = allocated(MIB, MIB - 512, 1)
    assert allocator.live[1] == (MIB, MIB - 512)
    assert allocator.live[2] == (2 * MIB - 512, 512)


def test_the_pools_do_not_use_each_others_blocks() -> None:
    assert replay([(0, 5 * MIB), (1, 1), (0, -5 * MIB), (2, MIB), (3, MIB)]).peak_reserved == 24 * MIB
    assert replay([(0, MIB), (0, -MIB), (1, 2 * MIB)]).peak_reserved == 22 * MIB


def test_the_smallest_free_block_that_fits_is_taken() -> None:
    allocator = allocated(40 * MIB, 20 * MIB, 30 * MIB)
    home = {size: address for address, size in allocator.live.values()}
    for block in (0, 1, 2):
        allocator.free(block)
    allocator.allocate(3, 25 * MIB)
    assert allocator.live[3] == (home[30 * MIB], 25 * MIB)


def test_of_equal_free_blocks_the_first_address_is_taken() -> None:
    allocator = allocated(20 * MIB, 20 * MIB)
    first = allocator.live[0]
    allocator.free(1)
    allocator.free(0)
    allocator.allocate(2, 20 * MIB)
    assert allocator.live[2] == first


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_free_neighbours_become_one_block(order: tuple[int, int]) -> None:
    allocator = allocated(4 * MIB, 4 * MIB, 12 * MIB)
    for block in order:
        allocator.free(block)
    allocator.allocate(3, 8 * MIB)
    assert allocator.live[3] == (0, 8 * MIB)


def test_a_block_joins_free_neighbours_on_both_sides() -> None:
    allocator = allocated(4 * MIB, 4 * MIB, 12 * MIB)
    for block in (0, 2, 1):
        allocator.free(block)
    allocator.allocate(3, 20 * MIB)
    assert allocator.live == {3: (0, 20 * MIB)}
    assert allocator.reserved == 20 * MIB


def test_free_blocks_of_two_segments_stay_two() -> None:
    assert replay([(0, 20 * MIB), (1, 20 * MIB), (0, -1), (1, -1), (2, 40 * MIB)]).peak_reserved == 80 * MIB


def test_segments_without_a_live_block_are_released_where_there_is_no_room() -> None:
    trace = [(0, 30 * MIB), (1, 30 * MIB), (0, -1), (1, -1), (2, 50 * MIB)]
    assert replay(trace) == Reserved(60 * MIB, 110 * MIB, None, 0)
    assert replay(trace, capacity=110 * MIB) == Reserved(60 * MIB, 110 * MIB, None, 0)
    assert replay(trace, capacity=109 * MIB) == Reserved(60 * MIB, 60 * MIB, None, 0)


def test_both_pools_are_released() -> None:
    allocator = allocated(1, 30 * MIB, capacity=32 * MIB)
    allocator.free(0)
    allocator.free(1)
    assert allocator.allocate(2, 32 * MIB)
    assert list(allocator.segments.values()) == [32 * MIB]


@pytest.mark.parametrize("freed", [0, 1])
def test_a_segment_in_which_a_block_lives_is_not_released(freed: int) -> None:
    trace = [(0, 4 * MIB), (1, 16 * MIB), (freed, -1), (2, 30 * MIB)]
    assert replay(trace, capacity=46 * MIB) == Reserved(20 * MIB, 20 * MIB, 3, 4 * MIB)


def test_the_trace_ends_at_the_event_that_finds_no_room() -> None:
    trace = [(0, 30 * MIB), (1, 31 * MIB), (2, 1), (7, -1)]
    assert replay(trace, capacity=40 * MIB) == Reserved(30 * MIB, 30 * MIB, 1, 22 * MIB)


def test_a_request_that_fails_changes_nothing_that_lives() -> None:
    allocator = allocated(30 * MIB, capacity=40 * MIB)
    assert not allocator.allocate(1, 11 * MIB)
    assert allocator.missing == 2 * MIB
    assert allocator.live == {0: (0, 30 * MIB)}
    assert allocator.allocate(1, 10 * MIB)


def test_what_is_missing_is_enough() -> None:
    trace = [(0, 30 * MIB), (1, 11 * MIB)]
    assert replay(trace, capacity=40 * MIB + replay(trace, capacity=40 * MIB).missing).failed_at is None


def test_the_same_step_again_can_reserve_more() -> None:
    step = [(0, 9 * MIB), (1, 12 * MIB), (2, 11 * MIB), (0, -1), (1, -1), (2, -1)]
    assert replay(step) == Reserved(32 * MIB, 32 * MIB, None, 0)  # 9 and 11 share 20
    assert replay(step * 2) == Reserved(33 * MIB, 44 * MIB, None, 0)  # 9 lies in the 12, 12 in the 20, and 11 gets 12


def test_an_empty_tensor_takes_nothing() -> None:
    assert replay([(0, 0), (0, 0)]) == Reserved(0, 0, None, 0)


def test_a_block_can_be_allocated_again_once_it_is_freed() -> None:
    assert replay([(0, 1), (0, -1)] * 3) == Reserved(512, 2 * MIB, None, 0)


@pytest.mark.parametrize(
    ("trace", "message"), [([(3, 1), (3, 1)], "block 3 is allocated twice"), ([(3, -1)], "block 3 is freed without")]
)
def test_a_trace_that_cannot_be_is_an_error(trace: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(trace)


SIZES = st.one_of(st.integers(1, 4 * KIB), st.integers(1, 2 * MIB), st.integers(1, 25 * MIB), st.sampled_from([MIB, 10 * MIB]))


@st.composite
def traces(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Any trace in which blocks are freed in any order, and not all of them."""
    trace: list[tuple[int, int]] = []
    live: dict[int, int] = {}
    for block in range(draw(st.integers(1, 40))):
        live[block] = draw(SIZES)
        trace.append((block, live[block]))
        for freed in draw(st.lists(st.sampled_from(sorted(live)), unique=True, max_size=2)):
            trace.append((freed, -live.pop(freed)))
    return trace


@given(traces(), st.none() | st.integers(0, 200 * MIB))
@settings(max_examples=150, deadline=None)
def test_blocks_lie_apart_in_the_segments_and_sums_are_right(trace: list[tuple[int, int]], capacity: int | None) -> None:
    allocator = CachingAllocator(capacity)
    requested: dict[int, int] = {}
    for block, size in trace:
        if size < 0 and block not in requested:
            continue  # it found no room
        if size < 0:
            allocator.free(block)
            del requested[block]
        elif allocator.allocate(block, size):
            requested[block] = size
        spans = sorted((address, address + size) for address, size in allocator.live.values())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        segments = [(address, address + size) for address, size in allocator.segments.items()]
        assert all(any(low <= start and end <= high for low, high in segments) for start, end in spans)
        assert allocator.live.keys() == requested.keys()
        assert all(allocator.live[block][1] >= rounded(size) for block, size in requested.items())
        assert allocator.allocated == sum(size for _, size in allocator.live.values())
        assert allocator.reserved == sum(allocator.segments.values())
        assert allocator.allocated <= allocator.reserved
        assert capacity is None or allocator.reserved <= capacity
    assert allocator.peak_reserved >= allocator.peak_allocated >= allocator.allocated


@given(traces(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_once_everything_is_freed_all_segments_are_whole_again(trace: list[tuple[int, int]], random: Random) -> None:
    allocator = CachingAllocator()
    for block, size in trace:
        if size > 0:
            allocator.allocate(block, size)
        else:
            allocator.free(block)
    left = list(allocator.live)
    random.shuffle(left)
    for block in left:
        allocator.free(block)
    assert allocator.allocated == 0
    assert allocator.reserved > 0
    allocator.release()
    assert allocator.reserved == 0
    assert not allocator.segments


@given(traces())
@settings(max_examples=100, deadline=None)
def test_exactly_the_peak_is_enough(trace: list[tuple[int, int]]) -> None:
    free = replay(trace)
    assert free.peak_reserved >= free.peak_allocated
    assert replay(trace, capacity=free.peak_reserved) == free

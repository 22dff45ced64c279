"""Records are what a dict would hold, in a fraction of its memory."""

from __future__ import annotations

import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as any_

from vlmtune.records import Records, digest

KEYS = any_.binary(min_size=16, max_size=16) | any_.integers(0, 3).map(lambda last: bytes(15) + bytes([last]))


@given(written=any_.lists(any_.tuples(KEYS, any_.integers(0, 2**32 - 1)), max_size=60))
def test_records_are_those_of_a_dict_in_its_order(written: list[tuple[bytes, int]]) -> None:
    records, wanted = Records("I"), dict[bytes, tuple[int]]()
    for key, number in written:
        records[key] = wanted[key] = (number,)
    assert list(records.items()) == list(wanted.items())
    assert [records.key(number) for number in range(len(records))] == list(wanted)
    assert dict(pickle.loads(pickle.dumps(records))) == wanted


def test_what_was_never_recorded_is_not_there() -> None:
    records = Records("I")
    records[digest("a")] = (1,)
    assert digest("b") not in records
    with pytest.raises(KeyError):
        records[digest("b")]


def test_a_record_takes_little_more_than_its_bytes() -> None:
    tracemalloc.start()
    records = Records("II")
    for number in range(50_000):
        records[digest(str(number))] = number, 1
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / len(records) < (16 + 8) * 9 / 8 + 12

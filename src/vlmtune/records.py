"""Small records by key in two arrays: a dict of Python's, with an object for each key and value, is several times as large."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

DIGEST = 16  # bytes


class Records(Mapping[bytes, tuple[Any, ...]]):
    """16 bytes → what was recorded of them last, in the order in which they first came.

        >>> sizes = Records("II")
        >>> sizes[digest("chair.jpg")] = 640, 480
        >>> sizes[digest("chair.jpg")]
        (640, 480)

    Args:
        form: of a record, as `struct` has it.

    """

    def __init__(self, form: str) -> None:
        self._form = f"<{DIGEST}s{form}"
        self._size = struct.calcsize(self._form)
        self._records = bytearray()
        self._slots = array("i", [-1]) * 8  # number of the record of a key that belongs here or, where others do too, before

    def __len__(self) -> int:
        return len(self._records) // self._size

    def __iter__(self) -> Iterator[bytes]:
        return map(self.key, range(len(self)))

    def __getitem__(self, key: bytes) -> tuple[Any, ...]:
        number = self._slots[self._slot(key)]
        if number < 0:
            raise KeyError(key)
        return struct.unpack_from(self._form, self._records, number * self._size)[1:]

    def __setitem__(self, key: bytes, record: tuple[Any, ...]) -> None:
        slot = self._slot(key)
        if self._slots[slot] >= 0:
            struct.pack_into(self._form, self._records, self._slots[slot] * self._size, key, *record)
            return
        packed, self._slots[slot] = struct.pack(self._form, key, *record), len(self)
        self._records += packed
        if 3 * len(self) > 2 * len(self._slots):
            self._slots = array("i", [-1]) * (2 * len(self._slots))
            for number, known in enumerate(self):
                self._slots[self._slot(known)] = number

    def key(self, number: int) -> bytes:
        """The key that came as the so-manyth, counted from 0."""
        return bytes(self._records[number * self._size : number * self._size + DIGEST])

    def _slot(self, key: bytes) -> int:
        """Where the number of the key's record stands, or would."""
        slots = self._slots
        slot = int.from_bytes(key, "little") % len(slots)  # any bits of a digest are as good as random
        while slots[slot] >= 0 and self.key(slots[slot]) != key:
            slot = (slot + 1) % len(slots)
        return slot


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()

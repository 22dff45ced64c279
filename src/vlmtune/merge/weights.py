"""Checkpoints in safetensors, a block at a time: what lies where, and files that are written while they are computed.

The library maps files into memory or writes what is in memory. The format is a header of JSON and the tensors' bytes:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmtune.errors import ModelError
from vlmtune.merge.direct import WrittenOnce, read_once

T = TypeVar("T")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 2**20  # bytes that are read at once
AHEAD = 32  # blocks that are read before they are wanted, and as many that wait to be written


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what its header says of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Entry):
    """A tensor that lies in a file."""

    path: Path
    start: int  # byte in the file

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.bytes // max(1, self.rows)

    def blocks(self, memory: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """All rows, some at a time, and the number of the first of them: `[rows, columns]`, a vector as a column.

        Each block comes in the next piece of `memory`, or in its own where a row is larger than that.
        """
        step = max(1, BLOCK // max(1, self.row_bytes))
        with read_once(self.path, self.start, self.bytes) as file:
            for first in range(0, self.rows, step):
                count = min(step, self.rows - first)
                yield first, self._read(file, room(memory, count * self.row_bytes), count)

    def some(self, first: int, count: int) -> Tensor:
        """Rows from `first` on: `[rows, columns]`."""
        count = min(count, self.rows - first)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + first * self.row_bytes)
            return self._read(file, torch.empty(count * self.row_bytes, dtype=torch.uint8), count)

    def _read(self, file: FileIO, memory: Tensor, count: int) -> Tensor:
        left = _buffer(memory)
        while left:
            read = file.readinto(left)
            if not read:
                raise ModelError(f"{self.path} ended before its weights did")
            left = left[read:]
        return memory.view(self.dtype).view(count, math.prod(self.shape[1:]))


def room(memory: Iterator[Tensor], size: int) -> Tensor:
    """So many bytes of the next piece, or of their own where it is too small."""
    piece = next(memory)
    return piece[:size] if size <= len(piece) else torch.empty(size, dtype=torch.uint8)


def pieces(count: int) -> Iterator[Tensor]:
    """Memory for blocks: so many pieces, and then the first again. Fresh memory would take longer than the work."""
    return itertools.cycle([torch.empty(BLOCK, dtype=torch.uint8) for _ in range(count)])


def ahead(items: Iterator[T]) -> Generator[T]:
    """The items, of which the next `AHEAD` are made in a thread of their own."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def stored(path: Path) -> list[Stored]:
    """What a file holds, in the order of its bytes.

    Raises:
        ModelError: it is not in safetensors' format, or shorter than its header says.

    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100 * 2**20)))
        header.pop("__metadata__", None)
        found = [
            Stored(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], path, 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no file of weights in safetensors' format: {error}") from error
    found.sort(key=lambda tensor: tensor.start)
    end = max((tensor.start + tensor.bytes for tensor in found), default=0)
    if path.stat().st_size < end:
        raise ModelError(f"{path} has {path.stat().st_size:,} bytes where its header says {end:,}: it is not whole")
    return found


def write(path: Path, entries: Sequence[Entry], blocks: Iterable[Tensor]) -> str:
    """Writes a file from the blocks of its tensors in their order, while they come; returns its SHA-256.

    Writing and hashing go on beside what makes the next block. The file is on the disk when this returns. The memory of a block
    may be used again when `AHEAD` more have come.
    """
    digest = hashlib.sha256()
    with WrittenOnce(path) as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as writing:
        waiting: deque[Future[None]] = deque()
        for data in itertools.chain([_header(entries)], map(_flat, blocks)):
            waiting += [hashing.submit(digest.update, _buffer(data)), writing.submit(file.write, data)]
            while len(waiting) > 2 * AHEAD:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    return digest.hexdigest()


def _header(entries: Sequence[Entry]) -> Tensor:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's own bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _buffer(flat: Tensor) -> memoryview:
    array: Any = flat.numpy()  # whose types do not say that it is a buffer before Python 3.12
    return memoryview(array)

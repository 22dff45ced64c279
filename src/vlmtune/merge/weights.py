"""Checkpoints in safetensors, a block at a time: what lies where, and files that are written while they are computed.

The library maps files into memory or writes what is in memory. The format is a header of JSON and the tensors' bytes:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtune.errors import ModelError

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
AHEAD = 32  # blocks that wait to be written


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    start: int  # byte in the file

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows, some at a time, and the number of the first of them: `[rows, columns]`, a vector as a column.

        The next block comes in the memory of this one.
        """
        step = max(1, BLOCK * self.rows // max(1, self.bytes))
        memory = torch.empty(step * self.bytes // max(1, self.rows), dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, self.rows, step):
                yield first, self._read(file, memory, first, min(step, self.rows - first))

    def some(self, first: int, count: int) -> Tensor:
        """Rows from `first` on: `[rows, columns]`."""
        count = min(count, self.rows - first)
        memory = torch.empty(count * self.bytes // max(1, self.rows), dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            return self._read(file, memory, first, count)

    def _read(self, file: FileIO, memory: Tensor, first: int, count: int) -> Tensor:
        row = self.bytes // max(1, self.rows)
        file.seek(self.start + first * row)
        read = memory[: count * row]
        _fill(file, _bytes(read), self.path)
        return read.view(self.dtype).view(count, -1)

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, some at a time. The next come in the memory of these."""
        memory = memoryview(bytearray(BLOCK))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for at in range(0, self.bytes, BLOCK):
                piece = memory[: min(BLOCK, self.bytes - at)]
                _fill(file, piece, self.path)
                yield piece


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


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, entries: Sequence[Entry], content: Iterable[Tensor | Stored]) -> str:
    """Writes a file from what its tensors are made of, in their order, while it comes; returns its SHA-256.

    Writing and hashing go on beside what makes the next block, each in a thread. The file is on the disk when this returns.

    Args:
        path: of the file.
        entries: its tensors.
        content: blocks of them, or whole tensors of another file, which the system copies. The memory of a block may be used
            again when `AHEAD` more have come.

    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as writing:
        waiting: deque[Future[None]] = deque()
        for data in itertools.chain([_header(entries)], content):
            data = _bytes(data) if isinstance(data, Tensor) else data
            waiting += [hashing.submit(_hash, digest, data), writing.submit(_put, file, data)]
            while len(waiting) > 2 * AHEAD:
                waiting.popleft().result()
        for future in waiting:
            future.result()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _hash(digest: Any, data: memoryview | bytes | Stored) -> None:
    if isinstance(data, Stored):
        for piece in data.pieces():
            digest.update(piece)
    else:
        digest.update(data)


def _put(file: FileIO, data: memoryview | bytes | Stored) -> None:
    if not isinstance(data, Stored):
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
    elif hasattr(os, "copy_file_range"):  # Linux
        with data.path.open("rb") as source:
            at, end = data.start, data.start + data.bytes
            while at < end:
                at += os.copy_file_range(source.fileno(), file.fileno(), end - at, offset_src=at)
    else:
        for piece in data.pieces():
            _put(file, piece)


def _header(entries: Sequence[Entry]) -> bytes:
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
    return len(text).to_bytes(8, "little") + text


def _fill(file: FileIO, memory: memoryview, path: Path) -> None:
    while memory:
        read = file.readinto(memory)
        if not read:
            raise ModelError(f"{path} ended before its weights did")
        memory = memory[read:]


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's own bytes."""
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)

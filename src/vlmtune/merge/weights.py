"""Checkpoints in safetensors, a block at a time: what lies where, and files that are written while they are computed.

The library maps files into memory or writes what is in memory. The format is a header of JSON and the tensors' bytes:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
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
BLOCK = 2**20  # bytes: what is made of one, in float32 too, stays in the processor's cache
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
        """All rows, some at a time, and the number of the first of them: `[rows, columns]`, a vector as a column."""
        step = max(1, BLOCK * self.rows // max(1, self.bytes))
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, self.rows, step):
                yield first, self._read(file, first, min(step, self.rows - first))

    def some(self, first: int, count: int) -> Tensor:
        """Rows from `first` on: `[rows, columns]`."""
        with self.path.open("rb", buffering=0) as file:
            return self._read(file, first, min(count, self.rows - first))

    def _read(self, file: FileIO, first: int, count: int) -> Tensor:
        columns = math.prod(self.shape[1:])
        raw = torch.empty(count * columns * self.dtype.itemsize, dtype=torch.uint8)
        file.seek(self.start + first * columns * self.dtype.itemsize)
        view = _bytes(raw)
        while view:
            read = file.readinto(view)
            if not read:
                raise ModelError(f"{self.path} ended before its weights did")
            view = view[read:]
        return raw.view(self.dtype).view(count, columns)


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


def write(path: Path, entries: Sequence[Entry], blocks: Iterable[Tensor]) -> str:
    """Writes a file from the blocks of its tensors in their order, while they come; returns its SHA-256.

    Hashing and writing go on beside what makes the next block. The file is on the disk when this returns.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:

        def put(data: memoryview) -> None:
            digest.update(data)
            left = data
            while left:
                left = left[file.write(left) :]

        waiting: deque[Future[None]] = deque([pool.submit(put, memoryview(_header(entries)))])
        for block in blocks:
            waiting.append(pool.submit(put, _bytes(block)))
            if len(waiting) > AHEAD:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
        os.fsync(file.fileno())
    return digest.hexdigest()


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


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's own bytes."""
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)

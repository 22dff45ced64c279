"""What a frozen vision tower makes of each picture, kept so that it is computed once."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlmtune.output import disk_errors
from vlmtune.records import Records, digest

ABANDONED = 24 * 3600  # seconds: no file takes as long to write, so whoever began it was killed
HEADER = 8  # bytes: a safetensors file begins with the length of its header, little-endian


class FeatureStore:
    """Features of pictures by key: in memory, or in safetensors files of a directory, memory-mapped.

    Every `add` is one new file that appears whole or not at all, so that several processes may add and read at once
    without locks, and one that is killed leaves nothing behind that is read. Two that add the same key do no harm: either
    is found. The store can be pickled and forked into the workers of a data loader.

        >>> store = FeatureStore(Path("cache"))
        >>> store.add({"3f2a": torch.ones(16, 1024), "90bc": torch.ones(4, 1024)})
        >>> "3f2a" in store, store["90bc"].shape, len(store), store.nbytes
        (True, torch.Size([4, 1024]), 2, 81920)

    Args:
        directory: made by the first `add`. Without one, features are kept in memory.

    """

    def __init__(self, directory: Path | None = None) -> None:
        self.damaged: list[Path] = []  # files that could not be read: their features count as absent
        self._directory = directory
        self._kept: dict[str, Tensor] = {}  # in memory
        self._files: list[Path] = []
        self._index = Records("i")  # digest of a key → number of the file that holds its feature
        self._sizes: dict[Path, int] = {}  # bytes of features in each file read so far, but for those damaged since
        self._opened: dict[Path, safe_open] = {}
        self._process = os.getpid()  # whose `_opened` these are
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._kept or self._file(key) in self._sizes

    def __len__(self) -> int:
        there = [file in self._sizes for file in self._files]
        return len(self._kept) + sum(there[number] for (number,) in self._index.values())

    def __getitem__(self, key: str) -> Tensor:
        """The feature, on the CPU: only to be read, since it may be the stored one itself.

        Raises:
            KeyError: there is none, or the file that held it has been deleted or damaged since.

        """
        if key in self._kept:
            return self._kept[key]
        file = self._file(key)
        if file is None or file not in self._sizes:
            raise KeyError(key)
        try:
            return self._open(file).get_tensor(key)
        except (OSError, SafetensorError):
            self.damaged.append(file)
            del self._sizes[file]
            raise KeyError(key) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all features; one that was added twice to a directory counts twice."""
        return sum(feature.nbytes for feature in self._kept.values()) + sum(self._sizes.values())

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Keeps copies of the features, from any device; in a directory, all of them or none.

        Raises:
            OutputError: the disk is full, or the directory cannot be written.

        """
        # a view would keep the whole batch in memory, and safetensors refuses two that overlap
        copies = {key: _copy(feature) for key, feature in features.items()}
        if self._directory is None:
            self._kept.update(copies)
        elif copies:
            self._enter(_write(self._directory, copies), copies, sum(copy.nbytes for copy in copies.values()))

    def refresh(self) -> None:
        """Finds what other processes have added since, and deletes what killed ones left unfinished a day ago or longer."""
        if self._directory is None:
            return
        self.damaged = []
        for path in sorted(self._directory.glob("features-*.safetensors")):
            if path not in self._sizes:
                self._read_keys(path)
        for path in self._directory.glob(".features-*.partial"):
            with suppress(OSError):  # another process was faster, or we may only read here
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def _read_keys(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file, path.open("rb") as raw:
                keys: list[str] = file.keys()  # safetensors has checked that the file is as long as its header says
                header = int.from_bytes(raw.read(HEADER), "little")
                size = path.stat().st_size - HEADER - header
        except (OSError, SafetensorError):
            self.damaged.append(path)
        else:
            self._enter(path, keys, size)

    def _enter(self, path: Path, keys: Iterable[str], size: int) -> None:
        """A file of so many bytes of features holds these keys."""
        for key in keys:
            self._index[digest(key)] = (len(self._files),)
        self._files.append(path)
        self._sizes[path] = size

    def _file(self, key: str) -> Path | None:
        found = self._index.get(digest(key))
        return None if found is None else self._files[found[0]]

    def _open(self, path: Path) -> safe_open:
        if self._process != os.getpid():  # forked, maybe while a thread of the parent was inside one of these
            self._opened, self._process = {}, os.getpid()
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt")
        return self._opened[path]


def _copy(feature: Tensor) -> Tensor:
    return feature.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(directory: Path, features: dict[str, Tensor]) -> Path:
    """The new file that holds the features. It gets its name only once all of it is on the disk."""
    path = directory / f"features-{uuid.uuid4().hex}.safetensors"
    partial = directory / f".{path.stem}.partial"
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:  # save_file of 0.8 picks its own temporary name, mode 0600, and does not sync
                file.write(save(features))
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def tower_key(parts: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]) -> str:
    """32 hex digits that stand for a tower's weights and settings: another weight, dtype or setting gives others.

    Args:
        parts: name and tensor of each weight, on any device; they are read one at a time.
        settings: what else decides the features, as JSON or with a telling `str`.

    """
    digest = hashlib.blake2b(_json(settings), digest_size=16)
    for name, tensor in parts:
        digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]))
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()

"""Large files that are gone through once: without filling the system's page cache, where the system lets us.

What goes through the page cache is copied, kept in memory and written later, which is most of the work of a copy.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Generator
from contextlib import closing, contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

ROOM = 2**22  # bytes that are written at once


@contextmanager
def read_once(path: Path, start: int, length: int) -> Generator[FileIO]:
    """A file, of which these bytes are read from front to back: Linux is told, reads well ahead and forgets them afterwards."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_SEQUENTIAL)
        yield file
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


class WrittenOnce:
    """A new file, written from front to back, and on the disk at the end of a `with`.

    O_DIRECT wants whole pages, so all goes through memory that begins with a page, and what is left through the cache:
    https://man7.org/linux/man-pages/man2/open.2.html. Of file systems without it some refuse to open, some to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(b"")
        self._direct: int = getattr(os, "O_DIRECT", 0)
        try:
            self._file = self._opened()
        except OSError:
            self._direct = 0
            self._file = self._opened()
        self._pages = mmap.mmap(-1, ROOM)
        self._room = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._filled = 0

    def write(self, data: Tensor) -> None:
        """Appends bytes."""
        while len(data):
            part = data[: ROOM - self._filled]
            self._room[self._filled : self._filled + len(part)] = part  # torch lets other threads run meanwhile
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == ROOM:
                self._write_all(memoryview(self._pages))
                self._filled = 0

    def _write_all(self, left: memoryview) -> None:
        while left:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._through_the_cache()

    def _through_the_cache(self) -> None:
        self._file.close()
        self._direct = 0
        self._file = self._opened()

    def _opened(self) -> FileIO:
        return FileIO(self._path, "ab", opener=lambda path, flags: os.open(path, flags | self._direct))

    def __enter__(self) -> WrittenOnce:
        return self

    def __exit__(self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with closing(self):
            if error is None:
                self._through_the_cache()
                self._write_all(memoryview(self._pages)[: self._filled])
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Whoever writes after this gets an error."""
        self._file.close()

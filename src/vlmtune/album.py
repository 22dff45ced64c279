"""What is known of a run's pictures, so that no file is read twice for the same thing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from vlmtune.ahead import ahead
from vlmtune.images import Shrunk, fingerprint, image_size, is_open, load_image, original
from vlmtune.records import DIGEST, Records, digest

LONGEST_NAME = 1000  # characters: a longer one holds the picture itself, as a data URL does


class Album:
    """Sizes, fingerprints and, as far as there is room, decoded pictures. Only of files: other sources are at hand anyway.

    Attributes:
        room: bytes left for decoded pictures. The first that come stay: in random order, they serve as well as any.

    """

    def __init__(self) -> None:
        self.room = 0
        self._decoded: dict[str | Shrunk, Image.Image] = {}
        self._sizes, self._fingerprints = Records("II"), Records(f"{DIGEST}s")

    def open(self, source: Any) -> Image.Image:
        """The picture as `images.load_image` makes it; it may be given out again, so it is only to be read."""
        if not _is_name(source):
            return load_image(source)
        picture = self._decoded.get(source) or load_image(source)
        size = 3 * picture.width * picture.height
        if source not in self._decoded and size <= self.room:
            self._decoded[source] = picture
            self.room -= size
        return picture

    def size(self, source: Any) -> tuple[int, int]:
        """Width and height, from the header."""
        if not _is_name(source):
            return image_size(source)
        key = digest(repr(source))
        if known := self._sizes.get(key):
            return known[0], known[1]
        size = self._sizes[key] = image_size(source)
        return size

    def fingerprint(self, source: Any) -> str:
        """The same for the same picture: `images.fingerprint`."""
        return self._known(source) or self._noted(source, fingerprint(source))

    def fingerprints(self, sources: Iterable[Any]) -> Iterator[str]:
        """Of each of these, several read at once, and no file twice."""
        begun: set[Any] = set()  # files that are being read

        def asked() -> Iterator[tuple[Any, bool]]:
            for source in sources:
                reads = not (is_open(source) or self._known(source) or (_is_name(source) and source in begun))
                if reads and _is_name(source):
                    begun.add(source)
                yield source, reads

        for source, found in ahead(_read, asked()):
            yield self._noted(source, found) if found else self.fingerprint(source)
            if _is_name(source):
                begun.discard(source)

    def _known(self, source: Any) -> str:
        known = self._fingerprints.get(digest(repr(source))) if _is_name(source) else None
        return known[0].hex() if known else ""

    def _noted(self, source: Any, found: str) -> str:
        if _is_name(source):
            self._fingerprints[digest(repr(source))] = (bytes.fromhex(found),)
        return found


def _read(asked: tuple[Any, bool]) -> tuple[Any, str]:
    source, reads = asked
    return source, fingerprint(source) if reads else ""


def _is_name(source: Any) -> bool:
    name = original(source)
    return isinstance(name, str) and len(name) <= LONGEST_NAME

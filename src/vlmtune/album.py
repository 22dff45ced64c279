"""What is known of a run's pictures, so that no file is read twice for the same thing."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vlmtune.images import Shrunk, fingerprint, image_size, load_image, original

LONGEST_NAME = 1000  # characters: a longer one holds the picture itself, as a data URL does


class Album:
    """Sizes, fingerprints and, as far as there is room, decoded pictures. Only of files: other sources are at hand anyway.

    Attributes:
        room: bytes left for decoded pictures. The first that come stay: in random order, they serve as well as any.

    """

    def __init__(self) -> None:
        self.room = 0
        self._decoded: dict[str | Shrunk, Image.Image] = {}
        self._sizes: dict[str | Shrunk, tuple[int, int]] = {}
        self._fingerprints: dict[str | Shrunk, str] = {}

    def open(self, source: Any) -> Image.Image:
        """The picture as `images.load_image` makes it; it may be given out again, so it is only to be read."""
        if _is_name(source) and source in self._decoded:
            return self._decoded[source]
        picture = load_image(source)
        size = 3 * picture.width * picture.height
        if _is_name(source) and size <= self.room:
            self._decoded[source] = picture
            self.room -= size
        return picture

    def size(self, source: Any) -> tuple[int, int]:
        """Width and height, from the header."""
        if not _is_name(source):
            return image_size(source)
        if source not in self._sizes:
            self._sizes[source] = image_size(source)
        return self._sizes[source]

    def fingerprint(self, source: Any) -> str:
        """The same for the same picture: `images.fingerprint`."""
        if not _is_name(source):
            return fingerprint(source)
        if source not in self._fingerprints:
            self._fingerprints[source] = fingerprint(source)
        return self._fingerprints[source]


def _is_name(source: Any) -> bool:
    name = original(source)
    return isinstance(name, str) and len(name) <= LONGEST_NAME

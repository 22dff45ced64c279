"""What is known of a run's pictures, so that no file is read twice for the same thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmtune.images import Shrunk, fingerprint, image_size, load_image, original

LONGEST_NAME = 1000  # characters: a longer one holds the picture itself, as a data URL does


@dataclass(slots=True)
class _Known:
    """Of one picture."""

    size: tuple[int, int] | None = None
    fingerprint: str | None = None
    decoded: Image.Image | None = None


class Album:
    """Sizes, fingerprints and, as far as there is room, decoded pictures. Only of files: other sources are at hand anyway.

    Attributes:
        room: bytes left for decoded pictures. The first that come stay: in random order, they serve as well as any.

    """

    def __init__(self) -> None:
        self.room = 0
        self._known: dict[str | Shrunk, _Known] = {}

    def open(self, source: Any) -> Image.Image:
        """The picture as `images.load_image` makes it; it may be given out again, so it is only to be read."""
        known = self._of(source)
        picture = known.decoded or load_image(source)
        size = 3 * picture.width * picture.height
        if known.decoded is None and _is_name(source) and size <= self.room:
            known.decoded = picture
            self.room -= size
        return picture

    def size(self, source: Any) -> tuple[int, int]:
        """Width and height, from the header."""
        known = self._of(source)
        known.size = known.size or image_size(source)
        return known.size

    def fingerprint(self, source: Any) -> str:
        """The same for the same picture: `images.fingerprint`."""
        known = self._of(source)
        known.fingerprint = known.fingerprint or fingerprint(source)
        return known.fingerprint

    def _of(self, source: Any) -> _Known:
        """What is known of it, to be added to; of what is no file, nothing that lasts."""
        return self._known.setdefault(source, _Known()) if _is_name(source) else _Known()


def _is_name(source: Any) -> bool:
    name = original(source)
    return isinstance(name, str) and len(name) <= LONGEST_NAME

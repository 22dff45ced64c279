"""What is known of a run's pictures, so that no file is read twice for the same thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from PIL import Image

from vlmtune.ahead import ahead
from vlmtune.errors import ImageError
from vlmtune.images import Shrunk, examine, fingerprint, image_size, is_open, load_image, original
from vlmtune.records import DIGEST, Records, digest

T = TypeVar("T")
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
        if known := self._sizes.get(digest(repr(source))):
            return known[0], known[1]
        return self._noted_size(source, image_size(source))

    def fingerprint(self, source: Any) -> str:
        """The same for the same picture: `images.fingerprint`."""
        return self._known(source) or self._noted(source, fingerprint(source))

    def fingerprints(self, sources: Iterable[Any]) -> Iterator[str]:
        """Of each of these, several read at once, and no file twice."""
        for source, found in _each_once(fingerprint, sources, known=self._known):
            yield self._noted(source, found) if found else self.fingerprint(source)

    def faults(self, sources: Iterable[Any]) -> Iterator[ImageError | None]:
        """What is wrong with each of these, if anything: all are decoded, several at once, and no file is read twice."""
        faults: dict[Any, ImageError] = {}
        for source, found in _each_once(_examined, sources):
            if is_open(source):
                yield _fault(source)
            elif isinstance(found, tuple):
                self._noted_size(source, found[0])
                self._noted(source, found[1])
                yield None
            else:
                if found is not None and _is_name(source):
                    faults[source] = found
                yield found or faults.get(source)

    def _known(self, source: Any) -> str:
        known = self._fingerprints.get(digest(repr(source))) if _is_name(source) else None
        return known[0].hex() if known else ""

    def _noted(self, source: Any, found: str) -> str:
        if _is_name(source):
            self._fingerprints[digest(repr(source))] = (bytes.fromhex(found),)
        return found

    def _noted_size(self, source: Any, size: tuple[int, int]) -> tuple[int, int]:
        if _is_name(source):
            self._sizes[digest(repr(source))] = size
        return size


def _each_once(
    work: Callable[[Any], T], sources: Iterable[Any], *, known: Callable[[Any], object] = lambda _: False
) -> Iterator[tuple[Any, T | None]]:
    """Each with what comes of it in another thread; with None an open image, a known one, and a file that was here before."""
    begun = Records("")

    def asked() -> Iterator[tuple[Any, bool]]:
        for source in sources:
            name = digest(repr(source)) if _is_name(source) else None
            yield source, not (is_open(source) or known(source) or (name is not None and name in begun))
            if name is not None:
                begun[name] = ()

    def done(asked: tuple[Any, bool]) -> tuple[Any, T | None]:
        source, wanted = asked
        return source, work(source) if wanted else None

    return ahead(done, asked())


def _examined(source: Any) -> tuple[tuple[int, int], str] | ImageError:
    try:
        return examine(source)
    except ImageError as error:
        return error


def _fault(source: Any) -> ImageError | None:
    try:
        load_image(source)
    except ImageError as error:
        return error
    return None


def _is_name(source: Any) -> bool:
    name = original(source)
    return isinstance(name, str) and len(name) <= LONGEST_NAME

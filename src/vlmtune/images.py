"""A picture, from wherever it is, as the RGB pixels that a processor expects.

Pillow opens and decodes; what it does silently or with twenty kinds of exception is settled here: orientation, colour
modes, transparency, truncated files, decompression bombs. Pillow's own limit (`PIL.Image.MAX_IMAGE_PIXELS`) is the
limit here, and nothing of Pillow's global state is touched.
"""

import base64
import binascii
import hashlib
import re
import threading
import urllib.parse
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlmtune.errors import ImageError


@dataclass(frozen=True)
class Shrunk:
    """A picture that is made smaller when it is opened."""

    source: "Source"
    width: int
    height: int


Source = Image.Image | str | PathLike[str] | bytes | Shrunk  # str: a path, an http(s), file or data URL

TIMEOUT = 30  # seconds
PLUGINS = threading.Lock()  # Pillow looks for its formats when it meets a new one: a thread beside would miss some
SIDEWAYS = (5, 6, 7, 8)  # the EXIF orientations that swap width and height


def load_image(source: Source, *, root: Path | None = None) -> Image.Image:
    """The picture as a new RGB image, fully decoded and the right way up.

    Transparency is laid on white, of an animation the first frame is taken, 16-bit grey is scaled to 8 bit. Relative
    paths start at `root`. Raises `ImageError` for whatever cannot be found, opened or decoded, and for more pixels
    than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, Shrunk):
        return load_image(source.source, root=root).resize((source.width, source.height), Image.Resampling.LANCZOS)
    with _opened(source, root, verify=True) as image:
        image.load()
        return _rgb(_upright(image))


def examine(source: Source) -> tuple[tuple[int, int], str]:
    """`image_size` and `fingerprint` of a picture that is read once and decoded to see that it is whole.

    Where it is not, the error is `load_image`'s. A JPEG is decoded at an eighth of its edges: all of its data are looked at, in
    half of the time.

    Args:
        source: anything but an open image.

    """
    if isinstance(source, Shrunk):
        _, digest = examine(source.source)
        return (source.width, source.height), _of_shrunk(digest, source)
    name = describe_source(source)
    with _stream(source, None, name) as stream:
        content = stream.read()
    with _opened(content, None, verify=True, name=name) as image:
        size = _upright_size(image)
        image.draft(None, (1, 1))
        image.load()
        _rgb(_upright(image))
    return size, fingerprint(content)


def image_size(source: Source, *, root: Path | None = None) -> tuple[int, int]:
    """`(width, height)` of what `load_image` returns, from the file's header: no pixel is decoded."""
    if isinstance(source, Shrunk):
        return source.width, source.height
    with _opened(source, root) as image:
        return _upright_size(image)


def fingerprint(source: Source) -> str:
    """32 hex digits of the picture's bytes: the same for the same file, wherever it lies. No pixel is decoded.

    A `Shrunk` picture has another one than its original.
    """
    if isinstance(source, Shrunk):
        return _of_shrunk(fingerprint(source.source), source)
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, Image.Image):
        seen = (source.mode, source.size, source.info.get("transparency"), source.getpalette(), _lies(source))
        digest.update(repr(seen).encode())
        digest.update(source.tobytes())
        return digest.hexdigest()
    with _stream(source, None, describe_source(source)) as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _of_shrunk(digest: str, picture: Shrunk) -> str:
    seen = repr((digest, picture.width, picture.height)).encode()
    return hashlib.blake2b(seen, digest_size=16).hexdigest()


def original(source: Source) -> Source:
    """The picture before it is made smaller."""
    return original(source.source) if isinstance(source, Shrunk) else source


def is_open(source: Source) -> bool:
    """Whether it is an image of Pillow's, which may be in several rows, and which one thread at a time may load."""
    return isinstance(original(source), Image.Image)


def describe_source(source: object) -> str:
    """A few words for an error message: `picture 'a.jpg'`, `picture in a data URL`; never the bytes themselves."""
    if isinstance(source, Image.Image):
        return f"PIL image ({source.mode}, {source.width}×{source.height})"
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if isinstance(source, str) and source.startswith("data:"):
        return f"picture in a data URL of {len(source)} characters"
    if isinstance(source, str | PathLike):
        text = str(source)
        return f"picture {text!r}" if len(text) <= 120 else f"picture '{text[:60]}…{text[-40:]}'"
    return f"picture of type {type(source).__name__}"


@contextmanager
def _opened(source: Source, root: Path | None, *, verify: bool = False, name: str = "") -> Generator[Image.Image]:
    """The picture, opened but not decoded; what Pillow raises while it is in use leaves as an `ImageError`."""
    name = name or describe_source(source)
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with PLUGINS:
            Image.init()
        with _stream(source, root, name) as stream:
            if verify:  # checksums, which decoding skips; Pillow wants the file opened anew afterwards
                Image.open(stream).verify()
                stream.seek(0)
            with Image.open(stream) as image:
                _check_pixels(image.width * image.height, name)
                yield image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        _check_pixels(int(re.findall(r"\d+", str(error))[0]), name)  # Pillow tells the number only in its text
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in a format that Pillow reads.") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error ...
        raise ImageError(f"{name} is truncated or damaged: {str(error).rstrip('.')}.") from error


def _check_pixels(pixels: int, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ImageError(
            f"{name} has {pixels:,} pixels, the limit is {limit:,} (PIL.Image.MAX_IMAGE_PIXELS): "
            "it may be a decompression bomb."
        )


def _stream(source: object, root: Path | None, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        stream: BinaryIO = BytesIO(source)
    elif isinstance(source, str) and source.startswith("data:"):
        stream = BytesIO(_data_url(source, name))
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        stream = BytesIO(_download(source, name))
    elif isinstance(source, str) and source.startswith("file://"):
        stream = _file(Path(urllib.request.url2pathname(urllib.parse.urlsplit(source).path)), name)
    elif isinstance(source, str | PathLike):
        stream = _file(Path(root or "", source), name)
    else:
        raise ImageError(f"{name}: wanted a PIL image, path, URL, data URL or bytes.")
    if not stream.read(1):
        stream.close()
        raise ImageError(f"{name} is empty (zero bytes).")
    stream.seek(0)
    return stream


def _file(path: Path, name: str) -> BinaryIO:
    try:
        if path.is_fifo():  # would wait for a writer
            raise ImageError(f"{name} is a pipe, wanted a file.")
        return path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{name} is not there: no file {str(path.absolute())!r}.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory, wanted a file.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or error}.") from None


def _data_url(url: str, name: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{name} has no comma, wanted 'data:image/png;base64,...'.")
    data = urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode(data, validate=False) if header.endswith(";base64") else data
    except binascii.Error as error:
        raise ImageError(f"{name} is not valid base64: {error}.") from None


def _download(url: str, name: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vlmtune"})  # many sites refuse Python's own
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, HTTPException, ValueError) as error:
        raise ImageError(f"{name} cannot be downloaded: {error}. Offline, use files.") from None


def _lies(image: Image.Image) -> Any:
    """The EXIF orientation, as far as it can be read."""
    with suppress(Exception):  # as in _upright; and a PNG's own getexif would decode the pixels
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = image.format == "TIFF"  # by Pillow, the size at least
    return (height, width) if not turned and _lies(image) in SIDEWAYS else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # a damaged EXIF block is no reason to lose a good picture
        return ImageOps.exif_transpose(image)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow's own conversion clips everything above 255 to white."""
    grey = image.convert("I")
    _, highest = cast(tuple[int, int], grey.getextrema())
    sixteen = image.mode != "I" or highest > 255  # mode I may hold either
    return grey.point(lambda value: value * (1 / 257 if sixteen else 1)).convert("L")

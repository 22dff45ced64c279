"""Files of pictures, as bytes: right ones, and one whose header lies."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def png(mode: str = "RGB", size: tuple[int, int] = (30, 30), file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, file_format)
    return buffer.getvalue()


def noise(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(buffer, file_format)
    return buffer.getvalue()


def headed(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header promises so many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")

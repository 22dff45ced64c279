"""Pictures that a request names by address, fetched from public hosts only."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from vlmtune.images import describe_source
from vlmtune.messages import Message
from vlmtune.serve.limits import MOST_BYTES
from vlmtune.serve.request import WEB, RequestError

TIMEOUT = 30  # seconds, for one picture with all its redirects
REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)


def names_address(message: Mapping[str, Any]) -> bool:
    """Whether one of the message's pictures is somewhere on the web."""
    return any(_is_address(part) for part in message["content"])


def fetched(messages: Sequence[Message]) -> list[Message]:
    """The messages with the files of pictures in place of their addresses.

    Raises:
        RequestError: an address that leads nowhere or into a network that is not public, or more bytes than a request may have.

    """
    room = MOST_BYTES

    def with_file(part: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal room
        if not _is_address(part):
            return dict(part)
        found = fetch(part["image"], most=room)
        room -= len(found)
        return {**part, "image": found}

    return [{**message, "content": [with_file(part) for part in message["content"]]} for message in messages]


def fetch(url: str, *, most: int) -> bytes:
    """What lies at an address. Why it cannot be had is not told: it would be news of networks that the client cannot see.

    Args:
        url: http or https; redirects are followed, and checked like it.
        most: bytes.

    Raises:
        RequestError: it cannot be fetched, is not public, or is larger than `most`.

    """
    name, deadline = describe_source(url), time.monotonic() + TIMEOUT
    try:
        for _ in range(REDIRECTS + 1):
            found = _get(url, most, deadline)
            if isinstance(found, bytes):
                break
            url = found
        else:
            raise OSError("too many redirects")
    except (OSError, HTTPException, ValueError):
        raise RequestError(
            f"{name} cannot be fetched: wanted the address of a file on a public host.", field="messages"
        ) from None
    if len(found) > most:
        raise RequestError(f"the pictures to fetch have more than {MOST_BYTES >> 20} MiB.", field="messages")
    return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's: not this machine's, nor of a network behind it."""
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_global and not found.is_multicast


def _get(url: str, most: int, deadline: float) -> bytes | str:
    """What lies there, one byte more than `most` at the most; or the address that it has moved to."""
    parts = urlsplit(url)
    if not url.startswith(WEB) or parts.hostname is None:
        raise ValueError(f"{url} is no address")
    secure = parts.scheme == "https"
    connect = Secure if secure else Plain
    with closing(connect(parts.hostname, parts.port or (443 if secure else 80), timeout=TIMEOUT)) as connection:
        path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"User-Agent": "vlmtune"})  # many sites refuse clients without a name
        answer = connection.getresponse()
        if answer.status in MOVED:
            return urljoin(url, answer.headers["Location"] or "")
        if answer.status != 200:
            raise OSError(f"status {answer.status}")
        found = bytearray()
        while len(found) <= most and (piece := answer.read1(2**16)):
            found += piece
            if time.monotonic() > deadline:
                raise TimeoutError
        return bytes(found)


class Plain(HTTPConnection):
    def connect(self) -> None:
        self.sock = _connected(self.host, self.port)


class Secure(HTTPSConnection):
    def connect(self) -> None:
        self.sock = ssl.create_default_context().wrap_socket(_connected(self.host, self.port), server_hostname=self.host)


def _connected(host: str, port: int) -> socket.socket:
    """A connection to the very address that was checked: a name may be resolved to another the next moment."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(is_public(address) for address in addresses):
        raise OSError(f"{host} is not public")
    return socket.create_connection((addresses[0], port), TIMEOUT)


def _is_address(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image" and isinstance(part["image"], str) and part["image"].startswith(WEB)

"""What one request may cost, so that no client takes the server from the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlmtune.collator import pictures
from vlmtune.errors import ImageError
from vlmtune.images import image_size
from vlmtune.messages import Message as Turn
from vlmtune.serve.request import RequestError

MOST_BYTES = 64 * 2**20  # of a body
MOST_PICTURES = 64
MOST_PIXELS = 100_000_000  # of all pictures together: 300 MB as they are decoded


def check_pictures(messages: Sequence[Turn]) -> None:
    """Refuses more pictures or pixels than a request may have, told from headers: no picture is decoded."""
    sources = pictures({"messages": messages})
    if len(sources) > MOST_PICTURES:
        raise RequestError(f"the request has {len(sources)} pictures, the limit is {MOST_PICTURES}.", field="messages")
    try:
        pixels = sum(width * height for width, height in map(image_size, sources))
    except ImageError as error:
        raise RequestError(f"the request: {error}", field="messages") from None
    if pixels > MOST_PIXELS:
        raise RequestError(
            f"the pictures have {pixels:,} pixels together, the limit is {MOST_PIXELS:,}: send them smaller.", field="messages"
        )


class Door:
    """Lets requests in whose body is not too large, and stops the work for a client that has gone away.

    Args:
        app: what answers.
        too_large: the answer to a body of more than `MOST_BYTES`.

    """

    def __init__(self, app: ASGIApp, *, too_large: ASGIApp) -> None:
        self._app, self._too_large = app, too_large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, size, more = bytearray(), 0, True
        while more:  # to its end in any case: a client that is still sending reads no answer
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
            if size <= MOST_BYTES:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        if size > MOST_BYTES:
            await self._too_large(scope, receive, send)
        else:
            await self._answer(scope, bytes(body), receive, send)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        gone = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.ensure_future(self._app(scope, again, send))
        leaving = asyncio.ensure_future(receive())  # nothing comes behind the body but the end of the connection
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.set()
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering

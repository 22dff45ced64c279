"""Servers on loopback, in threads of the test's own process."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI
from PIL import Image

from vlmtune.serve.loading import load_served
from vlmtune.serve.server import build_app


@contextmanager
def served(directory: Path, **options: Any) -> Generator[OpenAI]:
    """A client of `vlmtune.serve` with this directory."""
    with running(build_app(load_served(directory), **options)) as url:
        yield OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


@contextmanager
def running(app: Any) -> Generator[str]:
    """The URL of an application."""
    listening = socket.create_server(("localhost", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://localhost:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(10)


def picture_url(picture: Path | Image.Image, kind: str = "PNG", **options: Any) -> str:
    """A picture as clients send it."""
    if isinstance(picture, Path):
        return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def seen_and_asked(url: str, text: str) -> dict[str, Any]:
    """A user's message: a picture, then a text."""
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}

"""A running server with OpenAI's interface, asked with rows as clients would send them."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from vlmtune.errors import ModelError
from vlmtune.evaluation import question
from vlmtune.images import load_image

Message = Mapping[str, Any]


class Server:
    """A running server with OpenAI's interface."""

    def __init__(self, url: str, model: str | None, served: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._timeout = timeout
        self._model = model or (served if served in self._listed() else None)
        self._tells_ids = True

    def ask(self, sample: Mapping[str, Any], most_tokens: int) -> dict[str, Any]:
        """The server's answer to a sample without its last turn, with the ids of its tokens if it tells them."""
        asked = question(sample)["messages"]
        body: dict[str, Any] = {"messages": [as_openai(message) for message in asked], "max_tokens": most_tokens}
        body |= {"temperature": 0} | ({"model": self._model} if self._model else {})
        body |= {"tools": asked[0]["tools"]} if "tools" in asked[0] else {}
        if not self._tells_ids:
            return self._call("/chat/completions", body)
        try:
            return self._call("/chat/completions", {**body, "return_token_ids": True})
        except RefusedError:
            answer = self._call("/chat/completions", body)  # raises where it was the row that is refused
            self._tells_ids = False  # transformers' own refuses fields that it does not know
            return answer

    def _listed(self) -> list[str]:
        try:
            return [entry["id"] for entry in self._call("/models").get("data", [])]
        except RefusedError:  # transformers' own lists the hub's cache, and fails where there is none
            return []

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        try:
            request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                found: Any = json.load(answer)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            raise RefusedError(f"{self.url}{path} answers with {error.code}: {said}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ModelError(f"no server answers at {self.url}: {reason}") from None
        except ValueError as error:  # an address that is none, or an answer that is no JSON
            raise ModelError(f"{self.url} is no server with OpenAI's interface: {error}") from None
        return found if isinstance(found, dict) else {}


class RefusedError(ModelError):
    """A server that answers, with an error."""


def as_openai(message: Message) -> dict[str, Any]:
    """A message as clients of OpenAI send it: pictures as data URLs, arguments of calls as JSON."""
    content: list[dict[str, Any]] = [_as_openai_part(part) for part in message["content"]]
    one_text = len(content) == 1 and content[0]["type"] == "text"
    sent = {name: value for name, value in message.items() if name not in ("content", "tools", "tool_calls")}
    sent["content"] = content[0]["text"] if one_text else content or ""
    if "tool_calls" in message:
        sent["tool_calls"] = [_as_openai_call(call) for call in message["tool_calls"]]
    return sent


def _as_openai_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _as_openai_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    return {"type": "image_url", "image_url": {"url": data_url(part["image"])}}


def data_url(source: Any) -> str:
    """A picture's own bytes where it is a file, so that the server decodes what training decoded; else its pixels as PNG."""
    if isinstance(source, str) and source.startswith("data:"):
        return source
    if isinstance(source, str) and not source.startswith(("http://", "https://", "file://")):
        source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        buffer = BytesIO()
        load_image(source).save(buffer, "PNG")
        source = buffer.getvalue()
    with Image.open(BytesIO(source)) as image:
        kind = Image.MIME.get(image.format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(source).decode()}"

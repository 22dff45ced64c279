"""Small runs to serve, and servers on loopback, in threads of the test's own process."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI
from PIL import Image

from vlmtune import Run, finetune
from vlmtune.serve.loading import load_served
from vlmtune.serve.server import build_app

# Qwen's way of writing turns and calls, in few words: what is trained here in seconds is one conversation
CALLING = """\
{%- if tools %}{{ '<|im_start|>system\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- for part in message.content %}{{ part.text }}{% endfor %}
            {%- for call in message.tool_calls %}
                {{- '<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {%- for part in message.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LOOK = {  # word for word as LangChain makes it of the class in clients.py
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks somewhere.",
        "parameters": {"properties": {"at": {"type": "string"}}, "required": ["at"], "type": "object"},
    },
}
LOOKED = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
RAIN = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [LOOKED]},
    {"role": "tool", "tool_call_id": "c1", "content": "dry"},
    {"role": "assistant", "content": "No."},
]


def tuned(model: Path, data: Path, output_dir: Path, steps: int, **changes: Any) -> Run:
    """A run on the colours, or on other rows."""
    recipe: dict[str, Any] = {
        "model": {"name": str(model), "quantization": "none", "dtype": "float32"},
        "data": {"source": str(data), "prompt": "Colour of {Product Name}?", "response": "{description}"},
        "lora": {"r": 8, "alpha": 16, "dropout": 0, "targets": "all-linear"},
        "doctor": False,
        "eval": {"max_new_tokens": 12},
        "train": {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": steps,
            "report_to": "none",
            "save_strategy": "no",
        },
    }
    return finetune(recipe, **changes)


def calling(model: Path, directory: Path, turns: Sequence[dict[str, Any]] = RAIN) -> Run:
    """A Qwen2-VL that knows one conversation by heart, `RAIN`, in which it calls the tool `LOOK`."""
    (directory / "rain.jsonl").write_text(json.dumps({"messages": turns, "tools": [LOOK]}) + "\n")
    (directory / "calling.jinja").write_text(CALLING)
    changes: dict[str, Any] = {"chat_template": str(directory / "calling.jinja"), "eval.max_new_tokens": 80}
    changes |= {"data.prompt": None, "data.response": None, "train.per_device_train_batch_size": 1, "lora.r": 32}
    return tuned(model, directory / "rain.jsonl", directory / "rain", 100, **changes)


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

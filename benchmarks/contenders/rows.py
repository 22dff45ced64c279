"""The rows as contenders built on TRL take them: typed parts, pictures decoded once, as the tutorial keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

IMAGE_TOKENS = {  # never trained on
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"],
    "mllama": ["<|image|>"],
    "pixtral": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
}


def read_rows(path: str) -> list[dict[str, Any]]:
    """`{"messages": [...], "images": [...]}`: typed parts, an image part being the place of the row's picture."""
    rows: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        images = [Image.open(Path(path).parent / image) for image in row["images"]]
        for image in images:
            image.load()
        rows.append({"messages": [_with_parts(message) for message in row["messages"]], "images": images})
    return rows


def with_pictures(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its picture inside the message, as the tutorial has it."""
    messages = [{**message, "content": [_filled(part, row) for part in message["content"]]} for message in row["messages"]]
    return {"messages": messages}


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """The trainer wants a `datasets.Dataset`; the rows stay what they are, their pictures decoded."""

    def samples(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [rows[position] for position in batch["position"]]
        return {key: [row[key] for row in found] for key in rows[0]}

    return Dataset.from_dict({"position": list(range(len(rows)))}).with_transform(samples)


def _with_parts(message: dict[str, str]) -> dict[str, Any]:
    _, mark, text = message["content"].rpartition("<image>")
    parts = [{"type": "image"}] if mark else []
    return {"role": message["role"], "content": [*parts, {"type": "text", "text": text}]}


def _filled(part: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "image": row["images"][0]} if part["type"] == "image" else part

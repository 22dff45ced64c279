"""Offline, on one thread, with small real models that are built once a session."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vlmtune-cache-")  # no features of earlier runs
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores spin instead of working

import pytest
import tiny
from PIL import Image

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
    "yellow": (230, 230, 10),
    "pink": (240, 120, 200),
    "grey": (120, 120, 120),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("qwen2_vl")`: the directory of a small random checkpoint of that kind (see tiny.py)."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind: str) -> Path:
        directory = root / kind
        return directory if directory.exists() else tiny.make_checkpoint(kind, directory)

    return make


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of eight rows: a picture of one colour, a `Product Name`, and the colour's name as `description`."""
    directory = tmp_path_factory.mktemp("colours")
    with (directory / "train.jsonl").open("w") as file:
        for number, (name, colour) in enumerate(COLOURS.items()):
            Image.new("RGB", (40 + number, 50), colour).save(directory / f"{name}.png")
            row = {"image": f"{name}.png", "Product Name": f"Thing {number % 2}", "description": name}
            file.write(json.dumps(row) + "\n")
    return directory / "train.jsonl"


@pytest.fixture
def recipe(checkpoint: Callable[[str], Path], colours: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`recipe("mllama", **{"lora.r": 4})`: a recipe that trains a small model on the colours in a second or two."""

    def make(kind: str = "qwen2_vl", **overrides: Any) -> dict[str, Any]:
        sees = kind != "text"
        values: dict[str, Any] = {
            "model": {"name": str(checkpoint(kind)), "quantization": "none", "dtype": "float32"},
            "data": {
                "source": str(colours),
                "prompt": "Colour of {Product Name}?",
                "response": "{description}",
                "images": "image" if sees else [],
            },
            "lora": {"r": 8, "alpha": 16, "dropout": 0, "targets": "all-linear"},
            "doctor": False,  # a second for each run; tests/test_doctor.py has it on
            "eval": {"max_new_tokens": 12, "samples": 2},
            "train": {
                "output_dir": str(tmp_path / "run"),
                "per_device_train_batch_size": 4,
                "learning_rate": 5e-3,
                "logging_steps": 1,
                "max_steps": 2,
            },
        }
        for key, value in overrides.items():
            section, _, name = key.partition(".")
            if name:
                values.setdefault(section, {})[name] = value
            else:
                values[key] = value
        return values

    return make

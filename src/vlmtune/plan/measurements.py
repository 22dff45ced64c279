"""What runs on a GPU really needed and took, beside what was predicted: kept for later plans."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.errors import RecipeError
from vlmtune.output import cache_directory
from vlmtune.plan.cards import find_card

NEEDED = {"card", "model", "reserved_gib", "predicted_reserved_gib", "step_seconds", "predicted_step_seconds"}


def card_here() -> str | None:
    """The name of this machine's first card, by which vlmtune knows it, or its size; None where there is none."""
    if "torch" not in sys.modules and not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        return None  # no driver: not worth the second that importing torch takes
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    try:
        return find_card(name).name
    except RecipeError:
        return f"{round(torch.cuda.mem_get_info()[1] / 2**30)}GB"


def measured() -> list[dict[str, Any]]:
    """All that was kept; a line that cannot be read or that lacks something is left out."""
    try:
        lines = _file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # written while the machine went down
            continue
        if isinstance(entry, dict) and entry.keys() >= NEEDED:
            entries.append(entry)
    return entries


def keep(entry: Mapping[str, Any]) -> None:
    """Adds what a run measured."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _file() -> Path:
    return cache_directory() / "measured.jsonl"

"""What planning keeps of each row is a few numbers, wherever its pictures' features go: memory is flat in the rows."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import make_processor

from vlmtune import MultimodalCollator, load_recipe
from vlmtune.batching import counted_rows, usable_rows
from vlmtune.features import FeatureStore
from vlmtune.packing import BatchPlan
from vlmtune.training import _dataset
from vlmtune.vision_cache import _distinct

PLAN: dict[str, Any] = {"rows_per_step": 16, "max_tokens": 4096, "packed": True, "epochs": 1, "seed": 0}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """3,000 rows with a picture each, all of 40 sizes; each has bytes of its own behind its end."""
    lines: list[str] = []
    for number in range(3000):
        name = f"{number}.bmp"
        if number < 40:
            Image.new("RGB", (28 + number, 56)).save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes((tmp_path / f"{number % 40}.bmp").read_bytes() + str(number).encode())
        asked = [{"role": "user", "content": f"<image>{number}?"}, {"role": "assistant", "content": "A table. " * 30}]
        lines.append(json.dumps({"messages": asked, "images": [name]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def kept() -> int:
    """Bytes that vlmtune's lines, or what they call, have asked for and not given back."""
    own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/vlmtune/*", all_frames=True)])
    return sum(trace.size for trace in own.traces)


def test_planning_keeps_less_than_600_bytes_of_a_row_its_caches_included(source: Path, tmp_path: Path) -> None:
    recipe = load_recipe({"model": {"name": "none"}, "data": {"source": str(source)}, "train": {"output_dir": str(tmp_path)}})
    collator = MultimodalCollator(make_processor("qwen2_vl"))
    collator.lengths(list(usable_rows(recipe, 0, check_images=False).train.select(range(40))))  # what is made once
    tracemalloc.start(5)  # frames: of a row that is read the JSON decoder has three
    try:
        before = kept()
        split, lengths = counted_rows(recipe, usable_rows(recipe, 0, check_images=False), collator)
        found, _ = _distinct(collator, [split.train])
        store = FeatureStore(tmp_path / "features")
        store.add(dict.fromkeys(found, torch.ones(1)))
        plan, dataset = BatchPlan(lengths, **PLAN), _dataset(split.train)
        count = len(found)
        del found, lengths  # nobody has them once training begins
        after = kept()
    finally:
        tracemalloc.stop()
    assert count == len(store) == len(plan.lengths) == len(dataset) == 3000
    assert (after - before) / 3000 < 600
    assert source.stat().st_size / 3000 > 300, "of text, which lies in a file"

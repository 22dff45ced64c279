"""Rows a second that the data loader delivers, by worker processes, with pixels and with kept features.

    OMP_NUM_THREADS=1 python benchmarks/loader.py

The reference row: a 500 × 500 JPEG and a product description, through the three families' real processors at their default
settings. A GPU that trains on the rows is not here: what counts is how many rows wait for it each second.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from model import make_checkpoint
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from vlmtune.album import Album
from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.features import FeatureStore

ROWS, BATCH, REPEATS = 96, 8, 3
WIDTH = {"qwen2_vl": 3584, "mllama": 4096, "pixtral": 5120}  # of the full-size models' hidden states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    table = Table(title=f"rows a second, medians of {REPEATS}; {os.cpu_count()} cores")
    names = [
        "family",
        *(f"{kind}, {workers} workers" for kind in ("pixels", "decoded before", "features") for workers in arguments.workers),
    ]
    for name in names:
        table.add_column(name, justify="right")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    with tempfile.TemporaryDirectory() as directory:
        rows = make_rows(Path(directory))
        for family in WIDTH:
            plain = MultimodalCollator(make_processor(family, Path(directory) / family))
            decoding = copy.copy(plain)
            decoding.album = Album()
            decoding.album.room = 2**30
            kept = plain.with_features(make_features(plain, family, rows))
            cells = [f"{rate(kind, rows, workers):,.0f}" for kind in (plain, decoding, kept) for workers in arguments.workers]
            table.add_row(family, *cells)
            lines.append("| " + " | ".join([family, *cells]) + " |")
    Console().print("\n".join(lines) if arguments.markdown else table)


def make_rows(directory: Path) -> list[dict[str, Any]]:
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        path = directory / f"{number}.jpg"
        noise = Image.effect_noise((125, 125), 60).resize((500, 500))
        Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)]).save(path, quality=90)
        words = " ".join(chance.choice(["light", "warm", "linen", "steel", "for", "a", "kitchen"]) for _ in range(60))
        asked = [{"type": "image", "image": str(path)}, {"type": "text", "text": "Describe the product."}]
        answer = [{"type": "text", "text": words}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    return rows


def make_processor(family: str, checkpoint: Path) -> Any:
    """The small benchmark model's processor and tokenizer, with the image processor's own default settings."""
    make_checkpoint(family, checkpoint)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor = type(processor.image_processor)()
    return processor


def make_features(collator: MultimodalCollator, family: str, rows: list[dict[str, Any]]) -> FeatureStore:
    """Features as large as the full-size model's."""
    store = FeatureStore()
    for row in rows:
        (source,) = pictures(row)
        tokens = collator.picture_tokens(source)
        shape = (4, 1601, WIDTH[family]) if family == "mllama" else (tokens, WIDTH[family])
        store.add({collator.album.fingerprint(source): torch.zeros(shape, dtype=torch.bfloat16)})
    return store


def rate(collator: MultimodalCollator, rows: list[dict[str, Any]], workers: int) -> float:
    """Rows a second after the first batches, which start the workers."""
    taken: list[float] = []
    for _ in range(REPEATS):
        loader = DataLoader(rows, batch_size=BATCH, collate_fn=collator, num_workers=workers)  # pyright: ignore
        batches = iter(loader)
        next(batches)
        started = time.perf_counter()
        count = sum(1 for _ in batches) * BATCH
        taken.append(count / (time.perf_counter() - started))
    return statistics.median(taken)


if __name__ == "__main__":
    main()

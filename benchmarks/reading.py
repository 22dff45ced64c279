"""Pictures a second that are checked, fingerprinted and made ready for the tower before training, by threads.

    OMP_NUM_THREADS=1 python benchmarks/reading.py

JPEGs of 500 × 500 pixels and of 12 megapixels, as a telephone takes them; Qwen2-VL's processor, which makes the large ones
smaller. In the place of the tower stands a GPU that takes so many milliseconds for a picture: the thread sleeps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loader import make_processor
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlmtune import ahead
from vlmtune.album import Album
from vlmtune.collator import MultimodalCollator
from vlmtune.data import Rows, find_bad_rows
from vlmtune.images import load_image
from vlmtune.vision_cache import _batches, _distinct

REPEATS = 3
KINDS = {"500 × 500": ((500, 500), 400, 20), "12 megapixels": ((4032, 3024), 48, 80)}  # size, pictures, ms in the tower
MAX_PIXELS = 1280 * 28 * 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    names = ["pictures", "what", "one after the other", *(f"{count} thread{'s' * (count > 1)}" for count in arguments.threads)]
    table = Table(title=f"pictures a second, medians of {REPEATS}")
    lines = ["| " + " | ".join(names) + " |", "|---|---" + "|---:" * (len(names) - 2) + "|"]
    for name in names:
        table.add_column(name)
    with tempfile.TemporaryDirectory() as directory:
        collator = MultimodalCollator(make_processor("qwen2_vl", Path(directory) / "model"))
        collator.processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": MAX_PIXELS}
        for kind, (size, count, milliseconds) in KINDS.items():
            rows = make_rows(Path(directory) / str(count), size, count)
            for what, (work, plain) in works(collator, rows, milliseconds / 1000).items():
                rates = [rate(plain, count, 1), *(rate(work, count, threads) for threads in arguments.threads)]
                cells = [kind, what, *(f"{each:,.1f}" for each in rates)]
                table.add_row(*cells)
                lines.append("| " + " | ".join(cells) + " |")
    Console().print("\n".join(lines) if arguments.markdown else table)


def make_rows(directory: Path, size: tuple[int, int], count: int) -> Rows:
    """So many rows of one picture, which the system keeps in its memory: no disk is measured."""
    directory.mkdir()
    noise = Image.effect_noise((size[0] // 4, size[1] // 4), 60).resize(size)
    Image.merge("RGB", [noise, noise.rotate(180), noise]).save(directory / "0.jpg", quality=90)
    picture = (directory / "0.jpg").read_bytes()
    for number in range(1, count):
        (directory / f"{number}.jpg").write_bytes(picture + str(number).encode())  # behind its end
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns, "images": [str(directory / f"{number}.jpg")]} for number in range(count)]
    return Rows(rows, "rows", Path(), {}, range(count))


def works(collator: MultimodalCollator, rows: Rows, in_tower: float) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What is done to all pictures: as vlmtune does it, and one after the other."""
    sources = [row["images"][0] for row in rows.content]
    found, _ = _distinct(collator, [rows])

    def fill() -> None:
        for _ in _batches(collator, found, range(len(found)), on_gpu=True):
            time.sleep(in_tower * collator.family.pictures_at_once)

    def fill_plainly() -> None:
        at_once = collator.family.pictures_at_once
        for start in range(0, len(sources), at_once):
            collator.pictures(sources[start : start + at_once])
            time.sleep(in_tower * at_once)

    def check_plainly() -> None:
        for source in sources:
            load_image(source)

    return {
        "checked": (lambda: find_bad_rows(rows), check_plainly),
        "fingerprinted": (
            lambda: list(Album().fingerprints(sources)),
            lambda: [Album().fingerprint(source) for source in sources],
        ),
        f"encoded, {in_tower * 1000:.0f} ms each in the tower": (fill, fill_plainly),
    }


def rate(work: Callable[[], Any], count: int, threads: int) -> float:
    """Pictures a second."""
    taken: list[float] = []
    ahead.threads = lambda: threads
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return count / statistics.median(taken)


if __name__ == "__main__":
    main()

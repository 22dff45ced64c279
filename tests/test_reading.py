"""Rows of a file come back as they are, and take little memory until they are asked for."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as any_

from vlmtune.reading import TextRows, read_rows

TEXT = any_.text()
VALUE = any_.recursive(
    any_.none() | any_.booleans() | any_.integers() | any_.floats(allow_nan=False) | TEXT,
    lambda inner: any_.lists(inner, max_size=3) | any_.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = any_.lists(any_.dictionaries(TEXT, VALUE, max_size=3), min_size=1, max_size=5)
ONE_PLACE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONE_PLACE
@given(rows=ROWS, escaped=any_.booleans())
def test_rows_of_json_come_back_as_they_are(tmp_path: Path, rows: list[dict[str, Any]], escaped: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "rows.json").write_text(f"[{','.join(lines)}]", encoding="utf-8")
    for name in ("rows.jsonl", "rows.json"):
        assert list(read_rows(str(tmp_path / name), "train")) == rows


@ONE_PLACE
@given(cells=any_.lists(any_.text(any_.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=5))
def test_cells_of_a_table_come_back_as_they_are(tmp_path: Path, cells: list[str]) -> None:
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["name"], *([cell] for cell in cells)])
    assert [row["name"] for row in read_rows(str(tmp_path / "rows.csv"), "train")] == cells


def test_rows_take_a_few_bytes_more_than_their_file(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A chair."}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "images": [f"{n}.png"]}) + "\n" for n in range(20_000)))
    tracemalloc.start()
    try:
        rows = read_rows(str(path), "train")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 20_000
    assert kept < 9 / 8 * path.stat().st_size + 20 * len(rows)  # a bytearray has some room to grow


def test_a_row_can_be_changed_by_whoever_asked_for_it() -> None:
    rows = TextRows(['{"a": [1]}'])
    rows[0]["a"].append(2)  # pyright: ignore[reportIndexIssue]
    assert rows[-1] == {"a": [1]}

"""Rows of a file come back as they are, and take little memory until they are asked for."""

from __future__ import annotations

import csv
import json
import os
import pickle
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as any_

from vlmtune import DatasetError
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


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_of_a_file_take_no_memory_but_their_places(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    asked = [f"Picture {number}: {'what is it? ' * 20}" for number in range(20_000)]
    lines = ["q", *asked] if kind == "csv" else [json.dumps({"q": text}) for text in asked]
    path.write_text("\n".join(lines) + "\n")
    tracemalloc.start()
    try:
        rows = read_rows(str(path), "train")
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row["q"] for row in rows] == asked
    assert kept / len(rows) < 10
    assert most - kept < 1e6, "of 5 MB"


def test_rows_are_read_by_a_forked_process_and_by_one_that_gets_them_pickled() -> None:
    rows = TextRows(json.dumps({"a": number}) for number in range(1000))
    wanted = [{"a": number} for number in range(1000)]
    assert list(pickle.loads(pickle.dumps(rows))) == wanted
    assert list(pickle.loads(pickle.dumps(TextRows([])))) == []
    child = os.fork()
    if not child:
        os._exit(0 if list(rows) == wanted else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_byte_that_is_no_text_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    for name, line in (("rows.jsonl", b'{"q": "what?"}\n'), ("rows.csv", b"what?\n")):
        path = tmp_path / name
        path.write_bytes(line * 50_000 + b"\xff\n")
        with pytest.raises(DatasetError, match=f"{name} is not UTF-8: invalid start byte at byte {50_000 * len(line)}"):
            read_rows(str(path), "train")


def test_a_row_can_be_changed_by_whoever_asked_for_it() -> None:
    rows = TextRows(['{"a": [1]}'])
    rows[0]["a"].append(2)  # pyright: ignore[reportIndexIssue]
    assert rows[-1] == {"a": [1]}


def test_rows_for_which_there_is_no_room_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(DatasetError, match=r"cannot be laid into a temporary file: .*\. TMPDIR names a directory"):
        TextRows(['{"a": 1}'])

"""The demo, as `make demo` runs it: a model that is shown to learn, and shown to look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune import finetune

ROOT = Path(__file__).parents[1]


def test_the_demo_learns_from_pictures_it_has_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    metrics = finetune("recipes/demo.yaml", **{"train.output_dir": str(tmp_path / "demo")}).metrics
    assert metrics["doctor_seconds"] <= 20
    assert metrics["base_accuracy"] <= 0.2
    assert metrics["tuned_accuracy"] >= 0.9
    assert metrics["blank_accuracy"] <= 0.25  # a guess among the products of a category
    assert abs(metrics["merged_accuracy"] - metrics["tuned_accuracy"]) <= 0.05  # tuned on NF4, merged into 16 bit


def test_no_held_out_drawing_is_among_those_to_train_on() -> None:
    def pictures(table: str) -> set[bytes]:
        folder = ROOT / "recipes" / "demo"
        rows = map(json.loads, (folder / table).read_text().splitlines())
        return {(folder / row["image"]).read_bytes() for row in rows}

    assert len(pictures("test.jsonl")) >= 60
    assert not pictures("train.jsonl") & pictures("test.jsonl")

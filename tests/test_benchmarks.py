"""Benchmarks run from end to end, on next to nothing: they look into vlmtune from outside, and what they look for may move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_growth(tmp_path: Path) -> None:
    run("growth.py", "--rows", 240, "--steps", 12, "--out", tmp_path)
    found = json.loads((tmp_path / "growth.json").read_text())["rows"]["240"]
    assert found.keys() == {"memory", "disk", "found"}
    parts = {"reading rows", "counting tokens", "looking through pictures", "planning 3 epochs", "training"}
    assert all(parts <= one["parts"].keys() for one in found.values())


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "pixtral"])
def test_speed(tmp_path: Path, family: str) -> None:
    run("speed.py", "--family", family, "--rows", 16, "--epochs", 1, "--repeats", 1, "--out", tmp_path)
    runs = json.loads((tmp_path / "speed.json").read_text())["families"][family]["runs"]
    assert runs.keys() == {"tutorial", "trl", "trl-answers", "vlmtune", "vlmtune-answers"}
    assert not any("error" in found for one in runs.values() for found in one)
    assert (tmp_path / "performance.png").exists()


def test_step() -> None:
    assert "matrix products" in run("step.py")


def test_loader() -> None:
    assert "pixtral" in run("loader.py", "--workers", 0, "--markdown")


def test_reading() -> None:
    assert "12 megapixels" in run("reading.py", "--threads", 1, "--markdown")


def test_activations() -> None:
    table = run("activations.py")
    assert "Pixtral-12B" in table
    assert "a quarter" in table


def test_head() -> None:
    assert "times faster" in run("head.py")


def test_shapes() -> None:
    assert "a new shape, ms" in run("shapes.py")


def test_patches() -> None:
    assert "times faster" in run("patches.py")


def test_prefixes() -> None:
    assert "times faster" in run("prefixes.py")

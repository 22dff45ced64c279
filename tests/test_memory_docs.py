"""docs/memory.md has the tables that its commands make."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"


def cells(mark: str) -> list[list[str]]:
    """The lines of the tables that stand at a mark, without headers and rules."""
    (text,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [line for line in lines if line[0] not in ("---", "picture", "source", "setting")]


def test_page_about_memory_has_every_setting_of_the_three_models():
    lines = cells("tables")
    # (four sizes of two models and one of Llama-3.2-Vision) × two micro-batches × (three ways of vlmtune, and two others)
    assert len(lines) == (4 + 1 + 4) * 2 * (3 + 2)
    assert {line[1] for line in lines} == {"vlmtune", "TRL 1.16", "the tutorial, 2024"}
    assert all(float(line[4]) > 5 for line in lines)


def test_every_published_figure_that_is_more_than_10_percent_off_is_explained():
    lines = cells("anchors")
    assert len(lines) >= 10
    assert [line for line in lines if abs(float(line[5].rstrip("%"))) > 10 and not line[6]] == []


def test_page_about_memory_shows_30_real_runs_that_were_met():
    errors = sorted(abs(float(line[4].rstrip("%"))) for line in cells("validation"))
    assert len(errors) >= 30
    assert errors[-1] <= 0.5
    assert errors[len(errors) // 2] <= 0.05


def printed(script: str, only: str) -> list[list[str]]:
    """The lines of a table that a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--only", only]
    command += ["--markdown"] if script == "anchors.py" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in done.stdout.splitlines() if re.match(r"\| (?!---|picture|source)", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_published_figure_is_simulated_as_the_page_says():
    (line,) = printed("anchors.py", "trl#4347")
    assert line in cells("anchors")


@pytest.mark.slow
def test_table_of_llama_vision_is_as_the_page_says():
    lines = printed("memory_table.py", "llama")
    assert len(lines) == 10
    assert all(line in cells("tables") for line in lines)

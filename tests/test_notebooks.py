"""The notebooks run from end to end: the quickstart on the demo, the tutorial's road on a small checkpoint."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
Execute = Callable[..., list[Any]]

# Lines of Python in philschmid.de/fine-tune-multimodal-llms-with-trl (2024), without its `%pip` cells and its bonus chapter,
# blank lines and comments aside, after `ruff format` with these notebooks' settings and `skip-magic-trailing-comma`.
TUTORIAL_LINES = 167


def read(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """`execute("quickstart", folder, "x = 1")`: the outputs of a notebook run in a folder, with a cell after its parameters."""
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")  # this interpreter, whatever kernels the machine has
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # else plots might open windows

    def run(name: str, folder: Path, parameters: str) -> list[Any]:
        notebook = read(name)
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        notebook.cells.insert(tags.index(["parameters"]) + 1, nbformat.v4.new_code_cell(parameters))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute()
        return [output for cell in notebook.cells for output in cell.get("outputs", [])]

    return run


def pictures_in_tables(outputs: list[Any]) -> int:
    """Pictures in the last table that a notebook shows."""
    tables = [output.data["text/html"] for output in outputs if "<img" in output.get("data", {}).get("text/html", "")]
    return tables[-1].count('<img src="data:image/png;base64,') if tables else 0


def test_the_quickstart_learns_and_shows_it_with_pictures(execute: Execute, tmp_path: Path) -> None:
    fewer = {"train.output_dir": str(tmp_path / "run"), "train.num_train_epochs": 1, "eval.accuracy": False}
    outputs = execute("quickstart", ROOT / "notebooks", f"overrides |= {fewer}")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["last_loss"] < 0.5 * metrics["first_loss"]
    assert pictures_in_tables(outputs) == 6
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()
    printed = [output.text for output in outputs if output.get("name") == "stdout"]
    assert printed[-1].strip()  # the merged model's answer


def test_the_quickstart_is_stored_with_pictures_and_without_noise() -> None:
    outputs = [output for cell in read("quickstart").cells for output in cell.get("outputs", [])]
    assert pictures_in_tables(outputs) == 6
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3  # rows, loss, a picture asked about
    assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in outputs)
    assert (ROOT / "notebooks" / "quickstart.ipynb").stat().st_size < 1_500_000


def test_the_tutorials_road_takes_half_as_many_lines() -> None:
    source = "\n".join(code(read("qwen2vl_amazon")))
    ast.parse(source)
    lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= TUTORIAL_LINES / 2


def test_the_tutorials_road_runs_on_a_data_set_of_the_same_layout(
    execute: Execute, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    toys = tmp_path / "toys"
    toys.mkdir()
    picture = tmp_path / "unseen.png"
    Image.new("RGB", (60, 50), "purple").save(picture)
    row = {"image": str(picture), "Product Name": "Kurio Watch", "Category": "Toys", "description": "Fun & safe!"}
    columns = datasets.Features({name: datasets.Image() if name == "image" else datasets.Value("string") for name in row})
    datasets.Dataset.from_list([row] * 4, features=columns).to_parquet(toys / "train-00000-of-00001.parquet")
    small = {
        "model.name": str(checkpoint("qwen2_vl")),
        "model.quantization": "none",
        "model.dtype": "float32",
        "data.source": str(toys),
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 2,
        "train.logging_steps": 1,
        "train.bf16": False,  # both need a GPU
        "train.tf32": False,
    }
    outputs = execute("qwen2vl_amazon", ROOT, f"overrides |= {small}\nunseen['image'] = {str(picture)!r}")
    assert pictures_in_tables(outputs) == 1
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()
    assert not any(cell.get("outputs") for cell in read("qwen2vl_amazon").cells)  # stored without any: it needs a GPU

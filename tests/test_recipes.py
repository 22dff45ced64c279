"""The recipes in recipes/: they load, say what their sources say, and run on small models and data of the hub's layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from vlmtune import Recipe, finetune, format_messages, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
AMAZON = {"qwen2vl_amazon": "qwen2_vl", "llama32_vision_amazon": "mllama", "pixtral_amazon": "pixtral"}
PRODUCT = {
    "Uniq Id": "002e4642d3ead5ecdc9958ce0b3a5a79",
    "Product Name": "Kurio Glow Smartwatch",
    "Category": "Toys & Games | Kids' Electronics",
    "Selling Price": "$31.30",
    "description": "A smartwatch for kids, in blue.",
}


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as philschmid/amazon-product-descriptions-vlm on the hub: Parquet, pictures inside, columns to spare."""
    directory = tmp_path_factory.mktemp("products")
    rows = [{"image": Image.new("RGB", (50, 50), (30 * number, 90, 200)), **PRODUCT} for number in range(6)]
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("string") for name in PRODUCT}})
    (directory / "data").mkdir()
    datasets.Dataset.from_list(rows, features).to_parquet(directory / "data" / "train-00000-of-00001.parquet")
    return directory


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as yahma/alpaca-cleaned on the hub: one JSON array; the last row is longer than 256 tokens."""
    directory = tmp_path_factory.mktemp("instructions")
    rows = [{"output": f"{n + n}", "input": "", "instruction": f"Double {n}."} for n in range(11)]
    rows.append({"output": "one, " * 60, "input": "", "instruction": "Count to sixty."})
    (directory / "alpaca_data_cleaned.json").write_text(json.dumps(rows))
    return directory


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_loads_and_fits_on_a_page(path: Path):
    assert isinstance(load_recipe(path), Recipe)
    assert len(path.read_text().splitlines()) <= 40


MEMORY = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")  # what a card has room for


@pytest.mark.parametrize("name", AMAZON)
def test_amazon_recipes_have_the_figures_of_the_tutorial(name: str):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.model.quantization == "nf4"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0.05)
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    assert recipe.train_on_inputs
    expected = {
        "num_train_epochs": 3,
        "optim": "adamw_torch_fused",
        "logging_steps": 5,
        "save_strategy": "epoch",
        "learning_rate": 2e-4,
        "bf16": True,
        "tf32": True,
        "max_grad_norm": 0.3,
        "warmup_steps": 0.03,
        "lr_scheduler_type": "constant",
        "report_to": "tensorboard",
        "output_dir": f"runs/{name}",
    }
    assert recipe.train["per_device_train_batch_size"] * recipe.train["gradient_accumulation_steps"] == 32
    assert {key: value for key, value in recipe.train.items() if key not in MEMORY} == expected


def test_amazon_recipes_differ_in_model_place_of_the_picture_memory_and_output_only():
    reference, *others = (load_recipe(RECIPES / f"{name}.yaml").model_dump() for name in AMAZON)
    for other in others:
        assert other["data"].pop("prompt") + "<image>" == reference["data"]["prompt"]
        other["data"]["prompt"] = reference["data"]["prompt"]
        other["model"]["name"] = reference["model"]["name"]
        for key in ("output_dir", *MEMORY):
            other["train"][key] = reference["train"][key]
        assert other == reference


def test_alpaca_recipe_has_the_figures_of_alpaca_lora():
    recipe = load_recipe(RECIPES / "alpaca_lora.yaml")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0.05)
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    assert (recipe.model.quantization, recipe.model.dtype) == ("int8", "float16")
    assert recipe.data.eval_rows == 2000
    assert recipe.train_on_inputs
    assert recipe.train["learning_rate"] == 3e-4
    assert (recipe.train["max_length"], recipe.on_too_long) == (256, "drop")
    assert recipe.train["num_train_epochs"] == 1


@pytest.mark.parametrize(("name", "rows"), [*((name, 4 * 8) for name in AMAZON), ("alpaca_lora", 8 * 16)])
def test_rows_per_step(name: str, rows: int):
    train = load_recipe(RECIPES / f"{name}.yaml").train
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == rows


def test_amazon_prompt_reads_as_the_tutorial_s():
    data = load_recipe(RECIPES / "qwen2vl_amazon.yaml").data
    row = {"image": "watch.jpg", **PRODUCT}
    system, user, assistant = format_messages(row, system=data.system, prompt=data.prompt, response=data.response)
    assert system["content"] == [{"type": "text", "text": "You are an expert product description writer for Amazon."}]
    text, picture = user["content"]  # first the text, then the picture
    assert text["text"].endswith("\n\n##PRODUCT NAME##: Kurio Glow Smartwatch\n##CATEGORY##: Toys & Games | Kids' Electronics")
    assert picture == {"type": "image", "image": "watch.jpg"}
    assert assistant["content"] == [{"type": "text", "text": "A smartwatch for kids, in blue."}]


@pytest.mark.parametrize(("name", "kind"), AMAZON.items())
def test_amazon_recipe_runs_on_a_small_model(
    name: str, kind: str, checkpoint: Callable[[str], Path], products: Path, tmp_path: Path
):
    small: dict[str, Any] = {"model.name": str(checkpoint(kind)), "data.source": str(products)}
    cpu = {"train.max_steps": 1, "train.tf32": False, "train.output_dir": str(tmp_path / "run")}
    run = finetune(RECIPES / f"{name}.yaml", **small, **cpu)
    assert run.family.name == kind
    assert run.metrics["train_rows"] == 6
    assert run.metrics["steps"] == 1
    assert (run.adapter_dir / "adapter_model.safetensors").exists()


def test_alpaca_recipe_runs_on_a_small_model_and_leaves_out_the_row_that_is_too_long(
    checkpoint: Callable[[str], Path], instructions: Path, tmp_path: Path
):
    small = {"model.name": str(checkpoint("text")), "data.source": str(instructions), "data.eval_rows": 2}
    fast = {"eval.max_new_tokens": 4, "train.max_steps": 1, "train.output_dir": str(tmp_path / "run")}
    run = finetune(RECIPES / "alpaca_lora.yaml", **small, **fast)
    assert run.family.name == "text"
    assert run.metrics["train_rows"] + run.metrics["held_out_rows"] == 11
    (reason,) = run.metrics["dropped_rows"].values()
    assert "457 tokens" in reason

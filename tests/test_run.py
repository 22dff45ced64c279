"""What a run leaves behind and what it can be asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoProcessor

from vlmtune import MultimodalCollator, finetune, load_recipe
from vlmtune.families.qwen2_vl import FAMILY
from vlmtune.result import Run

MakeRecipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(checkpoint: Callable[[str], Path], colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune(
        {
            "model": {"name": str(checkpoint("qwen2_vl")), "quantization": "nf4", "dtype": "float32"},
            "data": {
                "source": str(colours),
                "prompt": "Colour of {Product Name}?",
                "response": "{description}",
                "images": "image",
                "eval_rows": 2,
            },
            "lora": {"dropout": 0, "targets": "all-linear"},
            "eval": {"max_new_tokens": 8, "samples": 2, "accuracy": True},
            "merge": True,
            "train": {
                "output_dir": str(tmp_path_factory.mktemp("out") / "run"),
                "per_device_train_batch_size": 2,
                "num_train_epochs": 2,
                "logging_steps": 1,
            },
        }
    )


def test_the_adapter_directory_holds_all_that_is_needed_to_reproduce_and_to_serve(run: Run) -> None:
    files = {path.name for path in run.adapter_dir.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "chat_template.jinja"} <= files
    assert {"tokenizer.json", "generation_config.json", "recipe.yaml", "metrics.json", "versions.json", "runs"} <= files
    assert load_recipe(run.adapter_dir / "recipe.yaml") == run.recipe
    assert json.loads((run.adapter_dir / "versions.json").read_text())["torch"] == torch.__version__.partition("+")[0]
    assert not list(run.adapter_dir.parent.glob(".*.partial"))


def test_the_saved_processor_renders_what_was_trained(run: Run) -> None:
    processor = AutoProcessor.from_pretrained(run.adapter_dir)
    again = MultimodalCollator(processor)([run.train_rows[0]])
    before = run.prompter([run.train_rows[0]])
    assert torch.equal(again["input_ids"], before["input_ids"])
    assert torch.equal(again["labels"], before["labels"])


def test_metrics_count_every_row_and_hold_the_four_accuracies(run: Run) -> None:
    metrics = json.loads((run.adapter_dir / "metrics.json").read_text())
    assert metrics["train_rows"] + metrics["held_out_rows"] + len(metrics["dropped_rows"]) == 8
    assert metrics["steps"] == 6
    for name in ("base", "tuned", "blank", "merged"):
        assert 0 <= metrics[f"{name}_accuracy"] <= 1


def test_tensorboard_has_the_curves_and_the_held_out_answers_with_pictures(run: Run) -> None:
    events = EventAccumulator(str(run.adapter_dir / "runs"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    for curve in ("train/loss", "train/learning_rate", "train/mean_token_accuracy", "train/tokens_per_second", "eval/loss"):
        assert curve in tags["scalars"]
    assert "held out/1, picture 1" in tags["images"]
    assert "held out/1/text_summary" in tags["tensors"]
    assert len(events.Scalars("train/loss")) >= 6


def test_a_run_answers_rows_of_the_data_set(run: Run, colours: Path) -> None:
    row = {"image": str(colours.parent / "red.png"), "Product Name": "Thing 0"}
    assert isinstance(run.generate(row), str)
    assert run.generate(run.train_rows[0]) == run.generate(run.train_rows.raw(0))


def test_a_comparison_shows_pictures_in_html_and_is_markdown_elsewhere(run: Run) -> None:
    table = run.compare()
    assert len(table.rows) == 2
    assert table.rows[0].expected in table.to_html()
    assert table._repr_html_().count("data:image/png;base64,") == 2
    lines = str(table).splitlines()
    assert lines[0] == "| picture | prompt | expected | base | tuned |"
    assert len(lines) == 4
    markdown = (run.adapter_dir / "comparison.md").read_text()
    assert "![](comparison/1-1.png)" in markdown
    assert (run.adapter_dir / "comparison" / "1-1.png").exists()


def test_base_answers_are_those_of_the_untuned_model(run: Run) -> None:
    sample = run.train_rows[0]
    with run.model.disable_adapter():
        untuned = run.generate(sample)
    assert run.compare([sample]).rows[0].base == untuned


def test_the_merged_model_stands_in_the_run(run: Run) -> None:
    assert (run.adapter_dir / "merged" / "model.safetensors").exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(recipe: MakeRecipe, tmp_path: Path) -> None:
    def last_loss(name: str, seed: int) -> float:
        settings = {"train.seed": seed, "train.output_dir": str(tmp_path / name), "lora.dropout": 0.1}
        return finetune(recipe(**settings)).history[1]["loss"]

    assert last_loss("one", 1) == last_loss("two", 1) != last_loss("three", 2)


def test_training_stops_early_where_evaluation_no_longer_improves(recipe: MakeRecipe) -> None:
    settings = {"data.eval_rows": 2, "eval.early_stop_patience": 1, "train.learning_rate": 0.5, "train.max_steps": 40}
    run = finetune(recipe(**settings))
    assert run.trainer.state.global_step < 40
    best = min(entry["eval_loss"] for entry in run.history if "eval_loss" in entry)
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-4)  # and the best checkpoint is kept


def test_any_callable_can_be_the_collator(recipe: MakeRecipe) -> None:
    processor = AutoProcessor.from_pretrained(recipe()["model"]["name"])
    own = MultimodalCollator(processor, FAMILY)
    names: list[str] = []

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        names.extend(row["name"] for row in rows)
        return own(rows)

    finetune(recipe(), collator=collate)
    assert "row 1 of train.jsonl" in names


def test_overrides_are_keywords_by_dotted_key(recipe: MakeRecipe) -> None:
    run = finetune(recipe(), **{"train.max_steps": 1, "lora.r": 2})
    assert run.metrics["steps"] == 1
    assert run.recipe.lora.r == 2


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "smolvlm", "text"])
def test_other_models_learn_through_the_generic_and_the_text_family(recipe: MakeRecipe, kind: str, tmp_path: Path) -> None:
    run = finetune(recipe(kind, **{"train.max_steps": 20, "train.save_strategy": "no", "merge": True}))
    losses = [entry["loss"] for entry in run.history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert run.metrics["merge_largest_difference"] <= 1e-4
    assert run.family.name == ("text" if kind == "text" else "generic")


@pytest.mark.parametrize(("kind", "tokens"), [("qwen2_vl", 4), ("pixtral", 2 * 3)])
def test_max_pixels_bounds_the_pictures_and_is_saved(recipe: MakeRecipe, kind: str, tokens: int) -> None:
    pixels = 56 * 56 if kind == "qwen2_vl" else 32 * 32
    run = finetune(recipe(kind, **{"images.max_pixels": pixels, "train.max_steps": 1}))
    saved = MultimodalCollator(AutoProcessor.from_pretrained(run.adapter_dir))
    picture = saved.processor.image_token_id
    assert (saved([run.train_rows[0]])["input_ids"] == picture).sum() <= tokens

"""Each family learns, is written, read back, resumed, and trained by two processes, and nothing changes on the way."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from processes import in_two_processes
from tiny import KINDS

from vlmtune import DatasetError, ModelError, RecipeError, finetune, load_recipe
from vlmtune.console import console
from vlmtune.merge import merge_adapter
from vlmtune.model import load_base
from vlmtune.result import Run
from vlmtune.trainer import Trainer

MakeRecipe = Callable[..., dict[str, Any]]
QUANTIZATIONS = ("none", "nf4")


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.history if "loss" in entry]


def logits(model: Any, run: Run) -> torch.Tensor:
    batch = run.prompter([run.train_rows[position] for position in range(4)])
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_the_adapter_reloads_and_the_merged_model_answers_the_same(
    recipe: MakeRecipe, tmp_path: Path, kind: str, quantization: str
) -> None:
    run = finetune(recipe(kind, **{"model.quantization": quantization, "train.max_steps": 25, "train.save_strategy": "no"}))
    assert losses(run)[-1] < 0.6 * losses(run)[0]

    base = load_base(run.recipe.model, run.family)
    reloaded = PeftModel.from_pretrained(base, str(run.adapter_dir))
    assert torch.equal(logits(reloaded, run), logits(run.model, run))

    report = merge_adapter(run.adapter_dir, tmp_path / "merged")
    assert report.largest_difference <= 1e-4
    assert report.modules == sum("lora_A" in name for name, _ in run.model.named_parameters())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_counting_and_ends_like_an_uninterrupted_one(
    recipe: MakeRecipe, tmp_path: Path, kind: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model.quantization": quantization,
        "lora.dropout": 0.1,  # the random state must come back too
        "train.max_steps": 6,
        "train.save_strategy": "steps",
        "train.save_steps": 3,  # in the middle of an epoch, whose rows are packed
    }
    whole = finetune(recipe(kind, **settings, **{"train.output_dir": str(tmp_path / "whole")}))
    stopped = recipe(kind, **settings, **{"train.output_dir": str(tmp_path / "stopped")})
    interrupt(monkeypatch, lambda: finetune(stopped), after=4)
    resumed = finetune(stopped, resume=True)
    assert resumed.trainer.state.global_step == 6
    assert losses(resumed) == losses(whole)
    assert torch.equal(logits(resumed.model, whole), logits(whole.model, whole))


def interrupt(monkeypatch: pytest.MonkeyPatch, train: Callable[[], Run], after: int) -> None:
    """Trains until the user presses Ctrl-C after some micro-batches."""
    taken, step = itertools.count(), Trainer.training_step

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(taken) == after:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.setattr(Trainer, "training_step", step)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_at_the_loss_of_one(recipe: MakeRecipe, tmp_path: Path, kind: str, quantization: str) -> None:
    settings = {"model.quantization": quantization, "train.max_steps": 4, "train.save_strategy": "no"}
    one = finetune(recipe(kind, **settings, **{"train.output_dir": str(tmp_path / "one")}))
    two = recipe(kind, **settings, **{"train.output_dir": str(tmp_path / "two"), "train.per_device_train_batch_size": 2})
    (tmp_path / "two.yaml").write_text(load_recipe(two).to_yaml())
    done = in_two_processes("-m", "vlmtune.run", tmp_path / "two.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "two" / "history.json").read_text())["log"]
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(losses(one), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_nf4_as_on_a_gpu_resumes_exactly_and_merges(
    recipe: MakeRecipe, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model.quantization": "nf4", "model.dtype": "bfloat16", "train.max_steps": 4, "train.save_strategy": "steps"}
    settings |= {"train.save_steps": 1, "merge": True, "lora.dropout": 0.1}
    whole = finetune(recipe(kind, **settings, **{"train.output_dir": str(tmp_path / "whole")}))
    stopped = recipe(kind, **settings, **{"train.output_dir": str(tmp_path / "stopped")})
    interrupt(monkeypatch, lambda: finetune(stopped), after=3)
    resumed = finetune(stopped, resume=True)
    assert losses(resumed) == losses(whole)
    assert {p.dtype for p in whole.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert whole.metrics["merge_largest_difference"] <= 1e-4  # the checkpoint's own dtype is float32


@pytest.mark.parametrize("kind", KINDS)
def test_under_the_trainer_too_the_tower_has_no_gradient_hook(recipe: MakeRecipe, kind: str) -> None:
    run = finetune(recipe(kind, **{"train.gradient_checkpointing": True, "train.max_steps": 1}))
    base = run.model.get_base_model()
    assert base.is_activation_checkpointing
    hooks = [str(hook) for module in base.modules() for hook in module._forward_hooks.values()]
    assert not [name for name in hooks if "make_inputs_require_grad" in name]


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_turned_off_by_its_old_and_by_its_new_name(recipe: MakeRecipe, name: str) -> None:
    run = finetune(recipe(**{f"train.{name}": False, "train.max_steps": 1}))
    assert not run.model.get_base_model().is_activation_checkpointing


def test_another_alpha_is_not_resumed(recipe: MakeRecipe) -> None:
    finetune(recipe())
    with pytest.raises(RecipeError, match="holds another adapter than this recipe makes"):
        finetune(recipe(**{"lora.alpha": 64}), resume=True)


def test_the_bar_lets_go_of_the_terminal_when_training_fails(recipe: MakeRecipe) -> None:
    def broken(rows: Any) -> dict[str, torch.Tensor]:
        raise DatasetError("row 3 is bad")

    with pytest.raises(DatasetError, match="row 3 is bad"):
        finetune(recipe(), collator=broken)
    assert console._live_stack == []


def test_a_checkpoint_with_a_temperature_but_no_sampling_is_saved(
    recipe: MakeRecipe, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "old")
    path = tmp_path / "old" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    run = finetune(recipe(**{"model.name": str(tmp_path / "old"), "merge": True}))
    assert json.loads((run.adapter_dir / "merged" / "generation_config.json").read_text())["temperature"] == 0.9


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama", "text"])
def test_a_template_of_the_recipe_is_trained_with_and_saved(recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    plain = finetune(recipe(kind, **{"train.max_steps": 1}))
    own = tmp_path / "own.jinja"
    own.write_text("{{ 'NOTE: ' }}" + plain.prompter.chat_template)
    run = finetune(recipe(kind, chat_template=str(own), **{"train.max_steps": 1}), overwrite=True)
    ids = run.prompter([run.train_rows[0]])["input_ids"][0]
    assert run.prompter.tokenizer.decode(ids).startswith("NOTE: ")
    assert run.prompter.processor.chat_template == own.read_text()
    assert "NOTE: " in (run.adapter_dir / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, "cannot be read"), ("{{ messages[0].content }}", r"has no \{% generation %\} markers")]
)
def test_a_template_that_is_absent_or_marks_no_answers_is_refused(
    recipe: MakeRecipe, tmp_path: Path, text: str | None, wanted: str
) -> None:
    own = tmp_path / "own.jinja"
    if text is not None:
        own.write_text(text)
    with pytest.raises((RecipeError, ModelError), match=wanted):
        finetune(recipe("mllama", chat_template=str(own)))

"""Training: TRL's SFTTrainer under a recipe. The only file that imports the trainer."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from vlmtune import evaluation
from vlmtune.callbacks import HeldOutAnswers, ProgressBar, Speed
from vlmtune.collator import MultimodalCollator
from vlmtune.console import bar, console, decisions, is_main_process
from vlmtune.data import Rows, find_bad_rows, load_data, without
from vlmtune.errors import ModelError, OutputError, RecipeError, VlmtuneError
from vlmtune.evaluation import Comparison
from vlmtune.families import Family
from vlmtune.merge import load_merged, merge_adapter
from vlmtune.model import (
    Processor,
    compute_dtype,
    load_model,
    match_adapter_dtype,
    parameter_counts,
    use_checkpointing,
)
from vlmtune.output import claim, disk_errors, last_checkpoint, whole, write_json
from vlmtune.recipe import Recipe, load_recipe

Row = Mapping[str, Any]
Collator = Callable[[Sequence[Row]], Mapping[str, Tensor]]
PACKAGES = ("vlmtune", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def finetune(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    family: Family | str | None = None,
    collator: Collator | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **overrides: Any,
) -> Run:
    """Trains an adapter as a recipe says and writes it to `train.output_dir`, whole or not at all.

    Args:
        recipe: path of a YAML file, a mapping of the same shape, or a `Recipe`.
        family: a `Family` of one's own, or the name of one.
        collator: any callable `list[row] -> dict[str, Tensor]` in place of `MultimodalCollator`; a row is
            `{"messages": [...], "name": "row 17 of train.jsonl"}`.
        resume: go on from the last checkpoint in the output directory.
        overwrite: delete an earlier run that lies in the output directory.
        overrides: values of the recipe by dotted key, `**{"train.learning_rate": 1e-4}`.

    Raises:
        VlmtuneError: RecipeError, DatasetError, ModelError or OutputError, each one clear sentence.

    """
    checked = _with_absolute_model(load_recipe(recipe, **overrides))
    output_dir = checked.output_dir
    config = sft_config(checked)
    checkpoint = _checkpoint(output_dir) if resume else None
    if not resume and is_main_process():
        claim(output_dir, overwrite=overwrite)
    set_seed(config.seed)
    train_rows, held_out, dropped = _usable_rows(checked, config.seed)
    model, processor, found = load_model(checked, family=family)
    prompter = MultimodalCollator(processor, found, checked.train_on_inputs, max_length=_longest_row(checked, model))
    if checked.on_too_long == "drop":
        train_rows, held_out, dropped = _short_rows(prompter, train_rows, held_out, dropped)
    with disk_errors(output_dir):
        if overwrite and not resume and is_main_process():
            shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            (output_dir / "recipe.yaml").write_text(checked.to_yaml(), encoding="utf-8")
        trainer = _trainer(checked, config, model, processor, collator or prompter, prompter, train_rows, held_out)
        _show_decisions(checked, trainer, found, prompter, train_rows, held_out, dropped)
        seconds = _train(trainer, checkpoint)
    run = Run(
        model,
        processor,
        trainer,
        checked,
        found,
        output_dir,
        trainer.state.log_history,
        {},
        train_rows,
        held_out,
        prompter,
    )
    run.metrics.update(_training_metrics(run, dropped, seconds))
    if is_main_process():
        _save(run)
        _finish(run)
    trainer.accelerator.wait_for_everyone()
    return run


@dataclass
class Run:
    """A finished run: the tuned model, what it cost, and what it says."""

    model: Any  # a peft.PeftModel with the adapter on
    processor: Processor
    trainer: SFTTrainer
    recipe: Recipe
    family: Family
    adapter_dir: Path
    history: list[dict[str, float]]  # the trainer's log: an entry each logging step and evaluation
    metrics: dict[str, Any]
    train_rows: Rows
    held_out: Rows | None
    prompter: MultimodalCollator = field(repr=False)

    def generate(self, row: Row, *, max_new_tokens: int | None = None) -> str:
        """The tuned model's answer to a row of the data set, or to a sample `{"messages": [...]}` of these `Rows`."""
        asked = evaluation.question(row) if _is_sample(row) else self.train_rows.alone(row).prompt(0)
        return evaluation.answers(self.model, self.prompter, [asked], **self.options(max_new_tokens))[0]

    def compare(self, rows: Iterable[Row] | None = None, *, max_new_tokens: int | None = None) -> Comparison:
        """Base against tuned model, adapter off and on in this one process.

        Args:
            rows: rows of the data set or samples of these `Rows`; None takes the first `eval.samples` held-out rows.

        """
        samples = self.samples() if rows is None else [r if _is_sample(r) else self.train_rows.alone(r)[0] for r in rows]
        return evaluation.compare(self.model, self.prompter, samples, **self.options(max_new_tokens))

    def samples(self) -> list[Row]:
        """The first `eval.samples` rows that were held out, or of the training rows where none were."""
        return first(self.held_out or self.train_rows, self.recipe.eval.samples)

    def options(self, max_new_tokens: int | None = None) -> dict[str, Any]:
        """How answers are made: keywords of `evaluation.answers`."""
        section = self.recipe.eval
        return {"max_new_tokens": max_new_tokens or section.max_new_tokens, "batch_size": section.batch_size}


class Trainer(SFTTrainer):
    """TRL's trainer; its log says how many tokens a second are trained on."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._speed = Speed()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens_per_second"] = self._speed(self.state.num_input_tokens_seen)
        super().log(logs, start_time)


def sft_config(recipe: Recipe) -> SFTConfig:
    """TRL's configuration: vlmtune's defaults, and over them what the recipe's `train` section says.

    Raises:
        RecipeError: values that TRL or this machine refuses.

    """
    given = dict(recipe.train)
    evaluates = any((recipe.data.eval_source, recipe.data.eval_split, recipe.data.eval_fraction, recipe.data.eval_rows))
    patience = recipe.eval.early_stop_patience
    if patience and not evaluates:
        raise RecipeError("`eval.early_stop_patience` needs held-out rows: set data.eval_fraction, eval_rows or eval_split")
    on_gpu, dtype = torch.cuda.is_available(), compute_dtype(recipe.model)
    defaults: dict[str, Any] = {
        "output_dir": str(recipe.output_dir),
        "use_cpu": not (on_gpu or torch.backends.mps.is_available()),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16 and on_gpu,
        "save_strategy": "epoch",
        "eval_strategy": "epoch" if evaluates else "no",
        "per_device_eval_batch_size": given.get("per_device_train_batch_size", 8),
        "logging_first_step": True,
        "load_best_model_at_end": bool(patience),
        "max_length": None,  # TRL's default would be 1024
    }
    fixed: dict[str, Any] = {
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,  # the collator needs the messages
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "activation_checkpointing": False,  # model.use_checkpointing does it, without hooks on the vision tower
        "report_to": [name for name in _listed(given.get("report_to", "tensorboard")) if name not in ("tensorboard", "none")],
    }
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and defaults["use_cpu"]:
        defaults["ddp_backend"] = "gloo"
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        given.pop(name, None)
    try:
        return SFTConfig(**{**defaults, **given, **fixed})
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(f"`train` section: {' '.join(str(error).split())}") from None


def first(rows: Rows, count: int) -> list[Row]:
    """The first rows, at most `count`."""
    return [rows[position] for position in range(min(count, len(rows)))]


def _with_absolute_model(recipe: Recipe) -> Recipe:
    """The recipe with a local model's directory made absolute, so that its adapter is found from anywhere."""
    path = Path(recipe.model.name).expanduser()
    return load_recipe(recipe, **{"model.name": str(path.absolute())}) if path.is_dir() else recipe


def _checkpoint(output_dir: Path) -> Path:
    checkpoint = last_checkpoint(output_dir) if output_dir.is_dir() else None
    if checkpoint is None:
        raise OutputError(f"there is nothing to resume: {output_dir} holds no whole checkpoint")
    return checkpoint


def _usable_rows(recipe: Recipe, seed: int) -> tuple[Rows, Rows | None, dict[str, str]]:
    """Rows to train on, rows held out, and what is wrong with those that were dropped."""
    dropped: dict[str, str] = {}

    def usable(rows: Rows) -> Rows:
        bad = find_bad_rows(rows, check_images=recipe.data.check_images)
        kept = without(rows, bad, policy=recipe.on_bad_row, hint="set `on_bad_row: drop` to go on without them")
        dropped.update({rows.name(position): reason for position, reason in bad.items()})
        return kept

    train, held_out = load_data(recipe.data, seed=seed)
    return usable(train), usable(held_out) if held_out is not None else None, dropped


def _short_rows(
    prompter: MultimodalCollator, train: Rows, held_out: Rows | None, dropped: Mapping[str, str]
) -> tuple[Rows, Rows | None, dict[str, str]]:
    """The rows that the model can take in one piece; the others are counted and named with those dropped before."""
    all_dropped, limit = dict(dropped), prompter.max_length

    def short(rows: Rows) -> Rows:
        long: dict[int, str] = {}
        for position in bar(range(len(rows)), "Counting tokens"):
            length = prompter.length(rows[position])
            if limit is not None and length > limit:
                long[position] = f"{length} tokens, and the limit is {limit}"
        all_dropped.update({rows.name(position): reason for position, reason in long.items()})
        return without(rows, long, policy="drop", hint="all are too long")

    return short(train), short(held_out) if held_out is not None else None, all_dropped


def _longest_row(recipe: Recipe, model: Any) -> int | None:
    """Tokens of the longest row: the recipe's limit, and never more than the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (recipe.train.get("max_length"), positions) if limit]
    return min(limits) if limits else None


def _trainer(
    recipe: Recipe,
    config: SFTConfig,
    model: Any,
    processor: Processor,
    collator: Collator,
    prompter: MultimodalCollator,
    train_rows: Rows,
    held_out: Rows | None,
) -> Trainer:
    options: dict[str, Any] = recipe.train.get("gradient_checkpointing_kwargs") or {}
    if options.get("use_reentrant"):
        raise RecipeError(
            "`train.gradient_checkpointing_kwargs.use_reentrant` is true; only false trains adapters rightly here"
        )
    if recipe.train.get("gradient_checkpointing", True):
        use_checkpointing(model, options.get("every_n_layers", 1))
    callbacks: list[TrainerCallback] = []
    if recipe.eval.early_stop_patience:
        callbacks.append(EarlyStoppingCallback(recipe.eval.early_stop_patience))
    if is_main_process() and "tensorboard" in _listed(recipe.train.get("report_to", "tensorboard")):
        writer = SummaryWriter(str(recipe.output_dir / "runs"))
        callbacks.append(TensorBoardCallback(writer))
        if held_out is not None:
            options = {"max_new_tokens": recipe.eval.max_new_tokens, "batch_size": recipe.eval.batch_size}
            callbacks.append(HeldOutAnswers(writer, prompter, first(held_out, recipe.eval.samples), options))
    try:
        trainer = Trainer(
            model=model,
            args=config,
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            train_dataset=_dataset(train_rows),
            eval_dataset=_dataset(held_out) if held_out is not None else None,
            processing_class=processor,
            callbacks=callbacks,
        )
    except ValueError as error:
        raise RecipeError(f"`train` section: {' '.join(str(error).split())}") from error
    match_adapter_dtype(model, compute_dtype(recipe.model))
    if ProgressCallback in map(type, trainer.callback_handler.callbacks):  # in a notebook the trainer shows a table
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _dataset(rows: Rows) -> datasets.Dataset:
    """The rows as the trainer wants them: positions, turned into samples when they are asked for."""

    def samples(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [rows[position] for position in batch["position"]]
        return {key: [sample[key] for sample in found] for key in ("messages", "name")}

    return datasets.Dataset.from_dict({"position": list(range(len(rows)))}).with_transform(samples)


def _train(trainer: Trainer, checkpoint: Path | None) -> float:
    """Trains, and returns the seconds it took."""
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except VlmtuneError as error:  # a worker process of the data loader sends its traceback as text
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from error
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            "the GPU's memory is full: lower train.per_device_train_batch_size (and raise gradient_accumulation_steps), lower "
            f"images.max_pixels, or set train.gradient_checkpointing: true ({str(error).splitlines()[0]})"
        ) from error
    return time.perf_counter() - started


def _training_metrics(run: Run, dropped: Mapping[str, str], seconds: float) -> dict[str, Any]:
    state = run.trainer.state
    losses = [entry["loss"] for entry in run.history if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in run.history if "eval_loss" in entry]
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval_loss": eval_losses[-1] if eval_losses else None,
        "seconds": round(seconds, 1),
        "tokens": state.num_input_tokens_seen,
        "train_rows": len(run.train_rows),
        "held_out_rows": len(run.held_out) if run.held_out is not None else 0,
        "dropped_rows": dict(dropped),
    }


def _save(run: Run) -> None:
    """Writes the adapter with all that is needed to reproduce, merge and serve it."""
    with whole(run.adapter_dir) as directory:
        run.model.save_pretrained(str(directory))
        run.processor.chat_template = run.prompter.chat_template  # what was trained is what is served
        run.processor.save_pretrained(str(directory))
        generation = run.model.generation_config
        stop = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        generation.eos_token_id = sorted({token for token in [*stop, run.prompter.stop_token_id] if token is not None})
        generation.save_pretrained(str(directory))
        (directory / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
        write_json(directory / "versions.json", {"python": platform.python_version()} | {p: version(p) for p in PACKAGES})
        write_json(directory / "history.json", {"log": run.history})
        write_json(directory / "metrics.json", run.metrics)


def _finish(run: Run) -> None:
    """After training: the held-out answers of base, tuned, blind and merged model, as far as the recipe asks for them."""
    rows, section = run.held_out, run.recipe.eval
    shown = first(rows, len(rows) if section.accuracy else section.samples) if rows is not None else []
    if shown:
        _compare_and_score(run, shown)
    if run.recipe.merge:
        report = merge_adapter(run.adapter_dir, run.adapter_dir / "merged", overwrite=True)
        run.metrics["merge_largest_difference"] = report.largest_difference
        if section.accuracy and shown:
            merged = load_merged(run.adapter_dir / "merged", run.recipe.model)
            run.metrics["merged_accuracy"] = _score(run, shown, merged, "Merged answers")
    write_json(run.adapter_dir / "metrics.json", run.metrics)
    where: dict[str, Any] = {"adapter": run.adapter_dir, "metrics": run.adapter_dir / "metrics.json"}
    if shown:
        where["before and after"] = run.adapter_dir / "comparison.html"
    if run.recipe.merge:
        where["merged model"] = run.adapter_dir / "merged"
    if (run.adapter_dir / "runs").exists():
        where["TensorBoard"] = f"tensorboard --logdir {run.adapter_dir / 'runs'}"
    scores = {name.replace("_", " "): f"{value:.1%}" for name, value in run.metrics.items() if name.endswith("_accuracy")}
    decisions("Result", {**scores, **where})


def _compare_and_score(run: Run, samples: Sequence[Row]) -> None:
    section = run.recipe.eval
    given = evaluation.compare(run.model, run.prompter, samples, **run.options())
    few = Comparison(given.rows[: section.samples])
    few.write(run.adapter_dir)
    few.print()
    if section.accuracy:
        expected = [row.expected for row in given.rows]
        run.metrics["base_accuracy"] = evaluation.accuracy([row.base for row in given.rows], expected)
        run.metrics["tuned_accuracy"] = evaluation.accuracy([row.tuned for row in given.rows], expected)
        blind = [evaluation.blanked(sample) for sample in samples]
        run.metrics["blank_accuracy"] = _score(run, blind, run.model, "Blank pictures")


def _score(run: Run, samples: Sequence[Row], model: Any, description: str) -> float:
    asked = [evaluation.question(sample) for sample in samples]
    given = evaluation.answers(model, run.prompter, asked, description=description, **run.options())
    return evaluation.accuracy(given, [evaluation.expected_answer(sample) for sample in samples])


def _show_decisions(
    recipe: Recipe,
    trainer: Trainer,
    family: Family,
    prompter: MultimodalCollator,
    train_rows: Rows,
    held_out: Rows | None,
    dropped: Mapping[str, str],
) -> None:
    args, world, model = trainer.args, int(trainer.args.world_size), cast("PeftModel", trainer.model)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    rows: dict[str, Any] = {
        "model": f"{recipe.model.name} ({family.name}, {recipe.model.quantization}, {model.dtype})",
        "device": f"{trainer.args.device} × {world}",
    }
    for count in parameter_counts(model, family):
        rows[count.part] = f"{count.trainable:,} of {count.total:,} parameters trainable ({count.dtypes})"
    rows |= {
        "rows": f"{len(train_rows)} to train on, {len(held_out or [])} held out, {len(dropped)} dropped",
        "loss on": "prompts and answers" if recipe.train_on_inputs else "answers and their stop token",
        "stop token": prompter.tokenizer.convert_ids_to_tokens(prompter.stop_token_id),
        "batch": f"{batch} rows: {args.per_device_train_batch_size} × {args.gradient_accumulation_steps} accumulated × {world}",
        "checkpointing": "on" if model.get_base_model().is_activation_checkpointing else "off",
        "output": recipe.output_dir,
    }
    decisions("This run", rows)
    for name, reason in list(dropped.items())[:20]:
        console.print(f"dropped {name}: {reason}", style="yellow", highlight=False)


def _is_sample(row: Row) -> bool:
    return "messages" in row and "name" in row


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])

"""Training: TRL's SFTTrainer under a recipe. The only file that imports the trainer."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from vlmtune.callbacks import HeldOutAnswers, ProgressBar, Speed
from vlmtune.collator import MultimodalCollator
from vlmtune.console import bar, console, decisions, is_main_process
from vlmtune.data import Rows, Split, find_bad_rows, load_data, spread
from vlmtune.errors import DatasetError, ModelError, OutputError, RecipeError, VlmtuneError
from vlmtune.families import Family
from vlmtune.model import (
    compute_dtype,
    load_model,
    match_adapter_dtype,
    parameter_counts,
    use_checkpointing,
)
from vlmtune.output import MARK, claim, disk_errors, last_checkpoint
from vlmtune.recipe import Recipe, load_recipe
from vlmtune.result import Run, answer_options, evaluate, save

Row = Mapping[str, Any]
CHECKPOINTING = (  # switch and options, by their old and their new names
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)
Collator = Callable[[Sequence[Row]], Mapping[str, Tensor]]


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
    split = _usable_rows(checked, config.seed)
    model, processor, found = load_model(checked, family=family)
    prompter = MultimodalCollator(processor, found, checked.train_on_inputs, max_length=_longest_row(checked, model))
    processor.chat_template = prompter.chat_template  # what is trained is what is saved, in checkpoints too
    if "drop" in (checked.on_bad_row, checked.on_too_long):
        split = _accepted_rows(checked, split, prompter)
    if checkpoint is not None:
        _refuse_another_adapter(model, checkpoint)
    with disk_errors(output_dir):
        if is_main_process():
            _open_output(checked, afresh=overwrite and not resume)
        trainer = _trainer(checked, config, model, split, prompter, collator or prompter)
        run = Run(model, processor, trainer, checked, found, split, prompter)
        _show_decisions(run)
        seconds = _train(trainer, checkpoint)
    run.metrics |= _training_metrics(run, seconds)
    if is_main_process():
        save(run)
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        with disk_errors(output_dir):
            evaluate(run)
    return run


class Trainer(SFTTrainer):
    """TRL's trainer; its log says how many tokens a second are trained on."""

    def __init__(self, *args: Any, callbacks: list[TrainerCallback], **kwargs: Any) -> None:
        self._speed = Speed()
        super().__init__(*args, callbacks=[self._speed, *callbacks], **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Loads the adapter in the dtype that it is trained in: peft makes every 16-bit one float32.

        https://github.com/huggingface/peft/blob/main/src/peft/peft_model.py (`load_adapter`, `autocast_adapter_dtype`)
        """
        model = cast("PeftModel", self.model)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtypes[name])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._speed.leave_out(time.perf_counter() - started)
        return metrics

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
        "output_dir": str(recipe.output_dir),
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,  # the collator needs the messages
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "activation_checkpointing": False,  # model.use_checkpointing does it, without hooks on the vision tower
        "report_to": [name for name in _listed(given.get("report_to", "tensorboard")) if name not in ("tensorboard", "none")],
    }
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and given.get("use_cpu", defaults["use_cpu"]):
        defaults["ddp_backend"] = "gloo"
    for name in CHECKPOINTING:
        given.pop(name, None)
    try:
        config = SFTConfig(**{**defaults, **given, **fixed})
    except (ValueError, TypeError, RuntimeError, ImportError) as error:  # ImportError: deepspeed, liger and the like
        raise RecipeError(f"`train` section: {' '.join(str(error).split())}") from None
    if config.n_gpu > 1:  # one process uses one card, and does not count the others: torchrun starts a process for each
        # https://github.com/huggingface/transformers/blob/main/src/transformers/training_args.py (`n_gpu`)
        config._n_gpu = 1  # pyright: ignore[reportPrivateUsage]
    return config


def checkpoint_every(recipe: Recipe) -> int:
    """Every how many layers activations are recomputed in the backward pass; 0 keeps them all.

    transformers 5 calls it activation checkpointing and TRL still gradient checkpointing: both names count.

    Raises:
        RecipeError: options that would train an adapter wrongly or that are none.

    """
    on, named = True, dict[str, Any]()
    for switch, kwargs in zip(CHECKPOINTING[::2], CHECKPOINTING[1::2], strict=True):
        on = on if recipe.train.get(switch) is None else recipe.train[switch]
        named = recipe.train.get(kwargs) or named
    if named.get("use_reentrant"):
        raise RecipeError(f"`train.{CHECKPOINTING[1]}.use_reentrant` is true; only false trains adapters rightly here")
    unknown = sorted(set(named) - {"use_reentrant", "every_n_layers"})
    if unknown:
        raise RecipeError(
            f"`train.{CHECKPOINTING[1]}.{unknown[0]}` is not an option: there is every_n_layers, and use_reentrant, which is "
            "false"
        )
    return named.get("every_n_layers", 1) if on else 0


def _with_absolute_model(recipe: Recipe) -> Recipe:
    """The recipe with a local model's directory made absolute, so that its adapter is found from anywhere."""
    path = Path(recipe.model.name).expanduser()
    return load_recipe(recipe, **{"model.name": str(path.absolute())}) if path.is_dir() else recipe


def _checkpoint(output_dir: Path) -> Path:
    checkpoint = last_checkpoint(output_dir) if output_dir.is_dir() else None
    if checkpoint is None:
        raise OutputError(f"there is nothing to resume: {output_dir} holds no whole checkpoint")
    return checkpoint


def _usable_rows(recipe: Recipe, seed: int) -> Split:
    def bad(rows: Rows) -> dict[int, str]:
        return find_bad_rows(rows, check_images=recipe.data.check_images)

    split = load_data(recipe.data, seed=seed)
    return split.without(bad, policy=recipe.on_bad_row, hint="set `on_bad_row: drop` to go on without them")


def _accepted_rows(recipe: Recipe, split: Split, prompter: MultimodalCollator) -> Split:
    """The rows that the processor takes, and the model in one piece: found before training and not in the middle of it."""
    long: dict[str, str] = {}

    def refused(rows: Rows) -> dict[int, str]:
        bad: dict[int, str] = {}
        for position in bar(range(len(rows)), "Counting tokens"):
            try:
                if reason := prompter.too_long(rows[position]):
                    long[rows.name(position)] = reason
            except DatasetError as error:
                bad[position] = str(error).removeprefix(f"{rows.name(position)}: ")
        return bad

    def too_long(rows: Rows) -> dict[int, str]:
        return {position: long[name] for position in range(len(rows)) if (name := rows.name(position)) in long}

    split = split.without(refused, policy=recipe.on_bad_row, hint="set `on_bad_row: drop` to go on without them")
    return split.without(too_long, policy=recipe.on_too_long, hint="set `on_too_long: drop` to go on without them")


def _refuse_another_adapter(model: PeftModel, checkpoint: Path) -> None:
    """A checkpoint of other LoRA settings or of another model would be loaded in part, or not at all, without a word."""
    try:
        saved = load_file(checkpoint / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"checkpoint {checkpoint} is damaged ({error}): delete it to resume from the one before") from error
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    before, now = PeftConfig.from_pretrained(str(checkpoint)), model.peft_config["default"]
    scales = ("lora_alpha", "use_rslora", "use_dora")
    same_scale = all(getattr(before, name) == getattr(now, name) for name in scales)
    if not same_scale or shapes != {name: tensor.shape for name, tensor in saved.items()}:
        raise RecipeError(
            f"checkpoint {checkpoint} holds another adapter than this recipe makes: resume with the `model` and `lora` that it "
            "was trained with"
        )
    if not (checkpoint / "optimizer.pt").exists():
        raise OutputError(f"checkpoint {checkpoint} has no optimizer.pt: a run with train.save_only_model cannot be resumed")


def _longest_row(recipe: Recipe, model: Any) -> int | None:
    """Tokens of the longest row: the recipe's limit, and never more than the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (recipe.train.get("max_length"), positions) if limit]
    return min(limits) if limits else None


def _open_output(recipe: Recipe, *, afresh: bool) -> None:
    """Makes the output directory, and leaves the recipe in it, by which a run is told from anything else."""
    if afresh:
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    (recipe.output_dir / MARK).touch()
    (recipe.output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _trainer(
    recipe: Recipe, config: SFTConfig, model: Any, split: Split, prompter: MultimodalCollator, collator: Collator
) -> Trainer:
    every = checkpoint_every(recipe)
    if every != 0:
        use_checkpointing(model, every)
    callbacks = _callbacks(recipe, split, prompter)
    try:
        trainer = Trainer(
            model=model,
            args=config,
            data_collator=collator,  # pyright: ignore[reportArgumentType]
            train_dataset=_dataset(split.train),
            eval_dataset=_dataset(split.held_out) if split.held_out is not None else None,
            processing_class=prompter.processor,
            callbacks=callbacks,
        )
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"`train` section: {' '.join(str(error).split())}") from error
    match_adapter_dtype(model, compute_dtype(recipe.model))
    if ProgressCallback in map(type, trainer.callback_handler.callbacks):  # in a notebook the trainer shows a table
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _callbacks(recipe: Recipe, split: Split, prompter: MultimodalCollator) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = []
    if recipe.eval.early_stop_patience:
        callbacks.append(EarlyStoppingCallback(recipe.eval.early_stop_patience))
    if is_main_process() and "tensorboard" in _listed(recipe.train.get("report_to", "tensorboard")):
        writer = SummaryWriter(str(recipe.output_dir / "runs"))
        callbacks.append(TensorBoardCallback(writer))
        if split.held_out is not None:
            samples = spread(split.held_out, recipe.eval.samples)
            callbacks.append(HeldOutAnswers(writer, prompter, samples, answer_options(recipe.eval)))
    return callbacks


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
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.stop()
    return time.perf_counter() - started


def _training_metrics(run: Run, seconds: float) -> dict[str, Any]:
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
        "held_out_rows": len(run.held_out or []),
        "dropped_rows": dict(run.split.dropped),
    }


def _show_decisions(run: Run) -> None:
    """Prints what was decided before the run begins, and which rows are left out."""
    recipe, args, world = run.recipe, run.trainer.args, int(run.trainer.args.world_size)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    rows: dict[str, Any] = {
        "model": f"{_near(recipe.model.name)} ({run.family.name}, {recipe.model.quantization}, {run.model.dtype})",
        "device": f"{args.device} × {world}{_idle_cards(world)}",
    }
    for count in parameter_counts(run.model, run.family):
        rows[count.part] = f"{count.trainable:,} of {count.total:,} parameters trainable ({count.dtypes})"
    rows |= {
        "rows": f"{len(run.train_rows)} to train on, {len(run.held_out or [])} held out, {len(run.split.dropped)} dropped",
        "loss on": "prompts and answers" if recipe.train_on_inputs else "answers and their stop token",
        "stop token": run.prompter.tokenizer.convert_ids_to_tokens(run.prompter.stop_token_id),
        "batch": f"{batch} rows: {args.per_device_train_batch_size} × {args.gradient_accumulation_steps} accumulated × {world}",
        "checkpointing": "on" if run.model.get_base_model().is_activation_checkpointing else "off",
        "output": recipe.output_dir,
    }
    decisions("This run", rows)
    for name, reason in list(run.split.dropped.items())[:20]:
        console.print(f"dropped {name}: {reason}", style="yellow", highlight=False)


def _near(name: str) -> str:
    """A directory below this one by its short name."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _idle_cards(world: int) -> str:
    count = torch.cuda.device_count()
    return f" ({count} are here: torchrun --nproc_per_node={count} uses them all)" if count > world else ""


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])

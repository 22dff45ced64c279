"""Training: rows, model and trainer put together as a recipe says."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig

from vlmtune import doctor
from vlmtune.album import Album
from vlmtune.batching import Batching, Collator, Row, batching, collator_of, counted_rows, passes, usable_rows
from vlmtune.callbacks import HeldOutAnswers, ProgressBar
from vlmtune.collator import MultimodalCollator
from vlmtune.console import console, decisions, is_main_process
from vlmtune.data import SHOWN, Rows, Split, spread
from vlmtune.errors import ModelError, OutputError, RecipeError, VlmtuneError
from vlmtune.families import Family
from vlmtune.model import (
    compute_dtype,
    last_mlp,
    load_model,
    match_adapter_dtype,
    parameter_counts,
    sharing_obstacle,
    use_checkpointing,
)
from vlmtune.output import MARK, claim, disk_errors, last_checkpoint
from vlmtune.plan.forecast import Plan
from vlmtune.prediction import Gauge, chosen_before, in_words, planned, remedy
from vlmtune.proof import ends_apart
from vlmtune.recipe import Recipe, load_recipe
from vlmtune.result import Run, answer_options, evaluate, save
from vlmtune.trainer import Trainer, checkpoint_every, listed, sft_config, try_out
from vlmtune.vision_cache import Processes, keep_features

NAMED = 20  # rows of a kind that the terminal names


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
    try_out(sft_config(checked))
    checkpoint = _checkpoint(output_dir) if resume else None
    if not resume and is_main_process():
        claim(output_dir, overwrite=overwrite)
    plan = None
    if resume and checked.plan.mode == "auto":
        checked = chosen_before(checked, output_dir)
    else:
        plan = _agreed_plan(checked, family, collator)
        checked = load_recipe(checked, **(plan.overrides if plan is not None else {}))
    config = sft_config(checked)
    set_seed(config.seed)
    album = Album()
    split = usable_rows(checked, config.seed, check_images=checked.data.check_images, album=album)
    model, processor, found = load_model(checked, family=family)
    prompter = collator_of(checked, processor, found, model.config)
    prompter.album = album
    prompter.pad_to_multiple_of = cast("int | None", config.pad_to_multiple_of)
    processor.chat_template = prompter.chat_template  # what is trained is what is saved, in checkpoints too
    if checkpoint is not None:
        _refuse_another_adapter(model, checkpoint)
    own = _own(family, collator)
    with _memory_errors(checked, plan, own, lambda: "before training, with one to eight pictures or two rows at once"):
        split, batches, cache = _prepared(checked, config, model, split, prompter, collator)
        last = _last_mlp(model, found, batches, split)
        examined: float | None = None  # seconds
        if checked.doctor and collator is None:
            started = time.perf_counter()
            doctor.at_start(checked, prompter, split, model)
            examined = time.perf_counter() - started
    with disk_errors(output_dir):
        if is_main_process():
            output_dir.mkdir(parents=True, exist_ok=True)
        trainer = _trainer(checked, config, model, split, prompter, batches, last)
        if is_main_process():  # what lies there goes only now that nothing is left to be refused
            _open_output(checked, afresh=overwrite and not resume)
            for callback in _board(checked, split, prompter):
                trainer.add_callback(callback)
        gauge = Gauge(plan, checked.model.name) if plan is not None and config.device.type == "cuda" else None
        if gauge is not None:
            trainer.add_callback(gauge)
        run = Run(model, processor, trainer, checked, found, split, prompter)
        _show_decisions(run, batches.packing, cache, plan, examined)
        with _memory_errors(checked, plan, own, lambda: _where(trainer, split.train)):
            seconds = _train(trainer, checkpoint)
    run.metrics |= _training_metrics(run, seconds) | ({"memory": gauge.entry} if gauge is not None else {})
    run.metrics["doctor_seconds"] = None if examined is None else round(examined, 1)
    if is_main_process():
        save(run)
        if checked.doctor:
            _say_whether_it_looks(run)
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        with disk_errors(output_dir):
            evaluate(run)
    return run


def _with_absolute_model(recipe: Recipe) -> Recipe:
    """The recipe with a local model's directory made absolute, so that its adapter is found from anywhere."""
    path = Path(recipe.model.name).expanduser()
    return load_recipe(recipe, **{"model.name": str(path.absolute())}) if path.is_dir() else recipe


def _agreed_plan(recipe: Recipe, family: Family | str | None, collator: Collator | None) -> Plan | None:
    """The first process's plan, for all."""
    own = _own(family, collator)
    found: Plan | VlmtuneError | None = None
    if is_main_process():
        try:
            named = recipe if family is None or own else load_recipe(recipe, **{"model.family": family})
            found = planned(named, own=own)
        except VlmtuneError as error:
            found = error
    found = _of_the_first(found)
    if isinstance(found, VlmtuneError):
        raise found
    return found


def _own(family: Family | str | None, collator: Collator | None) -> str:
    """What of a run is the caller's own, so that a plan cannot see it."""
    return "a collator" if collator is not None else "a family" if isinstance(family, Family) else ""


def _checkpoint(output_dir: Path) -> Path:
    checkpoint = last_checkpoint(output_dir) if output_dir.is_dir() else None
    if checkpoint is None:
        raise OutputError(f"there is nothing to resume: {output_dir} holds no whole checkpoint")
    return checkpoint


def _prepared(
    recipe: Recipe, config: SFTConfig, model: PeftModel, split: Split, prompter: MultimodalCollator, collator: Collator | None
) -> tuple[Split, Batching, str]:
    """The rows that can be trained on, how they become batches, and whether their pictures' features are kept."""
    if collator is not None:
        drops = "drop" in (recipe.on_bad_row, recipe.on_too_long)
        return counted_rows(recipe, split, prompter)[0] if drops else split, *_as_given(recipe, collator)
    if recipe.packing.group_by_image and (obstacle := sharing_obstacle(model.config)):  # before all pictures are encoded
        raise RecipeError(f"`packing.group_by_image` is on, and {obstacle}")
    split, lengths = counted_rows(recipe, split, prompter)
    features, cache = keep_features(
        recipe.vision_cache,
        recipe.lora,
        model,
        prompter,
        [split.train, *([split.held_out] if split.held_out is not None and config.eval_strategy != "no" else [])],
        passes=passes(config, len(split.train)),
        processes=Processes(config.process_index, config.world_size, PartialState().wait_for_everyone, _of_the_first),
    )
    if features is None:  # decoded pictures are the next best thing; each worker of the loader keeps its own
        available = psutil.virtual_memory().available
        prompter.album.room = available // 8 // (config.dataloader_num_workers + 1) // config.world_size
    reads = prompter.with_features(features) if features is not None else prompter
    return split, batching(recipe, config, model, reads, split.train, lengths, _of_the_first), cache


def _of_the_first(value: Any) -> Any:
    """The first process's value, for all."""
    return broadcast_object_list([value])[0]


def _as_given(recipe: Recipe, collator: Collator) -> tuple[Batching, str]:
    """A collator of the user's makes batches as it likes, of rows as the trainer draws them."""
    if recipe.on_too_long == "shrink":
        raise RecipeError(
            "`on_too_long: shrink` is for vlmtune's collator, and you pass one of your own, which opens the pictures"
        )
    asked = {
        "`packing.length`": recipe.packing.length,
        "`packing.group_by_image`": recipe.packing.group_by_image,
        f"`vision_cache: {recipe.vision_cache.mode}`": recipe.vision_cache.mode in ("memory", "disk"),
    }
    if given := next(filter(asked.get, asked), None):
        raise RecipeError(f"{given} is for vlmtune's collator, and you pass one of your own, which may change the pictures")
    return Batching(collator, collator, None, "off: a collator of your own"), "off: a collator of your own"


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


def _open_output(recipe: Recipe, *, afresh: bool) -> None:
    """Makes the output directory, and leaves the recipe in it, by which a run is told from anything else."""
    if afresh:
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    (recipe.output_dir / MARK).touch()
    (recipe.output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def _last_mlp(model: PeftModel, family: Family, batches: Batching, split: Split) -> nn.Module | None:
    """The last layer's MLP where it may be left out of untrained positions; tried out on a row, as packing and features are."""
    last = last_mlp(model, family)
    if last is None or batches.plan is None:  # beside a collator of one's own nothing is tried out
        return None
    return last if ends_apart(model, family, batches.padded([split.train[0]]), last) else None


def _trainer(
    recipe: Recipe,
    config: SFTConfig,
    model: Any,
    split: Split,
    prompter: MultimodalCollator,
    batches: Batching,
    last: nn.Module | None,
) -> Trainer:
    if batches.plan is not None:
        config.gradient_accumulation_steps = batches.plan.micro_batches
    every = checkpoint_every(recipe)
    if every != 0:
        use_checkpointing(model, every)
    patience = recipe.eval.early_stop_patience
    try:
        trainer = Trainer(
            model=model,
            args=config,
            family=prompter.family,
            plan=batches.plan,
            data_collator=batches.collator,  # pyright: ignore[reportArgumentType]
            eval_collator=batches.padded,
            last_mlp=last,
            train_dataset=_dataset(split.train),
            eval_dataset=_dataset(split.held_out) if split.held_out is not None else None,
            processing_class=prompter.processor,
            callbacks=[EarlyStoppingCallback(patience)] if patience else [],
        )
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"`train` section: {' '.join(str(error).split())}") from error
    match_adapter_dtype(model, compute_dtype(recipe.model))
    if ProgressCallback in map(type, trainer.callback_handler.callbacks):  # in a notebook the trainer shows a table
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _board(recipe: Recipe, split: Split, prompter: MultimodalCollator) -> list[TrainerCallback]:
    """What writes to TensorBoard."""
    if "tensorboard" not in listed(recipe.train.get("report_to", "tensorboard")):
        return []
    writer = SummaryWriter(str(recipe.output_dir / "runs"))
    if split.held_out is None:
        return [TensorBoardCallback(writer)]
    samples = spread(split.held_out, recipe.eval.samples)
    return [TensorBoardCallback(writer), HeldOutAnswers(writer, prompter, samples, answer_options(recipe.eval))]


def _dataset(rows: Rows) -> datasets.Dataset:
    """The rows as the trainer wants them: positions, turned into samples when they are asked for."""
    samples = _Samples()
    dataset = datasets.Dataset.from_dict({"position": range(len(rows))}).with_transform(samples)
    samples.rows = rows  # only now: datasets takes a fingerprint of the transform, for which it would pickle every row
    return dataset


@dataclass
class _Samples:
    rows: Rows | Sequence[Row] = ()

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [self.rows[position] for position in batch["position"]]
        return {key: [sample[key] for sample in found] for key in ("messages", "name")}


def _train(trainer: Trainer, checkpoint: Path | None) -> float:
    """Trains, and returns the seconds it took."""
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except VlmtuneError as error:  # a worker process of the data loader sends its traceback as text
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from error
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressBar):
                callback.stop()
    return time.perf_counter() - started


@contextmanager
def _memory_errors(recipe: Recipe, plan: Plan | None, own: str, where: Callable[[], str]) -> Generator[None]:
    """Turns a GPU's full memory into one sentence: where, how much was missing, and what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"the GPU's memory is full {where()}: {remedy(recipe, plan, error, own=own)}") from error


def _where(trainer: Trainer, rows: Rows) -> str:
    """The step that a run has come to, and the rows of its largest micro-batch."""
    step = f"in step {trainer.state.global_step + 1}"
    if trainer.plan is None:
        return step
    steps = trainer.plan.steps(int(trainer.state.epoch or 0))
    largest = steps[trainer.state.global_step % len(steps)][0][trainer.plan.rank]
    named = ", ".join(rows.name(position) for position in largest[:SHOWN])
    more = f" and {len(largest) - SHOWN} more" if len(largest) > SHOWN else ""
    return f"{step}, whose largest micro-batch is {named}{more}"


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
        "shrunk_rows": dict(run.split.shrunk),
    }


def _show_decisions(run: Run, packing: str, cache: str, plan: Plan | None, examined: float | None) -> None:
    """Prints what was decided before the run begins, and which rows are left out."""
    recipe, args, world = run.recipe, run.trainer.args, int(run.trainer.args.world_size)
    rows: dict[str, Any] = {
        "model": f"{_near(recipe.model.name)} ({run.family.name}, {recipe.model.quantization}, {run.model.dtype})",
        "device": f"{args.device} × {world}{_idle_cards(world)}",
    }
    for count in parameter_counts(run.model, run.family):
        rows[count.part] = f"{count.trainable:,} of {count.total:,} parameters trainable ({count.dtypes})"
    rows |= {
        "rows": _rows(run),
        "loss on": "prompts and answers" if recipe.train_on_inputs else "answers and their stop token",
        "stop token": run.prompter.tokenizer.convert_ids_to_tokens(run.prompter.stop_token_id),
        "step": _step(run),
        "packing": packing,
        "vision cache": cache,
        "checkpointing": {0: "off", 1: "every layer"}.get(every := checkpoint_every(recipe), f"one layer of {every}"),
        "doctor": _examination(recipe, examined),
        **in_words(plan),
        "output": recipe.output_dir,
    }
    decisions("This run", rows)
    for done, named in (("dropped", run.split.dropped), ("shrunk", run.split.shrunk)):
        for name, reason in list(named.items())[:NAMED]:
            console.print(f"{done} {name}: {reason}", style="yellow", highlight=False)
        if len(named) > NAMED:
            console.print(f"{done} {len(named) - NAMED} more: metrics.json names all", style="yellow", highlight=False)


def _rows(run: Run) -> str:
    split = run.split
    counts = f"{len(split.train)} to train on, {len(split.held_out or [])} held out, {len(split.dropped)} dropped"
    return f"{counts}; {len(split.shrunk)} of them with smaller pictures" if split.shrunk else counts


def _examination(recipe: Recipe, seconds: float | None) -> str:
    if seconds is not None:
        return f"no failure, in {seconds:.1f} s"
    return "left out: a collator of your own, which vlmtune.doctor.examine takes" if recipe.doctor else "off"


def _say_whether_it_looks(run: Run) -> None:
    """A model that answers the same whatever it is shown has learnt from the texts alone."""
    found = doctor.after_training(run.recipe, run.prompter, run.split, run.model)
    run.metrics["looks"] = found.found
    if found.verdict != "ok":
        console.print(f"{found.check}: {found.found} ({found.remedy})", style="bold red", highlight=False, markup=False)


def _step(run: Run) -> str:
    args, plan = run.trainer.args, run.trainer.plan
    rows = plan.rows_per_step if plan else args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    parts = args.gradient_accumulation_steps
    each = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
    return f"{rows} rows in {parts} micro-batch{'es' if parts > 1 else ''}{each}"


def _near(name: str) -> str:
    """A directory below this one by its short name."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _idle_cards(world: int) -> str:
    count = torch.cuda.device_count()
    return f" ({count} are here: torchrun --nproc_per_node={count} uses them all)" if count > world else ""

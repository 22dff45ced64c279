"""TRL's SFTTrainer under a recipe, and its configuration."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_scheduler
from transformers.debug_utils import DebugOption
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_available
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, SFTTrainer

from vlmtune.batch import steady
from vlmtune.callbacks import PlanEpochs, Speed
from vlmtune.errors import RecipeError, one_line
from vlmtune.families import Family
from vlmtune.head import Head, has_kernels
from vlmtune.model import compute_dtype, kept_apart, with_features
from vlmtune.packing import BatchPlan
from vlmtune.plugins import did_you_mean
from vlmtune.recipe import Recipe

WITHOUT_GPU: dict[str, Any] = {"use_cpu": True, "tf32": None, "report_to": "none"}
MEASURED = ("loss", "mean_token_accuracy", "entropy")  # by an evaluation: by these the best checkpoint may be told
CHECKPOINTING = (  # switch and options, by their old and their new names
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)


class Trainer(SFTTrainer):
    """TRL's trainer with batches as planned, the head at trained positions only, and tokens a second in its log.

    Args:
        family: knows how a batch goes into the model.
        plan: which rows go together; None leaves that to the trainer.
        eval_collator: makes the batches of evaluations, which are not packed.
        last_mlp: computed at trained positions only, as `Head` says.

    """

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's knows neither the base nor the pictures, and stands where a person would look for both."""

    def __init__(
        self,
        *args: Any,
        family: Family,
        plan: BatchPlan | None,
        eval_collator: Any,
        last_mlp: nn.Module | None,
        callbacks: list[TrainerCallback],
        **kwargs: Any,
    ) -> None:
        self.plan, self._family, self._eval_collator = plan, family, eval_collator
        self._speed = Speed()
        follow = [PlanEpochs(plan)] if plan is not None else []
        super().__init__(*args, callbacks=[self._speed, *follow, *callbacks], **kwargs)
        # the loss is divided by all trained tokens of a step, whatever the model's own forward does with their number:
        # else it would depend on how rows fall into micro-batches (`accepts_loss_kwargs`, transformers' modeling files)
        self.model_accepts_loss_kwargs = True
        # compiled, the last MLP stays whole: there would be a program for each number of trained tokens
        self._head = Head(cast("PeftModel", self.model), None if self.args.torch_compile else last_mlp)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        called: Any = model
        with self.accelerator.autocast():  # as in the model's forward, before which the tower sees these pictures
            inputs = with_features(model, self._family, inputs)
        inputs = kept_apart(model, self._family.model_inputs(inputs))
        if not self.args.label_smoothing_factor:  # which wants all logits
            inputs = self._head.choose(inputs, self._multiple)
            called = model if has_kernels(self.args.device) else self._head.scoring(model)
        try:
            return super().compute_loss(called, inputs, return_outputs, num_items_in_batch)
        finally:
            self._head.rest()

    @property
    def _multiple(self) -> int:
        """Of so many tokens the head gets a multiple."""
        config, device = cast("SFTConfig", self.args), self.args.device
        if has_kernels(device):  # TRL's head takes the positions with a label out of them again
            return 1
        return int(config.pad_to_multiple_of or steady(device, cast("PeftModel", self.model).dtype))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Under autocast a 32-bit adapter's input stays in 16 bit: peft would raise it, and autocast lower it again.

        But not for DoRA, which computes norms in the input's dtype.
        https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/dora.py
        """
        model = cast("PeftModel", self.model)
        dora = any(getattr(config, "use_dora", False) for config in model.peft_config.values())
        active = (self.args.bf16 or self.args.fp16) and not dora
        with self._head.step(), disable_input_dtype_casting(model, active=active):
            return super().training_step(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with train_errors():
            return super().create_optimizer(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.plan if self.plan is not None else super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> Any:
        """A step's micro-batches come to the GPU one after the other.

        accelerate would bring them as they are drawn, and the trainer draws all of a step at once: pictures and features of
        32 rows, 1.6 GiB for Llama-3.2-Vision. https://github.com/huggingface/accelerate/blob/main/src/accelerate/data_loader.py
        """
        loader: Any = super().get_train_dataloader()
        loader.device = None  # `training_step` brings each
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._adapter_dtypes_kept():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with self._adapter_dtypes_kept():
            super()._load_best_model()

    @contextmanager
    def _adapter_dtypes_kept(self) -> Generator[None]:
        """Loads an adapter in the dtype that it is trained in: peft makes every 16-bit one float32.

        https://github.com/huggingface/peft/blob/main/src/peft/peft_model.py (`load_adapter`, `autocast_adapter_dtype`)
        """
        model = cast("PeftModel", self.model)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        yield
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
        for measured in self._metrics.values():
            # TRL begins again at 0 on resume, takes 3-D positions for a batch of one token, and counts what fills up
            if "num_tokens" in measured:
                measured["num_tokens"] = [self.state.num_input_tokens_seen]
        super().log(logs, start_time)


def sft_config(recipe: Recipe) -> SFTConfig:
    """TRL's configuration: vlmtune's defaults, and over them what the recipe's `train` section says.

    Raises:
        RecipeError: values that TRL or this machine refuses.

    """
    given = dict(recipe.train)
    evaluates = any((recipe.data.eval_source, recipe.data.eval_split, recipe.data.eval_fraction, recipe.data.eval_rows))
    patience = recipe.eval.early_stop_patience
    _check_evaluation(recipe, evaluates=evaluates)
    checkpoint_every(recipe)
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
        # beside a GPU two processes prepare the batches; a CPU that trains has no core to spare (benchmarks/loader.py)
        "dataloader_num_workers": 2 if on_gpu and not given.get("use_cpu") else 0,
    }
    fixed: dict[str, Any] = {
        "output_dir": str(recipe.output_dir),
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,  # the collator needs the messages
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "activation_checkpointing": False,  # model.use_checkpointing does it, without hooks on the vision tower
        "report_to": [name for name in listed(given.get("report_to", "tensorboard")) if name not in ("tensorboard", "none")],
    }
    if (strategy := given.get("train_sampling_strategy", "random")) not in ("random", "sequential"):
        raise RecipeError(
            f"`train.train_sampling_strategy` is {strategy!r}: rows of like length go together anyway; it is 'random' or "
            "'sequential'"
        )
    if given.get("deepspeed") and not is_deepspeed_available():  # a config that fails half-made stays for all later runs
        raise RecipeError("`train.deepspeed` is given, and deepspeed is not installed")
    reports = ("none", "tensorboard", "all", *get_available_reporting_integrations())
    if missing := [name for name in listed(given.get("report_to")) if name not in reports]:
        raise RecipeError(f"`train.report_to` names {missing[0]}, which is not installed or which transformers does not know")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        given.pop("ddp_backend", None)  # with one process there is nothing to talk about
    elif given.get("use_cpu", defaults["use_cpu"]):
        defaults["ddp_backend"] = "gloo"
    if given.get("dataloader_num_workers", defaults["dataloader_num_workers"]):
        defaults["dataloader_persistent_workers"] = True
    for name in CHECKPOINTING:
        given.pop(name, None)
    with train_errors():
        config = SFTConfig(**{**defaults, **given, **fixed})
    if config.pad_to_multiple_of is not None and int(config.pad_to_multiple_of) < 1:
        raise RecipeError(f"`train.pad_to_multiple_of` is {config.pad_to_multiple_of}: it is a number of tokens, 1 or more")
    if config.n_gpu > 1:  # one process uses one card, and does not count the others: torchrun starts a process for each
        # https://github.com/huggingface/transformers/blob/main/src/transformers/training_args.py (`n_gpu`)
        config._n_gpu = 1  # pyright: ignore[reportPrivateUsage]
    return config


@contextmanager
def train_errors(where: str = "`train` section") -> Generator[None]:
    """Turns what TRL, transformers or torch say of values of the `train` section into one sentence.

    Within it stands nothing but a call of theirs: what goes wrong there, the values have caused.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, ArithmeticError, AssertionError, RuntimeError, ImportError, OSError) as error:
        raise RecipeError(f"{where}: {one_line(error)}") from error


def try_out(config: SFTConfig) -> None:
    """Makes what the trainer will make of the configuration once all rows are read and the model is loaded, of one weight.

    Raises:
        RecipeError: values that no optimiser, schedule, data loader or compiler takes, or that ask for what is not here.

    """
    if config.activation_offloading and config.device.type != "cuda":
        raise RecipeError("`train.activation_offloading` is true, and there is no GPU whose memory it would save")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise RecipeError("`train.use_liger_kernel` is true, and liger-kernel is not installed")
    if DebugOption.TPU_METRICS_DEBUG in config.debug:
        raise RecipeError("`train.debug` has tpu_metrics_debug, and nothing is trained on a TPU here")
    layer = nn.Linear(1, 1)
    workers, context = config.dataloader_num_workers, config.dataloader_multiprocessing_context
    with train_errors("`train.dataloader_multiprocessing_context`"):
        DataLoader([0], num_workers=workers, multiprocessing_context=context)  # pyright: ignore[reportArgumentType]
    with train_errors("`train.torch_compile_mode`"):
        if config.torch_compile:
            torch.compile(layer, mode=config.torch_compile_mode, backend=config.torch_compile_backend or "inductor")
    if config.optim_target_modules is not None:  # they are the model's own
        return
    with train_errors("`train.optim` with `train.optim_args`"):
        optimizer, options = SFTTrainer.get_optimizer_cls_and_kwargs(config, cast("Any", layer))
        made = optimizer(options.pop("model", layer.parameters()), **options)
    steps = config.max_steps if config.max_steps > 0 else 10**6
    named: Any = config.lr_scheduler_kwargs
    with train_errors("`train.lr_scheduler_type` with `train.lr_scheduler_kwargs`"):
        get_scheduler(config.lr_scheduler_type, made, config.get_warmup_steps(steps), steps, named)


def _check_evaluation(recipe: Recipe, *, evaluates: bool) -> None:
    """Refuses settings of evaluation and of the best checkpoint that contradict each other."""
    given, patience = recipe.train, recipe.eval.early_stop_patience
    asked = {
        "eval.early_stop_patience": patience,
        "train.eval_strategy": given.get("eval_strategy", "no") != "no",
        "train.eval_on_start": given.get("eval_on_start"),
    }
    if (wanting := [key for key, wanted in asked.items() if wanted]) and not evaluates:
        raise RecipeError(f"`{wanting[0]}` needs held-out rows: set data.eval_fraction, eval_rows or eval_split")
    if patience and given.get("load_best_model_at_end") is False:
        raise RecipeError("`eval.early_stop_patience` keeps the best checkpoint, and `train.load_best_model_at_end` is false")
    metric = given.get("metric_for_best_model") or "loss"
    if metric.removeprefix("eval_") not in MEASURED:
        raise RecipeError(
            f"`train.metric_for_best_model` is {metric!r}; an evaluation measures {', '.join(MEASURED)}."
            f"{did_you_mean(metric, MEASURED)}"
        )
    if metric.removeprefix("eval_") == "loss" and given.get("greater_is_better"):
        raise RecipeError("`train.greater_is_better` is true, and of two losses the smaller is better")


def plain_config(recipe: Recipe) -> SFTConfig:
    """`sft_config` without what asks for a GPU: for what only looks at rows, on whatever machine."""
    return sft_config(recipe.model_copy(update={"train": {**recipe.train, **WITHOUT_GPU}}))


def checkpoint_every(recipe: Recipe, *, on_gpu: bool | None = None) -> int:
    """Every how many layers activations are recomputed in the backward pass; 0 keeps them all.

    `train.gradient_checkpointing` is true, false, or that number; by default each layer is recomputed on a GPU and none on a
    CPU, whose memory is larger.

    transformers 5 calls it activation checkpointing and TRL still gradient checkpointing: both names count.

    Args:
        recipe: its `train` section.
        on_gpu: None: whether there is one.

    Raises:
        RecipeError: options that would train an adapter wrongly or that are none.

    """
    here = torch.cuda.is_available() and not recipe.train.get("use_cpu")
    on: bool | int = here if on_gpu is None else on_gpu
    named: dict[str, Any] = {}
    for switch, kwargs in zip(CHECKPOINTING[::2], CHECKPOINTING[1::2], strict=True):
        on = on if recipe.train.get(switch) is None else recipe.train[switch]
        given = recipe.train.get(kwargs) or {}
        if isinstance(given, str):
            raise RecipeError(f"`train.{kwargs}` is {given!r}: a mapping is wanted, such as {{every_n_layers: 2}}")
        named = given or named
    if named.get("use_reentrant"):
        raise RecipeError(f"`train.{CHECKPOINTING[1]}.use_reentrant` is true; only false trains adapters rightly here")
    unknown = sorted(set(named) - {"use_reentrant", "every_n_layers"})
    if unknown:
        raise RecipeError(
            f"`train.{CHECKPOINTING[1]}.{unknown[0]}` is not an option: there is every_n_layers, and use_reentrant, which is "
            "false"
        )
    every = named.get("every_n_layers", int(on))
    if "every_n_layers" in named and not (isinstance(every, int) and every >= 1):
        raise RecipeError(f"`train.{CHECKPOINTING[1]}.every_n_layers` is {every!r}: it should be 1 or more")
    return every if on else 0


def listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])

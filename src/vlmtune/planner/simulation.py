"""A training step without weights, data or a GPU: the very model, trainer and loss, and what they allocate and compute.

It replaces a few functions of torch and TRL while it runs, so a plan has a process of its own (`process`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from vlmtune.errors import ModelError, one_line
from vlmtune.families import Family
from vlmtune.model import (
    attend_by_row,
    compute_dtype,
    last_mlp,
    match_adapter_dtype,
    outline_base,
    part_of,
    prepare_for_training,
    use_checkpointing,
)
from vlmtune.planner.allocator import replay, rounded
from vlmtune.planner.kernels import CUBLAS, Device, Kernels, scratch_on, stand_ins
from vlmtune.planner.ledger import Event, Ledger, Outline, Where, alive, peak, to_meta
from vlmtune.recipe import Recipe
from vlmtune.trainer import Trainer, sft_config

Batch = Mapping[str, Any]
NO_ROWS = Dataset.from_dict({"position": [0]})  # the batches are given
NOT_SIMULATED = {  # what needs a GPU, rows or a disk
    "use_cpu": True,
    "tf32": None,
    "torch_compile": False,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "lr_scheduler_type": "constant",  # another may want evaluations
    "push_to_hub": False,  # the trainer would make a repository at once
    "hub_model_id": None,
    "output_dir": tempfile.gettempdir(),  # the trainer would make another
}


class StaysThere:
    """For a class of trainers: the model is left where it is, and a batch is moved to a GPU that is played."""

    batches_move = False

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch for the forward pass, which on a GPU is the only one to hold it."""
        moved = dict(inputs)
        if self.batches_move:
            inputs.clear()
        return moved


class SimulatedTrainer(StaysThere, Trainer):
    """vlmtune's trainer, simulated."""


@dataclass(frozen=True)
class Outcome:
    """What one step allocates and computes.

    Attributes:
        before: what lies there when the step begins: weights, adapters, the optimiser's states.
        events: of the step; what it allocates is gone when it ends.
        flops, bytes, kernels: see `Ledger`.
        operators: the names of those that allocate.
        assumed: operators whose result depends on values, and that were taken as if all were chosen.
        cuda: whether sizes are rounded and segments reserved as on a GPU.

    """

    before: list[Event]
    events: list[Event]
    flops: dict[str, int]
    bytes: dict[str, float]
    kernels: int
    operators: frozenset[str]
    assumed: frozenset[str]
    cuda: bool

    @cached_property
    def peak(self) -> int:
        """Most bytes that are allocated at once."""
        return peak([*self.before, *self.events], self._rounded)[0]

    @cached_property
    def reserved(self) -> int:
        """Most bytes that the allocator reserves; a second step may find freed memory in smaller pieces than the first."""
        if not self.cuda:
            return self.peak
        own = {event.number for event in self.events if event.size > 0}  # a model may drop what it kept from a step before
        once = [(event.number, event.size) for event in (*self.before, *self.events)]
        again = [(event.number + 2 * len(self.events), event.size) for event in self.events if event.number in own]
        return replay([*once, *again]).peak_reserved

    def at_peak(self) -> tuple[list[Event], Event]:
        """All that is allocated at the peak, and what was allocated last."""
        events = [*self.before, *self.events]
        _, at = peak(events, self._rounded)
        return alive(events[: at + 1]), events[at]

    def timeline(self, points: int = 200) -> list[tuple[str, int]]:
        """Phase and bytes through the step, the most of each of so many pieces of it."""
        live, phase = sum(event.size for event in self.before), "forward"
        steps: list[tuple[str, int]] = []
        for event in self.events:
            live += event.size
            phase = PHASES.get(event.where.what, phase) if event.where else phase
            steps.append((phase, live))
        size = max(len(steps) // points, 1)
        return [max(steps[start : start + size], key=lambda step: step[1]) for start in range(0, len(steps), size)]

    def _rounded(self, size: int) -> int:
        return rounded(size) if self.cuda else size


PHASES = {"forward": "forward", "loss": "forward", "again": "backward", "backward": "backward", "optimiser": "optimiser"}


def outline(recipe: Recipe, family: Family, config: Any) -> PeftModel:
    """The model that `load_model` makes, without weights.

    Raises:
        ModelError: DoRA on quantised layers, whose weights peft unpacks to make the adapter.

    """
    if recipe.lora.use_dora and recipe.model.quantization != "none":
        raise ModelError("lora.use_dora on quantised layers cannot be simulated, so its memory is unknown: plan without it")
    with Outline():
        return prepare_for_training(outline_base(recipe.model, family, config), family, recipe.lora)


def simulation(
    recipe: Recipe,
    model: PeftModel,
    processor: Any,
    family: Family,
    *,
    device: Device,
    checkpointing: int,
    packed: bool,
) -> Simulation:
    """A recipe's training.

    Args:
        recipe: its `train` section decides about loss and optimiser.
        model: by `outline`.
        processor, family: as in training.
        device: whose kernels run.
        checkpointing: of every how many layers the activations are computed again; 0 of none.
        packed: batches are packs.

    Raises:
        ModelError: attention that cannot keep packed rows apart, or an operator that needs values.

    """
    kernels = Kernels(device)
    if packed:
        attend_by_row(model)
    if checkpointing:
        use_checkpointing(model, checkpointing, context_fn=kernels.again)
    train = {**recipe.train, **NOT_SIMULATED, "gradient_accumulation_steps": 1}
    config = sft_config(recipe.model_copy(update={"train": train}))

    def build() -> Trainer:
        trainer = SimulatedTrainer(
            model=model,
            args=config,
            family=family,
            plan=None,
            data_collator=list,  # pyright: ignore[reportArgumentType]
            eval_collator=None,
            last_mlp=last_mlp(model, family),
            train_dataset=NO_ROWS,
            processing_class=processor,
            callbacks=[],
        )
        match_adapter_dtype(model, compute_dtype(recipe.model))
        return trainer

    return Simulation(build, family, kernels)


class Simulation:
    """A trainer whose steps are simulated.

    Args:
        build: makes the trainer, a `StaysThere`, with the model on the meta device; called while the device is played.
        family: tells what of the model sees.
        kernels: of the device that is played.

    Attributes:
        stand_ins: what could not be run as it is, and what was taken in its place.

    """

    def __init__(self, build: Callable[[], SFTTrainer], family: Family, kernels: Kernels) -> None:
        self.family, self.device, self._kernels = family, kernels.device, kernels
        self.stand_ins: list[str] = []
        with stand_ins(kernels):
            self.trainer: Any = build()
            self.trainer.batches_move = self.device.is_cuda
            self.model: Any = self.trainer.model
            self._wrapped = self.trainer.accelerator.prepare_model(self.model, device_placement=False)
            self.trainer.model_wrapped = self._wrapped
        self._ledger = Ledger(scratch_on(self.device))
        kernels.follows_again = self._ledger.again
        self._watch()
        self._settle()

    def step(self, batch: Batch, *, accumulates: bool, waiting: Sequence[Batch] = ()) -> Outcome:
        """What the last micro-batch of a step and the optimiser do.

        Args:
            batch: as the collator makes it.
            accumulates: there are micro-batches before it, whose gradients are there already.
            waiting: others that lie on the device meanwhile.

        """
        ledger, trainer = self._ledger, self.trainer
        inputs = tree_map_only(Tensor, Tensor.clone, dict(batch))  # values of pixels may decide what is chosen of them
        others = tree_map_only(Tensor, to_meta, [dict(each) for each in waiting])
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with self._measured() as before:
            self._enter([inputs, *others], "inputs")
            if accumulates:
                self._no_gradients(trained)
            trainer.training_step(self._wrapped, inputs, torch.tensor(1))
            for parameter in trained:
                if parameter.grad is not None:
                    ledger.rename(parameter.grad, "gradients")
            ledger.optimises = True
            if trainer.args.max_grad_norm:
                trainer.accelerator.clip_grad_norm_(trained, trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            inputs.clear()
            others.clear()
        return self._outcome(before)

    def encode(self, batch: Batch) -> tuple[Outcome, list[Tensor]]:
        """What the tower does with the pictures of a batch, and their features, without values."""
        self.model.eval()
        with self._measured() as before:
            autocast = torch.autocast("cpu", self.model.dtype) if self.model.dtype != torch.float32 else nullcontext()
            inputs = tree_map_only(Tensor, self._in_its_dtype, dict(batch))
            with torch.no_grad(), autocast:
                features = self.family.encode(self._core, inputs)
        self.model.train()
        return self._outcome(before), [torch.empty_like(feature) for feature in features]  # for the cache, not on the card

    def _in_its_dtype(self, values: Tensor) -> Tensor:
        return values.to(self.model.dtype, copy=True) if values.is_floating_point() else values.clone()

    def _enter(self, values: Any, what: str) -> None:
        for tensor in _tensors(values):
            self._ledger.follow(tensor, Where(what, "", ""))

    def _no_gradients(self, trained: Sequence[nn.Parameter]) -> None:
        """Gradients of nothing, as micro-batches before leave them."""
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            self._ledger.rename(parameter.grad, "gradients")

    @property
    def _core(self) -> Any:
        """The model without its head."""
        whole = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return whole.base_model

    @contextmanager
    def _measured(self) -> Generator[list[Event]]:
        """Follows what is done in here from a ledger that has only what lies there already."""
        before = self._ledger.begin()
        with stand_ins(self._kernels), self._ledger, self._kernels:
            yield before

    def _outcome(self, before: list[Event]) -> Outcome:
        ledger = self._ledger
        return Outcome(
            before,
            ledger.events,
            dict(ledger.flops),
            dict(ledger.bytes),
            ledger.kernels,
            frozenset(ledger.operators),
            frozenset(ledger.assumed),
            self.device.is_cuda,
        )

    def _watch(self) -> None:
        """Modules by whose name memory is told apart: the model without its head, tower and projector, and every layer."""
        self._ledger.watch(self._core, "")
        for name, module in self._core.named_modules():
            seen = self.family.sees.match(f"{name}.") is not None
            outermost = seen and not self.family.sees.match(f"{name.rpartition('.')[0]}.")
            if outermost or isinstance(module, GradientCheckpointingLayer):
                self._ledger.watch(module, f"vision {name}" if seen else name)

    def _settle(self) -> None:
        """Enters weights, quantisation's statistics and buffers, and has the optimiser make its states."""
        ledger, trainer = self._ledger, self.trainer
        for name, parameter in self.model.named_parameters():
            ledger.follow(parameter, Where(_kind(parameter, part_of(name, self.family)), name, ""))
            for statistic in _statistics(parameter):
                ledger.follow(statistic, Where(_kind(parameter, part_of(name, self.family)), name, ""))
        for name, buffer in self.model.named_buffers():
            ledger.follow(buffer, Where("buffers", name, ""))
        if self.device.is_cuda:
            for _ in range(2):
                ledger.allocate(CUBLAS, Where("scratch", "", "cuBLAS"))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with stand_ins(self._kernels), ledger, self._kernels:
            trainer.create_optimizer()
            try:
                self._optimise(trained)
            except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, ModelError) as error:
                self.stand_ins.append(f"{trainer.args.optim} is counted as AdamW in the adapter's dtype ({one_line(error)})")
                trainer.optimizer = torch.optim.AdamW(trained, fused=True)
                self._optimise(trained)
        for state in trainer.optimizer.state.values():
            for tensor in _tensors(state):
                ledger.rename(tensor, "optimiser's states")

    def _optimise(self, trained: Sequence[nn.Parameter]) -> None:
        """A step with gradients of nothing, which leaves the optimiser's states."""
        for group in self.trainer.optimizer.param_groups:  # what torch chooses by itself on a GPU
            if self.device.is_cuda and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
        self._no_gradients(trained)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


def _kind(parameter: Tensor, part: str) -> str:
    """What a weight is counted under: "language model, nf4"."""
    if parameter.requires_grad:
        return "adapters"
    state = getattr(parameter, "quant_state", None)
    kind = "nf4" if state is not None else str(parameter.dtype).removeprefix("torch.")
    return f"{part}, {kind}"


def _statistics(parameter: Any) -> list[Tensor]:
    """Tensors that belong to a quantised weight."""
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    found = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    found += [getattr(nested, name, None) for name in ("absmax", "code")]
    found += [getattr(parameter, "SCB", None)]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in cast("Any", values.values() if isinstance(values, Mapping) else values):
            yield from _tensors(value)

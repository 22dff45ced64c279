"""A run beside its plan: what was predicted, what its steps measure, and what to change where it does not fit after all."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from vlmtune.console import console
from vlmtune.errors import RecipeError, VlmtuneError
from vlmtune.plan import make_plan
from vlmtune.plan.cards import find_card, seconds
from vlmtune.plan.forecast import FILLING, Plan
from vlmtune.plan.measurements import card_here, keep
from vlmtune.plan.report import show
from vlmtune.plan.words import as_arguments
from vlmtune.recipe import Recipe, load_recipe

GIB = 2**30
CHOSEN = (  # fields of `train`: what `auto` sets, and what else would decide the same
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)
SECTIONS = ("images", "packing", "vision_cache")
ROOM = 0.95  # of what has just failed: what the next setting may need
GENERAL = (
    "lower packing.length or train.per_device_train_batch_size (and raise gradient_accumulation_steps), lower "
    "images.max_pixels, or set train.gradient_checkpointing to true"
)


def planned(recipe: Recipe, *, own: str = "") -> Plan | None:
    """The plan of a run, as the recipe's `plan` section asks for it: on a GPU what it needs, with `auto` what fits.

    Args:
        recipe: what is to be trained.
        own: what of the run a plan cannot see, such as "a collator".

    Raises:
        RecipeError: a setting is to be chosen, and none fits, or `own` stands in the way.

    """
    if recipe.plan.mode == "auto":
        if own:
            raise RecipeError(f"`plan` is auto, and you pass {own} of your own, which a plan cannot see: set plan: off")
        plan = make_plan(_of_rows(recipe), gpu=card_here(), fit=True)
        show(plan)
        if not plan.overrides and plan.needed_gib > (1 - recipe.plan.margin) * plan.visible_gib:
            raise RecipeError(f"`plan` is auto: {plan.advice or 'nothing fits'}")
        return plan
    if recipe.plan.mode == "off" or own or card_here() is None:
        return None
    try:
        return make_plan(_of_rows(recipe), gpu=card_here(), advise=False)
    except Exception as error:  # a prediction is no reason to end a run
        console.print(f"no prediction of this run's memory: {error}", style="yellow", highlight=False)
        return None


def _of_rows(recipe: Recipe) -> Recipe:
    """The recipe without stated sizes: a run has its rows at hand."""
    return load_recipe(recipe, **{"data.image_size": None, "data.text_tokens": None})


def chosen_before(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with what `auto` chose for the run in that directory, which is to be resumed."""
    before = load_recipe(directory / "recipe.yaml")
    known = {*before.train, *recipe.train}
    values = {f"train.{name}": before.train.get(name) for name in CHOSEN if name in known}
    return load_recipe(recipe, **values, **before.model_dump(include=set(SECTIONS)))


def in_words(plan: Plan | None) -> dict[str, str]:
    """A line for the table of what was decided."""
    if plan is None:
        return {}
    said = f"about {plan.needed_gib:.1f} of {plan.visible_gib:.1f} GiB on {plan.card}, predicted"
    return {"memory": said if plan.fits else f"{said}: {'tight' if plan.verdict == 'tight' else 'does not fit'}"}


class Gauge(TrainerCallback):
    """Measures a GPU's memory and the seconds of a step, shows them beside the plan after the first step, and keeps them.

    What evaluations and checkpoints need is left out, for a plan does not have it: memory counts up to the first of them.
    """

    def __init__(self, plan: Plan, model: str) -> None:
        self.plan, self.model = plan, model
        self.entry: dict[str, Any] = {}
        self._seconds: list[float] = []
        self._began = 0.0
        self._steps_alone = True
        self._allocated = self._reserved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.cuda.empty_cache()  # what loading and encoding have left behind
        torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._began)
        if self._steps_alone:
            self._allocated = torch.cuda.max_memory_allocated() / GIB
            self._reserved = torch.cuda.max_memory_reserved() / GIB
        if len(self._seconds) == 1:  # the costliest step comes first
            console.print(
                f"first step: {self._allocated:.1f} GiB allocated and {self._reserved:.1f} reserved, predicted were "
                f"{self.predicted_allocated:.1f} and {self.predicted_reserved:.1f}",
                highlight=False,
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps_alone = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps_alone = False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.entry = {
            "card": self.plan.card,
            "model": self.model,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "setting": self.plan.forecast.setting.model_dump(),
            "allocated_gib": self._allocated,
            "predicted_allocated_gib": self.predicted_allocated,
            "reserved_gib": self._reserved,
            "predicted_reserved_gib": self.predicted_reserved,
            "step_seconds": median(self._seconds[1:] or self._seconds or [0.0]),  # the first allocates, and starts kernels
            "predicted_step_seconds": self._estimated_seconds(),
            "versions": self.plan.versions,
        }
        if args.world_size > 1 or self.plan.forecast.setting.group_by_image:  # other steps than those of one card, or of a plan
            return
        try:
            keep(self.entry)
        except OSError as error:
            console.print(f"not kept for later plans: {error}", style="yellow", highlight=False)

    def _estimated_seconds(self) -> float | None:
        """Without what earlier runs have taught: or corrections would be corrected."""
        card = find_card(self.plan.card)
        return seconds(self.plan.forecast.work, card) if card.tflops else None

    @property
    def predicted_reserved(self) -> float:
        """Of training; filling the vision cache comes before it."""
        return max(
            needed - (self.plan.needed_gib - self.plan.reserved_gib)
            for name, needed in self.plan.forecast.peaks.items()
            if name != FILLING
        )

    @property
    def predicted_allocated(self) -> float:
        return self.predicted_reserved - (self.plan.reserved_gib - self.plan.peak_gib)


def remedy(recipe: Recipe, plan: Plan | None, error: Exception, *, own: str = "") -> str:
    """How much memory was missing, and the next setting that fits: one that needs less than what has failed.

    Args:
        recipe: what was trained.
        plan: the run's, if it had one.
        error: torch's.
        own: what of the run a plan cannot see.

    """
    return f"{missing(str(error))}; {GENERAL if own else _next_setting(recipe, plan)}"


def _next_setting(recipe: Recipe, plan: Plan | None) -> str:
    console.print("Memory is full: looking for a setting that fits", highlight=False)
    try:
        failed = plan or make_plan(_of_rows(recipe), gpu=card_here(), advise=False)
        found = make_plan(_of_rows(recipe), gpu=card_here(), fit=True, below_gib=failed.needed_gib * ROOM)
    except VlmtuneError:
        return GENERAL
    if not found.overrides:
        return found.advice or GENERAL
    return f"the next setting that fits is {as_arguments(found.overrides)}, which needs {found.needed_gib:.1f} GiB"


def missing(message: str) -> str:
    """What torch says about a full GPU, in a few words: "2.00 GiB were asked for and 0.50 GiB were free"."""
    asked = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", message)
    free = re.search(r"of which ([\d.]+ [KMG]iB) is free", message)
    if asked and free:
        return f"{asked[1]} were asked for and {free[1]} were free"
    return f"{asked[1]} were asked for" if asked else message.splitlines()[0]

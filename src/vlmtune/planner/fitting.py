"""The fastest setting that fits a card, and what the others would need and take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmtune.console import bar, progress
from vlmtune.plan import cards
from vlmtune.plan.cards import Card, find_card, smallest_card
from vlmtune.plan.forecast import Forecast
from vlmtune.plan.words import as_arguments
from vlmtune.planner.material import Material
from vlmtune.recipe import Recipe
from vlmtune.trainer import CHECKPOINTING as SWITCHES
from vlmtune.trainer import checkpoint_every, plain_config

NAMES = tuple(name for name in SWITCHES if name != "gradient_checkpointing")
CHECKPOINTING = (0, 4, 2, 1)  # recompute nothing, every so many layers, all: each needs less than the one before
ROWS_AT_ONCE = "train.per_device_train_batch_size"
SMALLEST = 28 * 28  # pixels that a picture is halved to at most

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """A setting, as values of the recipe, and what it would be like."""

    overrides: dict[str, Any]
    forecast: Forecast
    given_up: int = 0  # of what a recipe wants, in the order in which it is given up


class Search:
    """Goes through settings that train on the same rows in each step.

    Args:
        recipe: what it says about pixels, packing and margin holds.
        card: whose memory counts.
        forecast: of the recipe with other values.
        material: of the recipe as it is.
        below_gib: what a setting may need at most, beside the margin: less than one that has failed.

    """

    def __init__(
        self,
        recipe: Recipe,
        card: Card,
        forecast: Callable[[Overrides], Forecast],
        material: Material,
        *,
        below_gib: float | None = None,
    ) -> None:
        self.recipe, self.card, self._forecast, self._material = recipe, card, forecast, material
        limit = (1 - recipe.plan.margin) * card.visible_gib
        self.limit_gib = limit if below_gib is None else min(limit, below_gib)

    def run(self) -> list[Tried]:
        """Goes through the candidates; leaves out what needs more than one that does not fit, and gives nothing up in vain."""
        tried: list[Tried] = []
        for given_up in range(len(self._to_give_up())):
            rows = self.candidates(given_up)
            with progress() as shown:
                task = shown.add_task("Trying settings", total=sum(map(len, rows)), text="")
                for row in rows:
                    for place, overrides in enumerate(row, 1):
                        tried.append(Tried(overrides, self._forecast(overrides), given_up))
                        shown.advance(task)
                        if not self._fits(tried[-1].forecast):
                            shown.advance(task, len(row) - place)
                            break
            if any(self._fits(one.forecast) for one in tried):
                break
        return tried

    def nearest(self) -> list[Tried]:
        """From the recipe's own setting on, more recomputed and fewer rows at once, to the first that fits."""
        tried: list[Tried] = []
        now = plain_config(self.recipe).per_device_train_batch_size
        settings = [
            (given_up, overrides)
            for given_up in range(len(self._to_give_up()))
            for by_size in reversed(list(zip(*self.candidates(given_up), strict=True)))
            for overrides in by_size
            if overrides[ROWS_AT_ONCE] <= now
        ]
        for given_up, overrides in bar(settings, "Looking for what would fit"):
            tried.append(Tried(overrides, self._forecast(overrides), given_up))
            if self._fits(tried[-1].forecast):
                break
        return tried

    def candidates(self, given_up: int) -> list[list[dict[str, Any]]]:
        """Lists, one for each way to checkpoint, of settings in which each needs at least as much as the one before."""
        config = plain_config(self.recipe)
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        sizes = [size for size in range(1, min(rows, len(self._material.lengths)) + 1) if rows % size == 0]
        always = self._to_give_up()[given_up]
        always |= {f"train.{name}": None for name in NAMES if name in self.recipe.train}  # the other names would count
        always |= {"packing.length": None} if self.recipe.packing.length else {}
        return [
            [
                {
                    ROWS_AT_ONCE: size,
                    "train.gradient_accumulation_steps": rows // size,
                    "train.gradient_checkpointing": every or False,
                    **always,
                }
                for size in sizes
            ]
            for every in CHECKPOINTING
        ]

    def best(self, tried: list[Tried]) -> Tried | None:
        """The fastest that fits, of two as fast the one that needs less; nothing is given up that need not be."""
        fitting = [one for one in tried if self._fits(one.forecast)]
        return min(
            fitting,
            key=lambda one: (one.given_up, round(self._seconds(one.forecast), 3), one.forecast.memory.needed_gib),
            default=None,
        )

    def changes(self, overrides: Overrides) -> dict[str, Any]:
        """Those that change something."""
        config, every = plain_config(self.recipe), checkpoint_every(self.recipe, on_gpu=True)
        now: dict[str, Any] = {
            ROWS_AT_ONCE: config.per_device_train_batch_size,
            "train.gradient_accumulation_steps": config.gradient_accumulation_steps,
        }
        if not any(f"train.{name}" in overrides for name in NAMES):  # else what it says now goes with them
            now["train.gradient_checkpointing"] = every or False
        return {key: value for key, value in overrides.items() if key not in now or now[key] != value}

    def advice(self, tried: list[Tried]) -> str:
        """What would fit, for a recipe that does not: the fastest setting, or else the smallest card."""
        if (best := self.best(tried)) is not None:
            changes = as_arguments(self.changes(best.overrides))
            return f"{changes} needs {best.forecast.memory.needed_gib:.1f} GiB"
        least = min((one.forecast.memory.needed_gib for one in tried), default=0)
        card = smallest_card(least)
        where = f"the smallest card for it is {card.name}, with {card.visible_gib:.0f} GiB" if card else "no card has that"
        others = "lower images.max_pixels, shorten the rows or take a smaller model"
        return f"no setting fits: the thriftiest needs {least:.1f} GiB, and {where}; or {others}"

    def _to_give_up(self) -> list[dict[str, Any]]:
        """Nothing, then the vision cache, which may take more memory to fill than a step, then pixels where that is allowed."""
        auto = self.recipe.vision_cache.mode == "auto" and self._material.largest_picture is not None
        caches: list[dict[str, Any]] = [{}, {"vision_cache": "off"}] if auto else [{}]
        return [{**cache, **({"images.max_pixels": pixels} if pixels else {})} for pixels in self._pixels() for cache in caches]

    def _pixels(self) -> list[int | None]:
        """The recipe's own, None, then halves of it as far down as the recipe allows."""
        smallest, largest = self.recipe.plan.smallest_max_pixels, self.recipe.images.max_pixels
        if smallest is None or self._material.largest_picture is None:
            return [None]
        if largest is None:
            width, height = self._material.collator.album.size(self._material.largest_picture)
            largest = width * height
        halves = [largest >> times for times in range(1, 20) if largest >> times > max(smallest, SMALLEST)]
        return [None, *halves, smallest] if smallest < largest else [None]

    def _fits(self, forecast: Forecast) -> bool:
        return forecast.memory.needed_gib <= self.limit_gib

    def _seconds(self, forecast: Forecast) -> float:
        """Of a step; of a card that is only a size, as on an L4."""
        card = self.card if self.card.tflops else find_card(cards.CARDS_24GB[0])
        return cards.seconds(forecast.work, card)

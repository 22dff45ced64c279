"""`python -m vlmtune.planner.process REQUEST REPLY`: reads the rows, simulates steps, writes what came out.

It has no weights and no GPU, and it changes functions of torch and TRL while a step is simulated. `plan` starts it.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlmtune.batching import passes, steps_per_epoch
from vlmtune.errors import VlmtuneError, one_line
from vlmtune.plan.cards import Card, find_card
from vlmtune.plan.forecast import Forecast, Plan
from vlmtune.planner.fitting import Overrides, Search, Tried
from vlmtune.planner.forecasting import Forecaster
from vlmtune.planner.material import Material, read_material
from vlmtune.recipe import Recipe, load_recipe
from vlmtune.trainer import plain_config

NOBODYS_CARD = "24GB"  # where no card is named and none is here
Measured = Sequence[Mapping[str, Any]]


def plan_recipe(
    recipe: Recipe,
    card: Card,
    *,
    fit: bool = False,
    advise: bool = True,
    below_gib: float | None = None,
    measured: Measured = (),
) -> Plan:
    """The plan of a recipe as it is, or with `fit` of the fastest setting that fits.

    Args:
        recipe: what to train.
        card: on what.
        fit: search, and keep what was compared.
        advise: search too where it does not fit.
        below_gib: what a setting may need at most, beside the recipe's margin.
        measured: what runs on such a card with this model needed and took.

    Raises:
        VlmtuneError: a mistake in the recipe, no config, rows that cannot be read, a model that cannot be simulated.

    """
    workshop = Workshop(recipe, card, measured)
    tried = Tried({}, workshop.forecast({}))
    search = Search(recipe, card, workshop.forecast, workshop.material(recipe), below_gib=below_gib)
    compared = search.run() if fit else []
    chosen = search.best(compared) or tried
    advice = ""
    if advise and chosen is tried and tried.forecast.cards[0].verdict != "fits":
        advice = search.advice(compared or search.nearest())
    return _plan(workshop, search, chosen, compared, advice)


class Workshop:
    """Forecasts of a recipe with other values, each made once."""

    def __init__(self, recipe: Recipe, card: Card, measured: Measured) -> None:
        self.recipe, self.card, self.measured = recipe, card, measured
        self._forecasts: dict[str, Forecast] = {}
        self._materials: dict[tuple[int | None, int | None], Material] = {}
        self._extra = max((entry["reserved_gib"] - entry["predicted_reserved_gib"] for entry in measured), default=0)
        took = [
            entry["step_seconds"] / entry["predicted_step_seconds"] for entry in measured if entry["predicted_step_seconds"]
        ]
        self._slower = median(took) if took else 1

    def forecast(self, overrides: Overrides) -> Forecast:
        """Of the recipe with these values."""
        key = json.dumps(overrides, sort_keys=True)
        if key not in self._forecasts:
            recipe = load_recipe(self.recipe, **overrides)
            taught: dict[str, float] = {"extra_gib": max(self._extra, 0), "slower": self._slower}
            self._forecasts[key] = Forecaster(recipe, self.material(recipe), self.card, **taught).forecast()
        return self._forecasts[key]

    def material(self, recipe: Recipe) -> Material:
        """Rows, read once for each number of pixels and each limit of a pack, by which rows are too long."""
        key = recipe.images.max_pixels, recipe.packing.length
        if key not in self._materials:
            self._materials[key] = read_material(recipe)
        return self._materials[key]


def _plan(workshop: Workshop, search: Search, chosen: Tried, compared: list[Tried], advice: str) -> Plan:
    forecast, recipe = chosen.forecast, load_recipe(workshop.recipe, **chosen.overrides)
    card, memory, material = forecast.cards[0], forecast.memory, workshop.material(recipe)
    return Plan(
        model=recipe.model.name,
        family=material.family.name,
        card=card.card,
        visible_gib=card.visible_gib,
        verdict=card.verdict,
        fits=card.verdict == "fits",
        peak_gib=memory.peak_gib,
        reserved_gib=memory.reserved_gib,
        needed_gib=memory.needed_gib,
        step_seconds=card.step_seconds,
        samples_per_second=card.samples_per_second,
        tokens_per_second=card.tokens_per_second,
        epoch_seconds=card.epoch_seconds,
        run_price=card.run_price,
        confidence=forecast.confidence,
        breakdown=memory.breakdown,
        advice=advice,
        rows=material.total,
        steps=_steps(recipe, material.total) if material.total is not None else None,
        forecast=forecast,
        overrides=search.changes(chosen.overrides),
        frontier=sorted((one.forecast for one in compared), key=lambda one: one.memory.needed_gib),
        measured=[dict(entry) for entry in workshop.measured],
        versions={name: version(name) for name in ("vlmtune", "torch", "transformers", "trl", "peft", "bitsandbytes")},
    )


def _steps(recipe: Recipe, rows: int) -> int:
    """Of the whole run, of which the last epoch need not be a whole one."""
    config = plain_config(recipe)
    return math.ceil(passes(config, rows) * steps_per_epoch(config, rows))


def answer(asked: Mapping[str, Any]) -> Plan:
    """What a request asks for, as `plan` writes it."""
    recipe = load_recipe(asked["recipe"], **asked["overrides"])
    card = find_card(asked["gpu"] or recipe.plan.gpu or asked["here"] or NOBODYS_CARD)
    names = (recipe.model.name, str(Path(recipe.model.name).expanduser().absolute()))  # runs know a directory by its whole path
    measured = [entry for entry in asked["measured"] if entry["card"] == card.name and entry["model"] in names]
    options = {name: asked[name] for name in ("fit", "advise", "below_gib")}
    return plan_recipe(recipe, card, **options, measured=measured)


def main(request: Path, reply: Path) -> None:
    """Reads a request, and writes a plan or the sentence that says why there is none."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        found = answer(json.loads(request.read_text(encoding="utf-8"))).model_dump_json()
    except VlmtuneError as error:
        found = json.dumps({"error": type(error).__name__, "message": str(error)})
    except Exception as error:  # of the model's own code, which meets tensors without values
        why = f"{type(error).__name__}: {one_line(error)}"
        found = json.dumps({"error": "ModelError", "message": f"the model cannot be simulated, its memory is unknown ({why})"})
    reply.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

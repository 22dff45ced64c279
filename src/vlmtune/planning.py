"""The process of a plan, `python -m vlmtune.planning REQUEST ANSWER`: reads the rows, simulates steps, writes what came out.

It has no weights and no GPU, and it changes functions of torch and TRL while a step is simulated. `plan` starts it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtune import cards
from vlmtune.batching import Row, counted_rows, longest_row, micro_batches, passes, rows_per_step, usable_rows
from vlmtune.cards import Card, find_card
from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.console import progress
from vlmtune.errors import ModelError, VlmtuneError
from vlmtune.families import Family, find_family
from vlmtune.forecast import Batch, Forecast, Memory, Plan, Setting, Work
from vlmtune.kernels import CUDA, CUDA_BEFORE_AMPERE, Device
from vlmtune.ledger import Outline, Where
from vlmtune.model import bound_pixels, load_config, positions_model, read_processor
from vlmtune.published import published_config, published_processor
from vlmtune.recipe import Recipe, load_recipe
from vlmtune.simulation import Outcome, Simulation, outline, simulation
from vlmtune.stated import stated_rows
from vlmtune.trainer import checkpoint_every, sft_config

GIB = 2**30
CONTEXT_GIB = 0.55  # of CUDA, cuBLAS and bitsandbytes' kernels: 0.5 to 0.6 GiB, and on no two drivers the same
ALLOWANCE_GIB = 0.3  # what a simulation cannot see: kernels' private workspace, other programs on the card
KNOWN = ("aten", "bitsandbytes", "torch_attn", "prims", "profiler")  # namespaces of operators whose kernels are known
SAMPLED = 2000  # rows in which the one with the most pictures is looked for
PARTS = {"forward": "text activations", "loss": "logits and loss", "again": "recomputation", "backward": "backward pass"}
NOBODYS_CARD = "24GB"  # where no card is named and none is here
OF_HEAD = "ChunkedLogProbFunctionBackward"  # TRL's node
NOT_FOR_PLANS: dict[str, Any] = {"use_cpu": True, "tf32": None, "report_to": "none"}


@dataclass(frozen=True)
class Material:
    """What a recipe trains on, and with what it is made into batches."""

    recipe: Recipe
    config: Any
    family: Family
    collator: MultimodalCollator
    rows: Sequence[Row]
    lengths: Sequence[int]
    total: int | None  # rows in all, where that is known
    stated: bool


def read_material(recipe: Recipe) -> Material:
    """Rows and processor of a recipe: the real ones, or where sizes are stated such rows.

    Raises:
        VlmtuneError: a mistake in the recipe or its rows, no config, no processor, no data.

    """
    section, data = recipe.model, recipe.data
    config = published_config(section.name) or load_config(section)
    family = find_family(section.family, config=config)
    stated = data.text_tokens is not None
    processor = published_processor(section.name) if stated else None
    if processor is None:
        try:
            processor = read_processor(section, family)
        except ModelError as error:
            raise ModelError(f"{error}; or state data.image_size and data.text_tokens for a plan without it") from error
    bound_pixels(recipe, processor, family)
    collator = MultimodalCollator(processor, family, recipe.train_on_inputs, max_length=longest_row(recipe, config))
    sft = plain_config(recipe)
    if data.text_tokens is not None:
        sizes = [(width, height) for width, height in data.image_sizes]
        row, *_ = stated_rows(collator, text_tokens=data.text_tokens, image_sizes=sizes, count=1)
        length, count = collator.lengths([row])[0], data.max_rows or rows_per_step(sft)
        return Material(recipe, config, family, collator, [row] * count, [length] * count, data.max_rows, stated=True)
    split, lengths = counted_rows(recipe, usable_rows(recipe, sft.seed, check_images=False), collator)
    return Material(recipe, config, family, collator, split.train, lengths, len(split.train), stated=False)


def plain_config(recipe: Recipe) -> Any:
    """TRL's configuration without what asks for a GPU."""
    return sft_config(recipe.model_copy(update={"train": {**recipe.train, **NOT_FOR_PLANS}}))


class Forecaster:
    """Forecasts of one recipe under one setting.

    Args:
        material: its rows.
        card: whose kernels run and whose memory counts.
        extra_gib: what real runs on such a card needed more than was predicted.
        slower: how many times as long as predicted they took.

    """

    def __init__(self, material: Material, card: Card, *, extra_gib: float = 0, slower: float = 1) -> None:
        self.material, self.card = material, card
        self._recipe, self._family = material.recipe, material.family
        self._extra, self._slower = extra_gib, slower
        self._config = plain_config(self._recipe)
        self._every = checkpoint_every(self._recipe, on_gpu=True)
        self._notes: list[str] = []
        self._packed = self._recipe.packing.mode != "off"
        self._simulation = self._built()
        self._plan = micro_batches(self._recipe, self._config, material.lengths, packed=self._packed)

    def forecast(self) -> Forecast:
        """What the setting needs and takes."""
        steps = self._plan.steps(0)
        groups = sorted((group for step in steps for group in (slot[0] for slot in step)), key=self._tokens)
        last = len(groups) - 1
        chosen = {"worst": groups[last], "95th percentile": groups[round(0.95 * last)], "typical": groups[last // 2]}
        if many := self._most_pictures(groups):
            chosen["most pictures"] = many
        outcomes: dict[tuple[int, ...], Outcome] = {}
        for group in chosen.values():
            if self._key(group) not in outcomes:
                outcomes[self._key(group)] = self._run(group)
        by_name = {name: outcomes[self._key(group)] for name, group in chosen.items()}
        batches = [self._describe(name, group) for name, group in chosen.items()]
        if self._cached:
            by_name["filling the vision cache"] = self._filling
            filling = Batch(
                name="filling the vision cache",
                rows=0,
                tokens=0,
                pictures=self._family.pictures_at_once,
                example="the largest pictures",
            )
            batches.append(filling)
        needed = {name: self._needed(outcome) for name, outcome in by_name.items()}
        worst = by_name[max(needed, key=needed.__getitem__)]
        work = self._work(by_name["typical"], self._tokens(chosen["typical"]))
        memory = self._memory(worst)
        return Forecast(
            setting=self._setting(),
            memory=memory,
            batches=batches,
            peaks=needed,
            work=work,
            cards=[self._speed(card, memory.needed_gib, work) for card in self._cards()],
            confidence=self._confidence(worst),
            notes=self._all_notes(worst),
        )

    @cached_property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        each = -(-len(self.material.lengths) // rows_per_step(self._config))
        return self._config.max_steps if self._config.max_steps > 0 else round(self._config.num_train_epochs * each)

    def _built(self) -> Simulation:
        def build(*, packed: bool) -> Simulation:
            model = outline(self._recipe, self._family, self.material.config)
            self._positions = positions_model(model)
            return simulation(
                self._recipe,
                model,
                self.material.collator.processor,
                self._family,
                device=device_of(self.card),
                checkpointing=self._every,
                packed=packed,
            )

        try:
            return build(packed=self._packed)
        except ModelError as error:
            if not self._packed or self._recipe.packing.length:
                raise
            self._packed = False
            self._notes.append(f"rows are padded: {error}")
            return build(packed=False)

    def _run(self, group: Sequence[int]) -> Outcome:
        """The step of which this micro-batch is the last; the others wait beside the card."""
        return self._simulation.step(self._batch(group), accumulates=self._plan.micro_batches > 1)

    def _batch(self, group: Sequence[int]) -> dict[str, Any]:
        """The micro-batch as the model gets it; floats on the meta device where that is simpler."""
        rows = [self.material.rows[position] for position in group]
        batch = self.material.collator(rows)
        if self._cached:
            features = [feature for source in self._sources(rows) for feature in self._encoded(source)[1]]
            with Outline():
                batch["image_features"] = self._family.join_features(batch, features)
            batch = {name: values for name, values in batch.items() if not name.startswith("pixel_")}
        return self._family.flatten(batch, self._positions) if self._packed else batch

    def _encoded(self, source: Any, times: int = 1) -> tuple[Outcome, list[Tensor]]:
        """What the tower makes of pictures of one size, which is all that counts."""
        key = (*self.material.collator.album.size(source), times)
        if key not in self._known_features:
            self._known_features[key] = self._simulation.encode(self.material.collator.pictures([source] * times))
        return self._known_features[key]

    @cached_property
    def _known_features(self) -> dict[Any, tuple[Outcome, list[Tensor]]]:
        return {}

    @cached_property
    def _cached(self) -> bool:
        """Whether features of the pictures are read, as `vision_cache` decides where there is room for them."""
        mode, frozen = self._recipe.vision_cache.mode, self._recipe.lora.scope == "language"
        if mode == "off" or not frozen or not self._sources(self._some_rows):
            return False
        return mode != "auto" or passes(self._config, len(self.material.lengths)) > 1

    @cached_property
    def _some_rows(self) -> list[Row]:
        count = len(self.material.rows)
        if self.material.stated:
            return [self.material.rows[0]]
        return [self.material.rows[position] for position in range(0, count, max(count // SAMPLED, 1))]

    @cached_property
    def _filling(self) -> Outcome:
        """The tower with the largest pictures."""
        album = self.material.collator.album
        largest = max(self._sources(self._some_rows), key=lambda source: album.size(source)[0] * album.size(source)[1])
        return self._encoded(largest, self._family.pictures_at_once)[0]

    def _most_pictures(self, groups: Sequence[Sequence[int]]) -> Sequence[int] | None:
        """The micro-batch with the most pictures, where rows have more and fewer of them."""
        if len({len(pictures(row)) for row in self._some_rows}) < 2:
            return None
        return max(groups[-SAMPLED:], key=lambda group: len(self._sources([self.material.rows[row] for row in group])))

    @staticmethod
    def _sources(rows: Sequence[Row]) -> list[Any]:
        return [source for row in rows for source in pictures(row)]

    def _tokens(self, group: Sequence[int]) -> int:
        lengths = [self.material.lengths[row] for row in group]
        return sum(lengths) if self._packed else len(lengths) * max(lengths)

    def _key(self, group: Sequence[int]) -> tuple[int, ...]:
        """Stated rows are all the same: what counts is how many there are."""
        return (len(group),) if self.material.stated else tuple(group)

    def _describe(self, name: str, group: Sequence[int]) -> Batch:
        rows = [self.material.rows[position] for position in group]
        names = list(dict.fromkeys(str(row["name"]) for row in rows))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        example = f"{', '.join(names[:3])}{more}"
        return Batch(name=name, rows=len(rows), tokens=self._tokens(group), pictures=len(self._sources(rows)), example=example)

    def _setting(self) -> Setting:
        each, config = self._config.per_device_train_batch_size, self._config
        return Setting(
            micro_batch=each,
            accumulation=config.gradient_accumulation_steps,
            pack_length=self._recipe.packing.length if self._packed else None,
            packed=self._packed,
            checkpointing=self._every,
            attention=self._recipe.model.attention,
            max_pixels=self._recipe.images.max_pixels,
            cached=self._cached,
        )

    # ------------------------------------------------------------------------------------------------------- memory

    def _needed(self, outcome: Outcome) -> float:
        return outcome.reserved / GIB + CONTEXT_GIB + ALLOWANCE_GIB + self._extra

    def _memory(self, outcome: Outcome) -> Memory:
        live, last = outcome.at_peak()
        kinds: Counter[str] = Counter()
        for event in live:
            kinds[_part(event.where)] += event.size
        breakdown = {name: size / GIB for name, size in sorted(kinds.items(), key=lambda item: -item[1])}
        breakdown["rounding and fragmentation"] = (outcome.reserved - sum(kinds.values())) / GIB
        breakdown["CUDA context"] = CONTEXT_GIB
        breakdown["allowance for what is not seen"] = ALLOWANCE_GIB + self._extra
        return Memory(
            peak_gib=outcome.peak / GIB,
            reserved_gib=outcome.reserved / GIB,
            needed_gib=self._needed(outcome),
            breakdown=breakdown,
            peak_at=_place(last.where),
            timeline=[(phase, size / GIB) for phase, size in outcome.timeline()],
        )

    # -------------------------------------------------------------------------------------------------------- speed

    def _work(self, outcome: Outcome, tokens: int) -> Work:
        """Of a whole step, from one micro-batch of it."""
        share = self._tokens_per_step / tokens
        return Work(
            matmul_flops=share * outcome.flops.get("matmul", 0),
            attention_flops=share * outcome.flops.get("attention", 0),
            elementwise_bytes=share * outcome.bytes.get("elementwise", 0) * self._slower,
            dequantized_bytes=share * outcome.bytes.get("dequantized", 0),
            kernels=round(share * outcome.kernels),
        )

    @cached_property
    def _tokens_per_step(self) -> float:
        steps = self._plan.steps(0)
        return sum(self._tokens(slot[0]) for step in steps for slot in step) / len(steps)

    def _speed(self, card: Card, needed: float, work: Work) -> Any:
        rows = rows_per_step(self._config)
        epochs = passes(self._config, len(self.material.lengths))
        found = cards.speed(
            card,
            needed_gib=needed,
            work=work,
            rows_per_step=min(rows, len(self.material.lengths)),
            tokens_per_step=self._tokens_per_step,
            steps_per_epoch=-(-len(self.material.lengths) // rows),
            epochs=epochs,
        )
        if self.material.total is None:  # how many rows there are is not known
            return found.model_copy(update={"epoch_seconds": None, "run_seconds": None, "run_price": None})
        return found

    def _cards(self) -> list[Card]:
        return [self.card, *(find_card(name) for name in cards.CARDS_24GB if name != self.card.name)]

    # --------------------------------------------------------------------------------------------------- confidence

    def _strange(self, outcome: Outcome) -> list[str]:
        return sorted(name for name in outcome.operators if name.partition("::")[0] not in KNOWN)

    def _confidence(self, outcome: Outcome) -> Any:
        if self._strange(outcome):
            return "low"
        return "medium" if self._family.name == "generic" or self._doubts(outcome) else "high"

    def _doubts(self, outcome: Outcome) -> list[str]:
        doubts = list(self._simulation.stand_ins)
        if chosen := sorted(outcome.assumed - {"aten::_local_scalar_dense"}):
            doubts.append(f"{', '.join(chosen)} chooses by values: all are taken as chosen")
        return doubts

    def _all_notes(self, outcome: Outcome) -> list[str]:
        notes = [*self._notes, *self._doubts(outcome)]
        if strange := self._strange(outcome):
            notes.append(f"{', '.join(strange)}: what these operators' kernels take for themselves is not known")
        if self._cached:
            notes.append("the vision cache is taken to have room in memory or on the disk")
        if self._family.name == "generic" and self._packed:
            notes.append("packing is tried out on the model only when it is trained; padded rows need more")
        if not self.card.bf16:
            notes.append(f"{self.card.name} computes in float16, which is counted as bfloat16: as many bytes")
        if self._recipe.model.attention not in (None, "sdpa"):
            notes.append(f"{self._recipe.model.attention} is counted as torch's own attention")
        if self._recipe.train.get("torch_compile"):
            notes.append("torch_compile is left out of account")
        return notes


def device_of(card: Card) -> Device:
    """Whose kernels a card has."""
    return CUDA if card.bf16 else CUDA_BEFORE_AMPERE


def _part(where: Where | None) -> str:
    """What memory is counted under in a breakdown."""
    if where is None or where.what == "scratch":
        return "kernels' scratch"
    if where.what == "forward" and where.module.startswith("vision "):
        return "vision activations"
    if where.what == "backward" and where.module == OF_HEAD:
        return PARTS["loss"]
    return PARTS.get(where.what, where.what)


def _place(where: Where | None) -> str:
    """Where in the step, in words."""
    if where is None:
        return "before the step"
    module = f" of {where.module}" if where.module else ""
    when = {"again": "backward pass, recomputing", "loss": "loss"}.get(where.what, where.what)
    return f"{when}{module}, {where.operator}" if where.operator else when


# ------------------------------------------------------------------------------------------------------------ decisions


def make(recipe: Recipe, card: Card, *, fit: bool, measured: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan of a recipe; with `fit` of the fastest setting that fits, which `Plan.overrides` makes of the recipe."""
    shop = Shop(recipe, card, measured)
    forecast, overrides, frontier, advice = shop.forecast({}), {}, [], ""
    if fit:
        frontier = shop.search()
        best = shop.best()
        overrides, forecast = best if best is not None else ({}, forecast)
    if forecast.cards[0].verdict != "fits":
        advice = shop.advice(forecast)
    return _plan(shop, forecast, overrides, frontier, advice)


class Shop:
    """Forecasts of a recipe under other settings, each made once."""

    def __init__(self, recipe: Recipe, card: Card, measured: Sequence[Mapping[str, Any]]) -> None:
        self.recipe, self.card = recipe, card
        self.measured = [entry for entry in measured if entry["card"] == card.name and entry["model"] == recipe.model.name]
        self._known: dict[str, Forecast] = {}
        self._materials: dict[int | None, Material] = {}
        self.found: list[tuple[dict[str, Any], Forecast]] = []

    def forecast(self, overrides: Mapping[str, Any]) -> Forecast:
        """The forecast of the recipe with these values."""
        key = json.dumps(overrides, sort_keys=True)
        if key not in self._known:
            recipe = load_recipe(self.recipe, **overrides)
            material = replace(self.material(recipe), recipe=recipe)
            extra = max((entry["reserved_gib"] - entry["predicted_reserved_gib"] for entry in self.measured), default=0)
            self.forecaster = Forecaster(material, self.card, extra_gib=max(extra, 0), slower=self._slower())
            self._known[key] = self.forecaster.forecast()
        return self._known[key]

    def material(self, recipe: Recipe) -> Material:
        """Rows with pictures of the recipe's pixels: counted once for each."""
        pixels = recipe.images.max_pixels
        if pixels not in self._materials:
            self._materials[pixels] = read_material(recipe)
        return self._materials[pixels]

    def candidates(self) -> list[list[dict[str, Any]]]:
        """Settings with the same rows in a step: lists in which each needs more memory than the one before."""
        config = plain_config(self.recipe)
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        most = min(rows, len(self.material(self.recipe).lengths))
        sizes = [size for size in range(1, most + 1) if rows % size == 0]
        return [
            [
                {
                    "train.per_device_train_batch_size": size,
                    "train.gradient_accumulation_steps": rows // size,
                    "train.gradient_checkpointing": every or False,
                    **({"packing": {"mode": self.recipe.packing.mode}} if self.recipe.packing.length else {}),
                    **({"images.max_pixels": pixels} if pixels else {}),
                }
                for size in sizes
            ]
            for pixels in self._pixels()
            for every in CHECKPOINTING
        ]

    def search(self) -> list[Forecast]:
        """Goes through the candidates; what needs more than one that does not fit is left out."""
        rows = self.candidates()
        with progress() as shown:
            task = shown.add_task("Trying settings", total=sum(map(len, rows)), text="")
            for row in rows:
                for overrides in row:
                    forecast = self.forecast(overrides)
                    self.found.append((overrides, forecast))
                    shown.advance(task)
                    if not self._fits(forecast):
                        break
                shown.advance(task, len(row) - 1 - row.index(self.found[-1][0]))
        return [forecast for _, forecast in sorted(self.found, key=lambda pair: pair[1].memory.needed_gib)]

    def best(self) -> tuple[dict[str, Any], Forecast] | None:
        """The fastest that fits; pictures are made smaller only where nothing fits otherwise. Of two as fast the smaller."""
        fitting = [pair for pair in self.found if self._fits(pair[1])]
        for pixels in self._pixels():
            some = [pair for pair in fitting if pair[1].setting.max_pixels == (pixels or self.recipe.images.max_pixels)]
            if some:
                return min(some, key=lambda pair: (self._seconds(pair[1]), pair[1].memory.needed_gib))
        return None

    def advice(self, forecast: Forecast) -> str:
        """The fastest setting that would fit, or the smallest card on which the thriftiest would."""
        if not self.found:
            self.search()
        if (best := self.best()) is not None:
            changes = " ".join(f"{key}={_value(value)}" for key, value in self._changes(best[0]).items())
            return f"{changes} needs {best[1].memory.needed_gib:.1f} GiB"
        least = min((pair[1] for pair in self.found), key=lambda one: one.memory.needed_gib)
        card = cards.smallest_card(forecast.memory.needed_gib)
        thrifty = cards.smallest_card(least.memory.needed_gib)
        what = f"no setting fits: the thriftiest needs {least.memory.needed_gib:.1f} GiB"
        if thrifty is None:
            return f"{what}, more than any card has; lower images.max_pixels, shorten the rows or take a smaller model"
        return f"{what}, which a card with {thrifty.visible_gib:.0f} GiB has ({thrifty.name}" + (
            f"; this one fits {card.name})" if card and card is not thrifty else ")"
        )

    def _changes(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Those that change something."""
        config, every = plain_config(self.recipe), checkpoint_every(self.recipe, on_gpu=True)
        now = {
            "train.per_device_train_batch_size": config.per_device_train_batch_size,
            "train.gradient_accumulation_steps": config.gradient_accumulation_steps,
            "train.gradient_checkpointing": every or False,
        }
        return {key: value for key, value in overrides.items() if now.get(key) != value}

    def _pixels(self) -> list[int | None]:
        """The recipe's own, then halves of it, as far down as the recipe allows."""
        smallest, now = self.recipe.plan.smallest_max_pixels, self.recipe.images.max_pixels
        if smallest is None:
            return [None]
        sizes = [self.material(self.recipe).collator.album.size(source) for source in self._sources()]
        largest = now or max((width * height for width, height in sizes), default=smallest)
        steps = [None, *(largest >> halvings for halvings in range(1, 12) if largest >> halvings > smallest), smallest]
        return steps if largest > smallest else [None]

    def _sources(self) -> list[Any]:
        material = self.material(self.recipe)
        every = max(len(material.rows) // SAMPLED, 1)
        return [source for row in range(0, len(material.rows), every) for source in pictures(material.rows[row])]

    def _fits(self, forecast: Forecast) -> bool:
        return forecast.memory.needed_gib <= (1 - self.recipe.plan.margin) * self.card.visible_gib

    def _seconds(self, forecast: Forecast) -> float:
        """For a card that is only a size, on the slowest of those that have it: which of two settings is faster is the same."""
        card = self.card if self.card.tflops else find_card(cards.CARDS_24GB[0])
        return cards.seconds(forecast.work, card)

    def _slower(self) -> float:
        factors = sorted(
            entry["step_seconds"] / entry["predicted_step_seconds"]
            for entry in self.measured
            if entry.get("predicted_step_seconds")
        )
        return factors[len(factors) // 2] if factors else 1


CHECKPOINTING = (0, 4, 2, 1)  # recompute none, every so many layers, all


def _value(value: Any) -> str:
    return json.dumps(value)


def _plan(shop: Shop, forecast: Forecast, overrides: dict[str, Any], frontier: list[Forecast], advice: str) -> Plan:
    first, material = forecast.cards[0], shop.material(shop.recipe)
    return Plan(
        model=shop.recipe.model.name,
        family=material.family.name,
        card=shop.card.name,
        visible_gib=shop.card.visible_gib,
        verdict=first.verdict,
        fits=first.verdict == "fits",
        peak_gib=forecast.memory.peak_gib,
        reserved_gib=forecast.memory.reserved_gib,
        needed_gib=forecast.memory.needed_gib,
        step_seconds=first.step_seconds,
        samples_per_second=first.samples_per_second,
        tokens_per_second=first.tokens_per_second,
        epoch_seconds=first.epoch_seconds,
        run_price=first.run_price,
        confidence=forecast.confidence,
        breakdown=forecast.memory.breakdown,
        advice=advice,
        rows=len(material.lengths),
        steps=shop.forecaster.steps,
        forecast=forecast,
        overrides=shop._changes(overrides),
        frontier=frontier,
        measured=[dict(entry) for entry in shop.measured],
        versions={name: version(name) for name in ("vlmtune", "torch", "transformers", "trl", "peft", "bitsandbytes")},
    )


def main(request: Path, answer: Path) -> None:
    """Reads a request as `plan.make_plan` writes it, and writes a plan, or the sentence that says why there is none."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    asked = json.loads(request.read_text(encoding="utf-8"))
    try:
        recipe = load_recipe(asked["recipe"], **asked["overrides"])
        card = find_card(asked["gpu"] or recipe.plan.gpu or asked["here"] or NOBODYS_CARD)
        plan = make(recipe, card, fit=asked["fit"], measured=asked["measured"])
        answer.write_text(plan.model_dump_json(), encoding="utf-8")
    except VlmtuneError as error:
        answer.write_text(json.dumps({"error": type(error).__name__, "message": str(error)}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

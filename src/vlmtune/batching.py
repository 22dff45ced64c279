"""From rows to micro-batches: their tokens counted, packed where that is right, planned for every epoch."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from vlmtune.album import Album
from vlmtune.batch import steady
from vlmtune.collator import MultimodalCollator, PackingCollator
from vlmtune.console import progress
from vlmtune.data import Rows, Split, find_bad_rows, load_data
from vlmtune.errors import DatasetError, RecipeError
from vlmtune.families import Family
from vlmtune.model import positions_model
from vlmtune.packing import BatchPlan, step_bounds
from vlmtune.proof import packs_tried_out
from vlmtune.recipe import Recipe
from vlmtune.records import Records, digest
from vlmtune.shrinking import Tokens, shrink, tokens_of

if TYPE_CHECKING:
    from trl import SFTConfig

Row = Mapping[str, Any]
Collator = Callable[[Sequence[Row]], Mapping[str, Any]]
AT_ONCE = 32  # rows in one call of the processor


@dataclass(frozen=True)
class Batching:
    """How the training rows become batches."""

    collator: Collator
    padded: Collator  # of evaluations
    plan: BatchPlan | None  # None: the trainer's own batches
    packing: str  # what was decided, and why, in a few words


def usable_rows(recipe: Recipe, seed: int, *, check_images: bool, album: Album | None = None) -> Split:
    """The recipe's rows that can be formatted, and with `check_images` whose pictures can be decoded.

    The album learns of the pictures what checking them tells.

    Raises:
        DatasetError: there are others, and the recipe does not say to drop them.

    """

    def bad(rows: Rows) -> dict[int, str]:
        return find_bad_rows(rows, check_images=check_images, album=album)

    split = load_data(recipe.data, seed=seed)
    return split.without(bad, policy=recipe.on_bad_row, hint="set `on_bad_row: drop` to go on without them")


def collator_of(recipe: Recipe, processor: Any, family: Family, config: Any) -> MultimodalCollator:
    """The collator that a recipe trains with, for a model of this config.

    Raises:
        RecipeError: its chat template's file cannot be read.
        ModelError: no chat template that the recipe can be trained with.

    """
    template: str | None = None
    if recipe.chat_template is not None:
        try:
            template = Path(recipe.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"`chat_template`: {recipe.chat_template} cannot be read: {error}") from None
    longest = longest_row(recipe, config)
    return MultimodalCollator(processor, family, recipe.train_on_inputs, max_length=longest, chat_template=template)


def longest_row(recipe: Recipe, config: Any) -> int | None:
    """Tokens of the longest row: the recipe's limit, and never more than a model of this config has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    pack = recipe.packing.length if recipe.packing.mode != "off" else None
    limits = [limit for limit in (recipe.train.get("max_length"), pack, positions) if limit]
    return min(limits) if limits else None


def counted_rows(recipe: Recipe, split: Split, collator: MultimodalCollator) -> tuple[Split, list[int]]:
    """The rows that the processor takes and the model in one piece, and the tokens of each training row.

    Where the recipe says so, those that are too long get smaller pictures; where no size is small enough, they are bad rows.

    Raises:
        DatasetError: there are others, and the recipe does not say to drop them.

    """
    tokens: Tokens = {}

    def refused(rows: Rows) -> dict[int, str]:
        return _count(rows, collator, tokens)

    def too_long(rows: Rows) -> dict[int, str]:
        limit = collator.max_length or math.inf
        return {
            position: f"it has {count} tokens and the limit is {limit}"
            for position, count in enumerate(tokens_of(rows, tokens))
            if count > limit
        }

    split = split.without(refused, policy=recipe.on_bad_row, hint="set `on_bad_row: drop` to go on without them")
    policy, longer = recipe.on_too_long, f"raise train.max_length{' and packing.length' if recipe.packing.length else ''}"
    hint = f"shorten them, lower images.max_pixels, {longer}, or set `on_too_long: drop`, or `shrink` for smaller pictures"
    if policy == "shrink":
        split = shrink(split, collator, tokens)
        policy = recipe.on_bad_row  # of what is still too long
        hint = f"no smaller pictures would do: shorten their texts, {longer}, or set `on_bad_row: drop` to go on without them"
    split = split.without(too_long, policy=policy, hint=hint)
    return split, list(tokens_of(split.train, tokens))


def batching(
    recipe: Recipe,
    config: SFTConfig,
    model: PeftModel,
    collator: MultimodalCollator,
    rows: Rows,
    lengths: Sequence[int],
    agree: Callable[[Any], Any],
) -> Batching:
    """Micro-batches of the rows, whose lengths are in tokens: packed, or padded with rows of like length together.

    `agree` gives all processes the first one's value.

    Raises:
        RecipeError: packs of a certain length or rows of a picture together are asked for, and this model cannot have them.
        DatasetError: there are fewer rows than processes.

    """
    multiple = int(config.pad_to_multiple_of or steady(config.device, model.dtype))
    grouped = recipe.packing.group_by_image
    packing = PackingCollator(collator, positions_model(model), multiple, shares_pictures=grouped)
    obstacle, unshared, apart = "", "", False
    if recipe.packing.mode != "off":
        obstacle, unshared, apart = agree(packs_tried_out(model, packing, rows, lengths, compiled=config.torch_compile))
    if obstacle and recipe.packing.length:
        raise RecipeError(f"`packing.length` is {recipe.packing.length}, and {obstacle}")
    if unshared and grouped:
        raise RecipeError(f"`packing.group_by_image` is on, and {unshared}")
    packed = recipe.packing.mode != "off" and not obstacle
    together = agree(by_pictures(collator, rows)) if grouped else None
    plan = micro_batches(recipe, config, lengths, packed=packed, together=together)
    if packed:
        padding = f"padding only to a multiple of {multiple}" if multiple > 1 else "no padding"
        shared = "" if unshared else f", {_once(together)}"
        packing = replace(packing, shares=not unshared, apart=apart)
        return Batching(packing, collator, plan, f"on: {padding}{shared}, at most {plan.largest:,} tokens a micro-batch")
    return Batching(collator, collator, plan, f"off: {obstacle}" if obstacle else "off")


def _once(together: Sequence[int] | None) -> str:
    """What of packs is computed once, for the table of the run."""
    repeating = len(together) - len(set(together)) if together is not None else None
    return (
        "common prefixes once" if repeating is None else f"common prefixes and pictures once ({repeating} rows show another's)"
    )


def micro_batches(
    recipe: Recipe, config: SFTConfig, lengths: Sequence[int], *, packed: bool, together: Sequence[int] | None = None
) -> BatchPlan:
    """The plan of all epochs: micro-batches of as many tokens as the padded ones have at most, or as `packing.length` says.

    Args:
        recipe, config: the latter as the trainer has it.
        lengths: tokens of each row.
        packed: or padded.
        together: which rows are better together, as `by_pictures` numbers them.

    Raises:
        DatasetError: there are fewer rows than processes.

    """
    try:
        return BatchPlan(
            lengths,
            rows_per_step=rows_per_step(config),
            max_tokens=(packed and recipe.packing.length) or config.per_device_train_batch_size * max(lengths),
            packed=packed,
            together=together,
            epochs=math.ceil(passes(config, len(lengths))),
            seed=config.seed if config.data_seed is None else config.data_seed,
            shuffle=config.train_sampling_strategy == "random",
            rank=config.process_index,
            world=config.world_size,
        )
    except ValueError as error:
        raise DatasetError(str(error)) from error


def by_pictures(collator: MultimodalCollator, rows: Rows | Sequence[Row]) -> Sequence[int]:
    """A number for each row, the same for rows that show the same pictures; those that show none have one of their own."""
    known = Records("q")
    numbers = array("q")
    with progress() as bar:
        task = bar.add_task("Comparing pictures", total=len(rows), text="")
        for position in range(len(rows)):
            key = digest(repr(collator.shown(rows[position]) or position))
            if key not in known:
                known[key] = (position,)
            numbers.append(known[key][0])
            bar.advance(task)
    return numbers


def rows_per_step(config: SFTConfig) -> int:
    """Rows of an optimiser step, of all processes, however many micro-batches they make."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def passes(config: SFTConfig, rows: int) -> float:
    """How often a run goes through its rows."""
    return config.num_train_epochs if config.max_steps <= 0 else config.max_steps / steps_per_epoch(config, rows)


def steps_per_epoch(config: SFTConfig, rows: int) -> int:
    """Optimiser steps in which a run goes through its rows once."""
    return len(step_bounds(rows, rows_per_step(config), config.world_size)) - 1


def _count(rows: Rows, collator: MultimodalCollator, tokens: Tokens) -> dict[int, str]:
    """Enters the tokens of each row; position → why, of those that the processor refuses."""
    refused: dict[int, str] = {}
    counted = tokens.setdefault(rows.source, array("q", [0]) * len(rows.content))
    with progress() as shown:
        task = shown.add_task("Counting tokens", total=len(rows), text="")
        for start in range(0, len(rows), AT_ONCE):
            some = range(start, min(start + AT_ONCE, len(rows)))
            samples = [rows[position] for position in some]
            try:
                counts = collator.lengths(samples)
            except DatasetError:  # one of them; which, and are there others?
                counts = [_length(collator, sample) for sample in samples]
            for position, count in zip(some, counts, strict=True):
                if isinstance(count, str):
                    refused[position] = count.removeprefix(rows.name(position)).lstrip(": ")
                else:
                    counted[rows.indices[position]] = count
            shown.advance(task, len(some))
    return refused


def _length(collator: MultimodalCollator, sample: Row) -> int | str:
    try:
        return collator.lengths([sample])[0]
    except DatasetError as error:
        return str(error)

"""What a plan is about: a recipe's config, processor and rows, from the real data or from sizes that are stated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmtune.batching import Row, by_pictures, collator_of, counted_rows, rows_per_step, usable_rows
from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.data import Rows, spread
from vlmtune.errors import DatasetError, ModelError, RecipeError
from vlmtune.families import Family, find_family
from vlmtune.model import bound_pixels, load_config, read_processor
from vlmtune.planner.published import published_config, published_processor
from vlmtune.planner.stated import stated_rows
from vlmtune.recipe import Recipe
from vlmtune.trainer import plain_config

SAMPLED = 2000  # rows whose pictures' sizes are looked at
OR_STATE = "or state data.image_size and data.text_tokens, such as data.image_size=[500,500] data.text_tokens=378"


@dataclass(frozen=True)
class Material:
    """What a recipe trains on, and with what it is made into batches."""

    config: Any
    family: Family
    collator: MultimodalCollator
    rows: Rows | Sequence[Row]
    lengths: Sequence[int]  # tokens of each row
    total: int | None  # rows in all, where that is known
    stated: bool

    @cached_property
    def pictures(self) -> list[int]:
        """How many each row has."""
        return [len(pictures_of([self.rows[position]])) for position in range(len(self.lengths))]

    @cached_property
    def by_pictures(self) -> Sequence[int] | None:
        """As `batching.by_pictures`; None of stated sizes, which say nothing of it."""
        return None if self.stated else by_pictures(self.collator, self.rows)

    @cached_property
    def pictures_vary(self) -> bool:
        """Whether some rows have more pictures than others."""
        return not self.stated and len({len(pictures_of([row])) for row in spread(self.rows, SAMPLED)}) > 1

    @cached_property
    def largest_picture(self) -> Any:
        """Of some rows; None where none has a picture."""
        sources = pictures_of([self.rows[0]]) if self.stated else pictures_of(spread(self.rows, SAMPLED))
        return max(sources, key=self._area, default=None)

    def _area(self, source: Any) -> int:
        width, height = self.collator.album.size(source)
        return width * height


def pictures_of(rows: Iterable[Row]) -> list[Any]:
    """What the pictures of rows are read from."""
    return [source for row in rows for source in pictures(row)]


def read_material(recipe: Recipe) -> Material:
    """Rows and processor of a recipe: the real ones, or such as are stated.

    Of the three reference models nothing is read but the tokenizer, and where sizes are stated not even that.

    Raises:
        VlmtuneError: a mistake in the recipe or its rows, no config, no processor, no data.

    """
    section = recipe.model
    config = published_config(section.name) or load_config(section)
    family = find_family(section.family, config=config)
    collator = collator_of(recipe, _processor(recipe, family), family, config)
    sft = plain_config(recipe)
    if recipe.data.text_tokens is not None:
        return _stated(recipe, config, collator, sft)
    try:
        split = usable_rows(recipe, sft.seed, check_images=False)
    except DatasetError as error:
        if _on_disk(recipe.data.source):
            raise
        raise DatasetError(f"{error}; {OR_STATE}") from error
    split, lengths = counted_rows(recipe, split, collator)
    return Material(config, family, collator, split.train, lengths, len(split.train), stated=False)


def _processor(recipe: Recipe, family: Family) -> Any:
    processor = published_processor(recipe.model.name) if recipe.data.text_tokens is not None else None
    if processor is None:
        try:
            processor = read_processor(recipe.model, family)
        except ModelError as error:
            raise ModelError(f"{error}; {OR_STATE}") if published_processor(recipe.model.name) else error from error
    bound_pixels(recipe, processor, family)
    return processor


def _stated(recipe: Recipe, config: Any, collator: MultimodalCollator, sft: Any) -> Material:
    """As many rows as a step has, or `data.max_rows`."""
    sizes = [(width, height) for width, height in recipe.data.image_sizes]
    row, *_ = stated_rows(collator, text_tokens=recipe.data.text_tokens or 0, image_sizes=sizes, count=1)
    (length,), total = collator.lengths([row]), recipe.data.max_rows
    count = total or rows_per_step(sft)
    if collator.max_length and length > collator.max_length:
        raise RecipeError(
            f"a row of data.text_tokens and data.image_size has {length} tokens and the limit is {collator.max_length}: lower "
            "them or images.max_pixels, or raise train.max_length"
        )
    return Material(config, collator.family, collator, [row] * count, [length] * count, total, stated=True)


def _on_disk(source: str) -> bool:
    return Path(source).expanduser().exists()

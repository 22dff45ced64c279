"""Rows taken the way to the model, as far as it can be gone without the model, and made ready to be looked at.

Rows, processor, collator and plan are those of a run, so that what is shown is what will be trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmtune.batch import IGNORE, flatten
from vlmtune.batching import by_pictures, collator_of, counted_rows, micro_batches, usable_rows
from vlmtune.collator import MultimodalCollator, pictures
from vlmtune.data import Rows, spread
from vlmtune.families import token_ids
from vlmtune.images import original
from vlmtune.model import load_config, load_processor
from vlmtune.packing import BatchPlan
from vlmtune.preview.pieces import Piece, Reader
from vlmtune.preview.seen import Seen, seen_pictures
from vlmtune.preview.shown import ShownPack, ShownRow
from vlmtune.recipe import Recipe
from vlmtune.trainer import plain_config

PLACEHOLDERS = ("image_token", "image_break_token", "image_end_token")  # attributes of processors; the last two of Pixtral's


def look(recipe: Recipe, count: int) -> tuple[tuple[ShownRow, ...], ShownPack | None]:
    """Some rows, spread from the first to the last, and the first micro-batch; None where the recipe says `packing: off`.

    Raises:
        VlmtuneError: rows that cannot be used, no processor, no data.

    """
    config = plain_config(recipe)
    split = usable_rows(recipe, config.seed, check_images=recipe.data.check_images)
    processor, family = load_processor(recipe)
    collator = collator_of(recipe, processor, family, load_config(recipe.model))
    split, lengths = counted_rows(recipe, split, collator)
    rows = [_row(collator, sample) for sample in spread(split.train, count)]
    width = max(row.tokens for row in rows)
    shown = tuple(replace(row, padding=width - row.tokens) for row in rows)
    if recipe.packing.mode == "off":
        return shown, None
    together = by_pictures(collator, split.train) if recipe.packing.group_by_image else None
    return shown, _pack(collator, split.train, micro_batches(recipe, config, lengths, packed=True, together=together))


def _row(collator: MultimodalCollator, sample: Mapping[str, Any]) -> ShownRow:
    batch, sources = collator([sample]), pictures(sample)
    seen = seen_pictures(batch, collator.processor) or [Seen(collator.album.open(source)) for source in sources]
    if len(seen) == len(sources):  # a processor may make several of one
        seen = [replace(one, given=collator.album.size(original(source))) for one, source in zip(seen, sources, strict=True)]
    (pieces,) = _pieces(collator, [batch["input_ids"][0]], [batch["labels"][0]], seen)
    return ShownRow(sample["name"], pieces, tuple(seen))


def _pack(collator: MultimodalCollator, rows: Rows, plan: BatchPlan) -> ShownPack:
    """The first micro-batch of the first epoch."""
    samples = [rows[position] for position in plan.steps(0)[0][0][0]]
    batch = collator(samples)
    packed = flatten(batch)
    ids, labels = (packed[name][0].split(packed["segments"]) for name in ("input_ids", "labels"))
    pieces = _pieces(collator, ids, labels, seen_pictures(batch, collator.processor))
    named = zip(samples, pieces, strict=True)
    return ShownPack(tuple(ShownRow(sample["name"], cut) for sample, cut in named), plan.max_tokens)


def _pieces(
    collator: MultimodalCollator, ids: Sequence[Any], labels: Sequence[Any], seen: Sequence[Seen]
) -> list[tuple[Piece, ...]]:
    """The pieces of each row; all their pictures in order."""
    processor = collator.processor
    image = token_ids(processor, [token for name in PLACEHOLDERS if (token := getattr(processor, name, None))])
    video = collator.family.video_token_ids(processor)
    reader = Reader(collator.tokenizer, dict.fromkeys(image, "image") | dict.fromkeys(video, "video"))
    sizes = iter([(one.tokens, one.size) for one in seen])
    each = zip(ids, labels, strict=True)
    return [tuple(reader.read(row.tolist(), (told != IGNORE).tolist(), sizes)) for row, told in each]

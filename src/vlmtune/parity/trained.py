"""What training made of its rows: the collator that it had, some of the rows, and the contract that lies with the result."""

from __future__ import annotations

from pathlib import Path

from vlmtune.batching import collator_of, counted_rows
from vlmtune.collator import MultimodalCollator
from vlmtune.data import Rows, Split, find_bad_rows, load_data
from vlmtune.errors import ModelError
from vlmtune.families import find_family
from vlmtune.model import load_config, load_processor, read_processor
from vlmtune.parity.findings import Finding
from vlmtune.recipe import Recipe
from vlmtune.serving import Serving, digest, faults


def as_trained(recipe: Recipe, found: Serving, directory: Path) -> MultimodalCollator:
    """The collator that the run had; where the base is gone, around the processor that lies in the directory."""
    try:
        processor, family = load_processor(recipe)
        return collator_of(recipe, processor, family, load_config(recipe.model))
    except ModelError:
        family = find_family(found.model.family)
        processor = read_processor(found.model, family, directory)
        return MultimodalCollator(processor, family, recipe.train_on_inputs, chat_template=processor.chat_template)


def chosen(recipe: Recipe, collator: MultimodalCollator, count: int) -> Rows:
    """Some of the rows that were trained on, with their pictures as small as they were made."""
    rows = load_data(recipe.data, seed=int(recipe.train.get("seed", 42))).train
    few = rows.select([place * len(rows) // min(count, len(rows)) for place in range(min(count, len(rows)))])
    split = Split(few, None).without(find_bad_rows, policy=recipe.on_bad_row, hint="as in training")
    return counted_rows(recipe, split, collator)[0].train


def contract(found: Serving, directory: Path, collator: MultimodalCollator) -> list[Finding]:
    """Whether the directory still keeps its contract, and whether the recipe makes the template that was trained."""
    wrong = faults(found, directory, read_processor(found.model, collator.family, directory))
    if digest(collator.chat_template) != found.chat_template.sha256:
        wrong.append("the recipe makes another chat template than the one that was trained")
    if not wrong:
        return [Finding(str(directory), "contract", "equal", "template, pixels and stop tokens are those of serving.json")]
    return [Finding(str(directory), "contract", "broken", fault) for fault in wrong]

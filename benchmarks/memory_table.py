"""The tables of docs/memory.md: what a step needs and how fast it is, as vlmtune, TRL and the 2024 tutorial train.

    python benchmarks/memory_table.py                      # prints them, about six minutes on one core
    python benchmarks/memory_table.py --write docs/memory.md

Every row of a batch has a square picture and 378 tokens of text, of which about a third is the answer and trained on; a step
has 32 rows. vlmtune's rows are packed and read features of the pictures from its cache; the others' are padded, with one
token of padding in all rows but the first, so that attention has a mask and next to nothing is computed for padding.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from pages import markdown, put
from stacks import TRL, TUTORIAL, Stack, padded, pictured, pictured_recipe, simulated

from vlmtune.plan import cards
from vlmtune.plan.cards import Card, find_card
from vlmtune.plan.forecast import Work
from vlmtune.planner.forecasting import Forecaster, needed_gib, work_of
from vlmtune.planner.material import read_material

TEXT_TOKENS = 378  # of a row, as in flops.py
ROWS_PER_STEP = 32
SIDES = (256, 512, 768, 1024)  # px of a square picture
MICRO_BATCHES = (1, 4)
CHECKPOINTING = (0, 2, 1)  # of every how many layers
CARDS = tuple(map(find_card, ("L4", "RTX3090", "RTX4090")))
MODELS = {
    "Qwen2-VL-7B": ("Qwen/Qwen2-VL-7B-Instruct", SIDES),
    "Llama-3.2-11B-Vision": ("meta-llama/Llama-3.2-11B-Vision-Instruct", (512,)),  # four tiles, whatever the size
    "Pixtral-12B": ("mistral-community/pixtral-12b", SIDES),
}
RECOMPUTED = {0: "none", 1: "every", 2: "every 2nd"}
HEADER = ["picture", "trained by", "layers recomputed", "rows", "GiB", *(card.name for card in CARDS)]


@dataclass(frozen=True)
class Line:
    """A setting, what a step needs in it, and what it computes."""

    side: int
    tokens: int  # of a row
    stack: str
    checkpointing: int
    rows: int  # of a micro-batch
    needed_gib: float
    work: Work  # of a step

    def cells(self) -> list[str]:
        speeds = [_speed(self, card) for card in CARDS]
        picture = f"{self.side}²"
        return [picture, self.stack, RECOMPUTED[self.checkpointing], str(self.rows), f"{self.needed_gib:.1f}", *speeds]


def _speed(line: Line, card: Card) -> str:
    """Rows a second; in brackets where it is tight, a dash where it does not fit."""
    verdict = cards.verdict(line.needed_gib, card)
    if verdict == "no":
        return "–"
    speed = f"{ROWS_PER_STEP / cards.seconds(line.work, card):.2f}"
    return speed if verdict == "fits" else f"({speed})"


def ours(name: str, side: int, rows: int, checkpointing: int) -> Line:
    """The defaults here: packed, features of the pictures cached."""
    train = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": ROWS_PER_STEP // rows,
        "gradient_checkpointing": checkpointing or False,
    }
    values = {f"train.{key}": value for key, value in train.items()}
    recipe = pictured_recipe(name, size=(side, side), text_tokens=TEXT_TOKENS, **values)
    material = read_material(recipe)
    found = Forecaster(recipe, material, CARDS[0]).forecast()
    assert found.setting.packed, found.notes
    assert found.setting.cached, found.notes
    return Line(side, material.lengths[0], "vlmtune", checkpointing, rows, found.memory.needed_gib, found.work)


def theirs(stack: Stack, name: str, side: int, rows: int) -> Line:
    """Another stack, as it is by default: every layer is recomputed."""
    material = pictured(name, size=(side, side), text_tokens=TEXT_TOKENS)
    batch = padded(material, rows)
    simulation = simulated(stack, material.config, material.collator.processor)
    if stack.norms_in_32_bit:  # in its first forward, bitsandbytes casts the biases of 4-bit layers for good
        simulation.step(padded(material, 1), accumulates=True)
    step = simulation.step(batch, accumulates=True)
    work = work_of(step, times=ROWS_PER_STEP / rows)
    return Line(side, material.lengths[0], stack.name, 1, rows, needed_gib(step), work)


def table(name: str, sides: Sequence[int]) -> Iterator[Line]:
    for side in sides:
        for rows in MICRO_BATCHES:
            for checkpointing in CHECKPOINTING:
                yield ours(name, side, rows, checkpointing)
            for stack in (TRL, TUTORIAL):
                yield theirs(stack, name, side, rows)


def main(
    *,
    only: Annotated[str, typer.Option("--only", help="Models that have this in their name.")] = "",
    write: Annotated[Path | None, typer.Option("--write", help="A page with a place for the tables.")] = None,
) -> None:
    """Simulates each setting and prints the tables in Markdown."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start, page = time.perf_counter(), ""
    for model, (name, sides) in MODELS.items():
        if only.lower() not in model.lower():
            continue
        lines: list[Line] = []
        for line in table(name, sides):
            lines.append(line)
            print(".", end="", file=sys.stderr, flush=True)
        tokens = ", ".join(f"{line.side}²: {line.tokens}" for line in {line.side: line for line in lines}.values())
        page += f"**{model}** (tokens a row: {tokens})\n\n{markdown(HEADER, (line.cells() for line in lines), words=3)}\n"
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    page += f"Simulated with {names}.\n"
    if write:
        put(write, "tables", page)
    else:
        print(page)
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)

"""What a pack costs a CPU whose rows begin alike, the beginning computed in every row and once: language model, both ways.

OMP_NUM_THREADS=1 python benchmarks/prefixes.py
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import milliseconds
from model import make_checkpoint
from pages import markdown

from vlmtune import MultimodalCollator, load_recipe
from vlmtune.collator import PackingCollator
from vlmtune.model import attend_by_row, kept_apart, load_model, positions_model, share_prefixes_in

ROWS, OWN = 8, 300  # of a pack, and letters of each row's own: the small model's tokens are letters
BEGINNINGS = (0, 30, 100, 300, 1000)  # letters of the system prompt


def main() -> None:
    header = ["system prompt", "tokens in the pack", "computed", "in every row, ms", "once, ms", "times faster"]
    with tempfile.TemporaryDirectory() as directory:
        print(markdown(header, measured(Path(directory)), words=0))


def measured(directory: Path) -> Iterator[list[str]]:
    name, out = str(make_checkpoint("qwen2_vl", directory / "model")), str(directory / "run")
    sections = {"model": {"name": name, "quantization": "none"}, "data": {"source": name}, "train": {"output_dir": out}}
    model, processor, family = load_model(load_recipe(sections))
    attend_by_row(model)
    assert share_prefixes_in(model)
    collator = MultimodalCollator(processor, family)
    for beginning in BEGINNINGS:
        rows = made_rows(beginning)
        taken: list[float] = []
        for shares in (False, True):
            batch = PackingCollator(collator, positions_model(model), 128, shares)(rows)
            taken.append(milliseconds(partial(learn, model, batch)))
        tokens = int(batch["attention_mask"].sum())
        computed = tokens - (batch["input_ids"].shape[1] - len(batch["unique"]))
        yield [str(beginning), str(tokens), str(computed), *(f"{time:.0f}" for time in taken), f"{taken[0] / taken[1]:.2f}"]


def made_rows(beginning: int) -> list[dict[str, Any]]:
    chance = random.Random(0)

    def said(role: str, letters: int) -> dict[str, Any]:
        text = "".join(chance.choices("abcdefgh ", k=letters))
        return {"role": role, "content": [{"type": "text", "text": text}]}

    system = [said("system", beginning)] if beginning else []
    return [{"messages": [*system, said("user", OWN - 60), said("assistant", 60)]} for _ in range(ROWS)]


def learn(model: Any, batch: dict[str, Any]) -> None:
    """Forward and backward, without the head."""
    core = model.get_base_model().base_model
    inputs = kept_apart(model, {name: values for name, values in batch.items() if name != "labels"})
    with torch.autocast("cpu", torch.bfloat16):
        core(**inputs, use_cache=False).last_hidden_state.float().sum().backward()


if __name__ == "__main__":
    main()

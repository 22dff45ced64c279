"""What a pack costs a CPU whose rows begin alike or show the same pictures, all computed in every row and once.

In the first two tables the language model alone; in the third with a tower that is trained.

OMP_NUM_THREADS=1 python benchmarks/prefixes.py
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import milliseconds
from model import make_checkpoint
from pages import markdown
from PIL import Image

from vlmtune import MultimodalCollator, load_recipe
from vlmtune.collator import PackingCollator, pictures
from vlmtune.families import Family
from vlmtune.model import attend_by_row, kept_apart, load_model, positions_model, share_prefixes_in, with_features

ROWS, OWN = 8, 300  # of a pack, and letters of each row's own: the small model's tokens are letters
BEGINNINGS = (0, 30, 100, 300, 1000)  # letters of the system prompt
OF_A_PICTURE = (1, 2, 4, 8)  # rows
EDGE, ASKED, ANSWERED = 560, 60, 40  # pixels of pictures, which make 400 tokens; letters of questions and answers


Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    times = ["tokens in the pack", "computed", "in every row, ms", "once, ms", "times faster"]
    with tempfile.TemporaryDirectory() as directory:
        pack = loaded(Path(directory), "language")
        beginnings = ([str(letters), *measured(*pack, begun(letters))] for letters in BEGINNINGS)
        print(markdown(["system prompt", *times], beginnings, words=0))
        shown = ([str(rows), *measured(*pack, about(rows))] for rows in OF_A_PICTURE)
        print(markdown(["rows of a picture", *times], shown, words=0))
        pack = loaded(Path(directory), "all")
        times = ["in every row, ms", "once in the language model, ms", "in the tower too, ms", "times faster", "by the tower"]
        shown = ([str(rows), *with_tower(*pack, about(rows))] for rows in OF_A_PICTURE)
        print(markdown(["rows of a picture", *times], shown, words=0))


def loaded(directory: Path, scope: str) -> tuple[Any, MultimodalCollator]:
    name, out = str(make_checkpoint("qwen2_vl", directory / scope)), str(directory / "run")
    sections = {"model": {"name": name, "quantization": "none"}, "data": {"source": name}, "train": {"output_dir": out}}
    sections["lora"] = {"scope": scope}
    model, processor, family = load_model(load_recipe(sections))
    attend_by_row(model)
    assert not share_prefixes_in(model)
    return model, MultimodalCollator(processor, family)


def measured(model: Any, collator: MultimodalCollator, rows: Rows) -> list[str]:
    taken: list[float] = []
    sources, core = [source for row in rows for source in pictures(row)], model.get_base_model().base_model
    with torch.no_grad():
        features = [collator.family.encode(core, collator.pictures([source]))[0] for source in sources]
    for shares in (False, True):
        batch = PackingCollator(collator, positions_model(model), 128, shares, shares_pictures=True)(rows)
        if features:
            batch = {name: values for name, values in batch.items() if not name.startswith("pixel_")}
            batch["image_features"] = collator.family.join_features(batch, features)
        taken.append(milliseconds(partial(learn, model, collator.family, batch)))
    tokens = int(batch["attention_mask"].sum())
    computed = tokens - (batch["input_ids"].shape[1] - len(batch["unique"]))
    return [str(tokens), str(computed), *(f"{time:.0f}" for time in taken), f"{taken[0] / taken[1]:.2f}"]


def with_tower(model: Any, collator: MultimodalCollator, rows: Rows) -> list[str]:
    """The same rows with the tower's work on their pictures, forward and backward."""
    core = positions_model(model)
    ways = [{}, {"shares": True}, {"shares": True, "apart": True}]
    packs = [PackingCollator(collator, core, 128, shares_pictures=True, **way)(rows) for way in ways]
    taken = [milliseconds(partial(learn, model, collator.family, batch)) for batch in packs]
    return [*(f"{time:.0f}" for time in taken), f"{taken[0] / taken[2]:.2f}", f"{taken[1] / taken[2]:.2f}"]


def begun(letters: int) -> Rows:
    """Rows that begin with a system prompt."""
    chance = random.Random(0)
    system = [said(chance, "system", letters)] if letters else []
    return [{"messages": [*system, said(chance, "user", OWN - 60), said(chance, "assistant", 60)]} for _ in range(ROWS)]


def about(rows: int) -> Rows:
    """Questions about pictures, so many about each."""
    chance = random.Random(0)
    shown = [Image.frombytes("RGB", (EDGE, EDGE), chance.randbytes(3 * EDGE**2)) for _ in range(ROWS // rows)]
    return [
        {"messages": [said(chance, "user", ASKED, shown[number // rows]), said(chance, "assistant", ANSWERED)]}
        for number in range(ROWS)
    ]


def said(chance: random.Random, role: str, letters: int, picture: Image.Image | None = None) -> dict[str, Any]:
    text = {"type": "text", "text": "".join(chance.choices("abcdefgh ", k=letters))}
    return {"role": role, "content": [{"type": "image", "image": picture}, text] if picture else [text]}


def learn(model: Any, family: Family, batch: dict[str, Any]) -> None:
    """Forward and backward, without the head."""
    core = model.get_base_model().base_model
    with torch.autocast("cpu", torch.bfloat16):
        batch = family.model_inputs(with_features(model, family, batch))
        inputs = kept_apart(model, {name: values for name, values in batch.items() if name != "labels"})
        core(**inputs, use_cache=False).last_hidden_state.float().sum().backward()


if __name__ == "__main__":
    main()

"""Rows for the benchmark: product pictures and texts of many lengths, made from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

EDGES = {"qwen2_vl": (224, 448), "pixtral": (224, 448), "mllama": (196, 294)}  # Mllama: one tile, as 500 of 560 pixels
SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "zu", "pan", "mer", "sol", "fin", "dor", "gal"]
COLOURS = ["black", "white", "red", "green", "blue", "yellow", "grey", "brown"]


def make_rows(family: str, count: int, directory: Path, *, questions: int = 1, seed: int = 0) -> Path:
    """`rows.jsonl` and `pictures/`: OpenAI's messages, `<image>` in the question, paths of the pictures beside them.

    So many rows, one after the other, have the same picture.
    """
    chance = random.Random(seed)
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number in range(count):
        path = Path("pictures") / f"{number // questions:05d}.jpg"
        low, high = EDGES[family]
        if number % questions == 0:
            _picture(chance, chance.randint(low, high), chance.randint(low, high)).save(directory / path, quality=90)
        title, features = _words(chance, 12, 0.3), _words(chance, 24, 0.9)
        question = f"<image>Write a short product description.\nName: {title.title()}\nAbout: {features}"
        messages = [
            ("system", "You sell online."),
            ("user", question),
            ("assistant", _words(chance, 22, 0.5).capitalize() + "."),
        ]
        row = {"messages": [{"role": role, "content": text} for role, text in messages], "images": [str(path)]}
        lines.append(json.dumps(row))
    path = directory / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _words(chance: random.Random, median: int, sigma: float) -> str:
    """About `median` letters, sometimes several times as many: lengths of product texts have a long tail."""
    length, words = chance.lognormvariate(0, sigma) * median, list[str]()
    while sum(map(len, words)) + len(words) < length:
        words.append("".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))))
    return " ".join(words)


def _picture(chance: random.Random, width: int, height: int) -> Image.Image:
    """A few coloured shapes on a noisy ground."""
    noise = Image.frombytes("L", (width // 8, height // 8), chance.randbytes((width // 8) * (height // 8)))
    picture = noise.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for _ in range(chance.randint(2, 6)):
        x, y = chance.randrange(width), chance.randrange(height)
        box = (x, y, x + chance.randint(20, width // 2), y + chance.randint(20, height // 2))
        chance.choice((draw.ellipse, draw.rectangle))(box, fill=chance.choice(COLOURS))
    return picture

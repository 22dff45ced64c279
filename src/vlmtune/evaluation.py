"""What a model answers: on one row, on many, with its adapter and without, with the pictures and blind."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from rich.table import Table
from transformers import GenerationConfig

from vlmtune.collator import MultimodalCollator
from vlmtune.console import console, half_blocks, progress
from vlmtune.images import load_image
from vlmtune.model import evaluating, on_device
from vlmtune.tools import beside

Sample = Mapping[str, Any]
THUMBNAIL = 160  # pixels, longest edge


def answers(
    model: Any,
    collator: MultimodalCollator,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    description: str = "Answering",
) -> list[str]:
    """The model's greedy answer to each sample `{"messages": [...]}`, whose last turn is the user's."""
    found: list[str] = []
    with evaluating(model), progress() as shown:
        task = shown.add_task(description, total=len(samples), text="")
        for start in range(0, len(samples), batch_size):
            batch = on_device(collator.prompts(samples[start : start + batch_size]), model)
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=stop_token_ids(model.generation_config, collator),
                pad_token_id=collator.tokenizer.pad_token_id,
            )
            new = output[:, batch["input_ids"].shape[1] :]
            found += [text.strip() for text in collator.tokenizer.batch_decode(new, skip_special_tokens=True)]
            shown.advance(task, len(batch["input_ids"]))
    return found


def stop_token_ids(generation: GenerationConfig, collator: MultimodalCollator) -> list[int]:
    """Where generation ends: the stop token that was trained, and those of the checkpoint."""
    own = generation.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({collator.stop_token_id, *(token for token in listed if token is not None)})


def accuracy(given: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal the expected text, spaces at the ends aside."""
    return sum(a.strip() == b.strip() for a, b in zip(given, expected, strict=True)) / max(len(expected), 1)


def question(sample: Sample) -> dict[str, Any]:
    """The sample without its last answer."""
    messages = list(sample["messages"])
    return {**sample, "messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages}


def expected_answer(sample: Sample, collator: MultimodalCollator) -> str:
    """The text of the sample's last answer; its calls and reasoning as the chat template writes them."""
    last = sample["messages"][-1]
    if last["role"] != "assistant":
        return ""
    return collator.answer(sample) if beside(last) else _text(last)


def redrawn(sample: Sample, draw: Callable[[tuple[int, int]], Image.Image]) -> dict[str, Any]:
    """The sample with other pictures of the same sizes."""

    def other(part: Mapping[str, Any]) -> dict[str, Any]:
        return {**part, "image": draw(load_image(part["image"]).size)} if part["type"] == "image" else dict(part)

    return {**sample, "messages": [{**m, "content": [other(part) for part in m["content"]]} for m in sample["messages"]]}


def blanked(sample: Sample) -> dict[str, Any]:
    """The sample with every picture grey: what a model says that cannot look."""
    return redrawn(sample, lambda size: Image.new("RGB", size, (128, 128, 128)))


def probe(*, pictures: bool) -> dict[str, Any]:
    """A question with a picture of noise, and an answer: text and eyes both take part."""
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = [{"type": "image", "image": Image.fromarray(noise.numpy())}] if pictures else []
    question = {"role": "user", "content": [*picture, {"type": "text", "text": "What is this?"}]}
    return {"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "A probe."}]}]}


@dataclass(frozen=True)
class ComparedRow:
    pictures: tuple[Image.Image, ...]
    prompt: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Comparison:
    """Answers of the base and of the tuned model side by side.

    A notebook shows it as a table with pictures; `print` gives Markdown; `write(directory)` leaves comparison.md and
    comparison.html with the pictures.
    """

    rows: tuple[ComparedRow, ...]

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_markdown(self, pictures: Sequence[Sequence[str]] | None = None) -> str:
        """A Markdown table; `pictures` are the links to show, row by row, else the sizes are named."""
        lines = ["| picture | prompt | expected | base | tuned |", "|---|---|---|---|---|"]
        for number, row in enumerate(self.rows):
            named = (
                [f"![]({link})" for link in pictures[number]] if pictures else [f"{p.width}×{p.height}" for p in row.pictures]
            )
            cells = [" ".join(named), row.prompt, row.expected, row.base, row.tuned]
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |")
        return "\n".join(lines)

    def to_html(self) -> str:
        """A self-contained HTML table, pictures inside."""
        style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere;"
        style += "padding:6px;border:1px solid #ccc;max-width:24em"
        head = "".join(f'<th style="{style}">{name}</th>' for name in ("picture", "prompt", "expected", "base", "tuned"))
        body = ""
        for row in self.rows:
            images = "".join(f'<img src="{_data_url(picture)}" alt="">' for picture in row.pictures)
            texts = "".join(
                f'<td style="{style}">{html.escape(t)}</td>' for t in (row.prompt, row.expected, row.base, row.tuned)
            )
            body += f'<tr><td style="{style}">{images}</td>{texts}</tr>'
        return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'

    def write(self, directory: Path) -> None:
        """Leaves comparison.html, comparison.md and the pictures of the latter in `comparison/`."""
        folder = directory / "comparison"
        folder.mkdir(parents=True, exist_ok=True)
        links: list[list[str]] = []
        for number, row in enumerate(self.rows, 1):
            links.append([f"comparison/{number}-{place}.png" for place in range(1, len(row.pictures) + 1)])
            for link, picture in zip(links[-1], row.pictures, strict=True):
                picture.save(directory / link)
        (directory / "comparison.md").write_text(self.to_markdown(links) + "\n", encoding="utf-8")
        page = f'<!doctype html><meta charset="utf-8"><title>base and tuned</title>{self.to_html()}'
        (directory / "comparison.html").write_text(page, encoding="utf-8")

    def print(self) -> None:
        """Shows the table: in a notebook with pictures, in a terminal with coloured blocks where it has colours."""
        if console.is_jupyter:
            from IPython.display import display  # there is one, in a notebook

            display(self)
            return
        table = Table(title="Base and tuned on held-out rows", title_justify="left", show_lines=True, title_style="bold")
        for name in ("picture", "expected", "base", "tuned"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            shown = half_blocks(row.pictures[0]) if row.pictures else ""
            table.add_row(shown, row.expected, row.base, row.tuned)
        console.print(table)


def compare(
    model: PeftModel,
    collator: MultimodalCollator,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> Comparison:
    """Answers with the adapter off and on, in this one process."""
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    asked = [question(sample) for sample in samples]
    with model.disable_adapter():
        base = answers(model, collator, asked, description="Base answers", **options)
    tuned = answers(model, collator, asked, description="Tuned answers", **options)
    return Comparison(
        tuple(
            ComparedRow(
                thumbnails(sample), _text(question(sample)["messages"][-1]), expected_answer(sample, collator), before, after
            )
            for sample, before, after in zip(samples, base, tuned, strict=True)
        )
    )


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def thumbnails(sample: Sample) -> tuple[Image.Image, ...]:
    """The sample's pictures, small enough for a table."""
    sources = [part["image"] for m in sample["messages"] for part in m["content"] if part["type"] == "image"]
    pictures = [load_image(source) for source in sources]
    for picture in pictures:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return tuple(pictures)


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
